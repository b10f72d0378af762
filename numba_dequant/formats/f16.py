"""F16: x = the stored float16; 16 bits per weight."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import load_8_halves
from numba_dequant.format import Format, block_layout

LAYOUT = block_layout(x="f2")


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks["x"].astype(np.float32)[:, None]


def decode(block: Any, at: int, run: int) -> Any:
    return load_8_halves(block, at)


F16 = Format("F16", 1, 1, LAYOUT, "plain float16", dequantize, decode)
