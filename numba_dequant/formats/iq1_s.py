"""IQ1_S: x = d * (2 * scale + 1) * (grid[q] + delta); 256 weights in 8 sub-blocks of 32, 1.5625 bits per weight.

A sub-block has four grid points, one scale and one delta. Each index q has 11 bits and selects a point: eight values,
each -1, 0 or 1. `qs` holds the low eight bits of q. Item i of `qh` belongs to sub-block i. From the lowest bit up, it
holds the top three bits of each of the four indexes, the 3-bit scale, and the sign of delta: 0 for 0.125, 1 for -0.125.

Source: GGML, `block_iq1_s`, `iq1s_grid` and `IQ1S_DELTA` in ggml-common.h, `dequantize_row_iq1_s` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_u8, load_u16, lookup, signed_bytes, single, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ1_GRID, points
from numba_dequant.halves import equal_halves, halves_of_bytes, lookup_in_tile, scaled

LAYOUT = block_layout(d="f2", qs=("u1", 32), qh=("u2", 8))
D, QS, QH = field_offsets(LAYOUT)
EIGHTH_BITS = 0x3E000000


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    qh = blocks["qh"]
    high = (qh[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    indexes = blocks["qs"].reshape(-1, 8, 4) | (high << 8)
    deltas = np.where(qh >> 15, np.float32(-0.125), np.float32(0.125))
    d = blocks["d"].astype(np.float32)[:, None] * (2 * ((qh >> 12) & 7) + 1).astype(np.float32)
    return (d[:, :, None, None] * (points(IQ1_GRID, indexes) + deltas[:, :, None, None])).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    qh = load_u16(block, at + QH + 2 * (run >> 2))
    high = (qh >> (3 * (run & 3))) & 7
    point = lookup(IQ1_GRID, load_u8(block, at + QS + run) | (high << 8))
    delta = single(EIGHTH_BITS | ((qh >> 15) << 31))
    d = half(load_u16(block, at + D)) * to_float(2 * ((qh >> 12) & 7) + 1)
    return d * (signed_bytes(point) + delta)


def quants(block: Any, at: int, run: int) -> Any:
    qh = load_u16(block, at + QH + 2 * (run >> 2))
    high = (qh >> (3 * (run & 3))) & 7
    point = lookup_in_tile(block, IQ1_GRID, load_u8(block, at + QS + run) | (high << 8))
    return scaled(halves_of_bytes(point ^ -0x7F7F7F7F7F7F7F80, 128), equal_halves(2 * ((qh >> 12) & 7) + 1))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def minimum(block: Any, at: int, number: int) -> Any:
    qh = load_u16(block, at + QH + 2 * number)
    return to_float((2 * ((qh >> 12) & 7) + 1) * (1 - 2 * (qh >> 15)))


def offset(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D)) * single(EIGHTH_BITS)


IQ1_S = Format(
    "IQ1_S",
    19,
    256,
    LAYOUT,
    "32 ternary points of 8 values, grid of 2048; scale and delta per 4 points",
    dequantize,
    decode,
    Factors(quants, scale, minimum=minimum, offset=offset, table=IQ1_GRID),
)
