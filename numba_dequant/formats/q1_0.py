"""Q1_0: x = d * (2 * q - 1); 128 weights, 1.125 bits per weight.

Bit k of `qs` is quant k, starting from the lowest bit of byte 0: 1 for +d, 0 for -d.

Source: GGML, `block_q1_0` in ggml-common.h and `dequantize_row_q1_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_u8, load_u16, spread_bits
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import halves_of_signs

LAYOUT = block_layout(d="f2", qs=("u1", 16))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    return np.where(np.unpackbits(blocks["qs"], axis=1, bitorder="little"), d, -d)


def decode(block: Any, at: int, run: int) -> Any:
    doubled = spread_bits(load_u8(block, at + QS + run)) << 1
    return half(load_u16(block, at + D)) * centred_bytes(doubled, 1)


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_signs(load_u8(block, at + QS + run))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q1_0 = Format("Q1_0", 41, 128, LAYOUT, "128 signs; one scale", dequantize, decode, Factors(quants, scale))
