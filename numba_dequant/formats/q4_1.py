"""Q4_1: x = d * q + m; 32 weights, 5 bits per weight.

Byte k of `qs` holds quant k in its low nibble and quant k + 16 in its high nibble.

Source: GGML, `block_q4_1` in ggml-common.h and `dequantize_row_q4_1` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u16, load_u32, unsigned_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import NIBBLES, halves_of_nibbles

LAYOUT = block_layout(d="f2", m="f2", qs=("u1", 16))
D, M, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    m = blocks["m"].astype(np.float32)[:, None]
    quants = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1).astype(np.float32)
    return d * quants + m


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    quants = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    return half(load_u16(block, at + D)) * unsigned_bytes(quants) + half(load_u16(block, at + M))


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_nibbles(load_u32(block, at + QS + 4 * run), 0)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def minimum(block: Any, at: int, number: int) -> Any:
    return half(load_u16(block, at + M))


Q4_1 = Format(
    "Q4_1",
    3,
    32,
    LAYOUT,
    "32 four-bit quants; one scale and one minimum",
    dequantize,
    decode,
    Factors(quants, scale, NIBBLES, minimum),
)
