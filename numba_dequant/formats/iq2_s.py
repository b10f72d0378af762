"""IQ2_S: x = d * (scales[i] + 0.5) / 4 * grid[q] * sign; 256 weights in 16 sub-blocks of 16, 2.5625 bits per weight.

A sub-block has two grid points and one scale. Each index q has ten bits and selects a point: eight values. The first 32
bytes of `qs` hold the low eight bits of q. Byte k of `qh` holds the top two bits for points 4k to 4k + 3, starting from
the lowest bits. The last 32 bytes of `qs` hold the signs, one byte per point, 1 for minus. Each byte of `scales` holds
two scales, the first in the low nibble.

Source: GGML, `block_iq2_s` and `iq2s_grid` in ggml-common.h, `dequantize_row_iq2_s` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, load_u16, lookup, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ2_S_GRID, negate_bytes, points, signs_of
from numba_dequant.halves import byte_as_halves, halves_of_bytes, lookup_in_tile, negated, scaled

LAYOUT = block_layout(d="f2", qs=("u1", 64), qh=("u1", 8), scales=("u1", 8))
D, QS, QH, SCALES = field_offsets(LAYOUT)
SIGNS = QS + 32
EIGHTH = np.float32(0.125)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    low, signs = blocks["qs"][:, :32], signs_of(blocks["qs"][:, 32:])
    high = (blocks["qh"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    indexes = low | (high.reshape(-1, 32).astype(np.uint16) << 8)
    scales = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], axis=2).reshape(-1, 16).astype(np.float32)
    d = blocks["d"].astype(np.float32)[:, None] * (scales + np.float32(0.5)) * np.float32(0.25)
    return (np.repeat(d, 2, axis=1)[:, :, None] * points(IQ2_S_GRID, indexes) * signs).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    high = (load_u8(block, at + QH + (run >> 2)) >> (2 * (run & 3))) & 3
    point = lookup(IQ2_S_GRID, load_u8(block, at + QS + run) | (high << 8))
    scale = (load_u8(block, at + SCALES + (run >> 2)) >> (4 * ((run >> 1) & 1))) & 15
    d = half(load_u16(block, at + D)) * to_float(2 * scale + 1) * EIGHTH
    return d * signed_bytes(negate_bytes(point, load_u8(block, at + SIGNS + run)))


def quants(block: Any, at: int, run: int) -> Any:
    high = (load_u8(block, at + QH + (run >> 2)) >> (2 * (run & 3))) & 3
    point = lookup_in_tile(block, IQ2_S_GRID, load_u8(block, at + QS + run) | (high << 8))
    nibbles = load_8_bytes(block, at + SCALES) >> (4 * ((run >> 1) & 1))
    scale = byte_as_halves(((nibbles & 0x0F0F0F0F0F0F0F0F) << 1) | 0x0101010101010101, run >> 2, 0)
    return scaled(negated(halves_of_bytes(point, 0), load_u8(block, at + SIGNS + run)), scale)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D)) * EIGHTH


IQ2_S = Format(
    "IQ2_S",
    22,
    256,
    LAYOUT,
    "32 points of 8 values, grid of 1024; a 4-bit scale per 2 points",
    dequantize,
    decode,
    Factors(quants, scale, table=IQ2_S_GRID),
)
