"""Q2_K: x = d * scales[i] * q - dmin * mins[i]; 256 weights in 16 sub-blocks of 16, 2.625 bits per weight.

Byte i of the field `scales` holds the scale in its low nibble and the minimum (`mins`) in its high nibble. Each half of
the block (128 quants) takes 32 bytes of `qs`. Byte k of a half holds its quants k, k + 32, k + 64 and k + 96, starting
from the lowest bits.

Source: GGML, `block_q2_K` in ggml-common.h and `dequantize_row_q2_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, load_u16, to_float, unsigned_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import byte_as_halves, scaled_fields

LAYOUT = block_layout(scales=("u1", 16), qs=("u1", 64), d="f2", dmin="f2")
SCALES, QS, D, DMIN = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None] * (blocks["scales"] & 15).astype(np.float32)
    dmin = blocks["dmin"].astype(np.float32)[:, None] * (blocks["scales"] >> 4).astype(np.float32)
    halves = blocks["qs"].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    quants = ((halves >> shifts) & 3).reshape(-1, 16, 16).astype(np.float32)
    return (d[:, :, None] * quants - dmin[:, :, None]).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    scale = load_u8(block, at + SCALES + (run >> 1))
    d = half(load_u16(block, at + D)) * to_float(scale & 15)
    dmin = half(load_u16(block, at + DMIN)) * to_float(scale >> 4)
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    quants = (packed >> (2 * ((run >> 2) & 3))) & 0x0303030303030303
    return d * unsigned_bytes(quants) - dmin


def quants(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    scales = load_8_bytes(block, at + SCALES + 8 * (run >> 4)) & 0x0F0F0F0F0F0F0F0F
    return scaled_fields(packed, 2 * ((run >> 2) & 3), 2, byte_as_halves(scales, (run >> 1) & 7, 0))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def minimum(block: Any, at: int, number: int) -> Any:
    return to_float(load_u8(block, at + SCALES + number) >> 4)


def offset(block: Any, at: int) -> Any:
    return -half(load_u16(block, at + DMIN))


Q2_K = Format(
    "Q2_K",
    10,
    256,
    LAYOUT,
    "16 sub-blocks of 16 two-bit quants; a 4-bit scale and minimum each",
    dequantize,
    decode,
    Factors(quants, scale, minimum=minimum, minimum_size=16, offset=offset),
)
