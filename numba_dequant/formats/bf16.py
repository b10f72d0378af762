"""BF16: x = the stored bfloat16, the upper half of a float32; 16 bits per weight."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import load_8_bf16
from numba_dequant.format import Format, block_layout

LAYOUT = block_layout(x="u2")


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return (blocks["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


def decode(block: Any, at: int, run: int) -> Any:
    return load_8_bf16(block, at)


BF16 = Format("BF16", 30, 1, LAYOUT, "plain bfloat16, the upper half of a float32", dequantize, decode)
