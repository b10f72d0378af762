"""Q8_K: x = d * q; 256 weights, 9.125 bits per weight.

`qs` holds the quants as signed bytes, and `d` is a float32. `bsums` holds the sums of every 16 quants; only dot
products use them.

Source: GGML, `block_q8_K` in ggml-common.h and `dequantize_row_q8_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import load_8_bytes, load_u32, signed_bytes, single
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import halves_of_bytes

LAYOUT = block_layout(d="f4", qs=("i1", 256), bsums=("i2", 16))
D, QS, BSUMS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d: NDArray[np.float32] = blocks["d"][:, None]
    return d * blocks["qs"].astype(np.float32)


def decode(block: Any, at: int, run: int) -> Any:
    return single(load_u32(block, at + D)) * signed_bytes(load_8_bytes(block, at + QS + 8 * run))


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_bytes(load_8_bytes(block, at + QS + 8 * run) ^ -0x7F7F7F7F7F7F7F80, 128)


def scale(block: Any, at: int) -> Any:
    return single(load_u32(block, at + D))


Q8_K = Format(
    "Q8_K",
    15,
    256,
    LAYOUT,
    "256 signed bytes; one float32 scale, and the sums of every 16",
    dequantize,
    decode,
    Factors(quants, scale),
)
