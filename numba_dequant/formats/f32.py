"""F32: x = the stored float32; 32 bits per weight."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import load_8_floats
from numba_dequant.format import Format, block_layout

LAYOUT = block_layout(x="f4")


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks["x"].astype(np.float32)[:, None]


def decode(block: Any, at: int, run: int) -> Any:
    return load_8_floats(block, at)


F32 = Format("F32", 0, 1, LAYOUT, "plain float32", dequantize, decode)
