"""IQ1_M: x = d * (2 * scales[i] + 1) * (grid[q] + delta); 256 weights in 16 sub-blocks of 16, 1.75 bits per weight.

A sub-block has two grid points and one scale. Each index q has 11 bits and selects a point: eight values, each -1, 0 or
1. `qs` holds the low eight bits of q. Each nibble of `qh`, low nibble first, belongs to one point. Its low three bits
are the top bits of q. Its highest bit is the sign of delta: 0 for 0.125, 1 for -0.125.

`scales` is four 16-bit words. The low 12 bits of each word are four scales of 3 bits, from the lowest bits up. The top
four bits of the words form the float16 `d`, its lowest four bits in the first word.

Source: GGML, `block_iq1_m`, `iq1s_grid` and `IQ1M_DELTA` in ggml-common.h, `dequantize_row_iq1_m` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, lookup, signed_bytes, single, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ1_GRID, points
from numba_dequant.halves import equal_halves, halves_of_bytes, lookup_in_tile, scaled

LAYOUT = block_layout(qs=("u1", 32), qh=("u1", 16), scales=("u1", 8))
QS, QH, SCALES = field_offsets(LAYOUT)
EIGHTH_BITS = 0x3E000000


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    words = np.ascontiguousarray(blocks["scales"]).view("<u2")
    d_bits = np.bitwise_or.reduce((words >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=1, dtype=np.uint16)
    scales = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    d = d_bits.view(np.float16).astype(np.float32)[:, None] * (2 * scales.reshape(-1, 16) + 1).astype(np.float32)
    nibbles = np.stack([blocks["qh"] & 15, blocks["qh"] >> 4], axis=2).reshape(-1, 32)
    grid = points(IQ1_GRID, blocks["qs"] | ((nibbles & 7).astype(np.uint16) << 8))
    deltas = np.where(nibbles >> 3, np.float32(-0.125), np.float32(0.125))
    return (np.repeat(d, 2, axis=1)[:, :, None] * (grid + deltas[:, :, None])).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    scales = load_8_bytes(block, at + SCALES)
    d_bits = ((scales >> 12) & 0xF) | ((scales >> 24) & 0xF0) | ((scales >> 36) & 0xF00) | ((scales >> 48) & 0xF000)
    scale = (scales >> (16 * (run >> 3) + 3 * ((run >> 1) & 3))) & 7
    nibble = load_u8(block, at + QH + (run >> 1)) >> (4 * (run & 1))
    point = lookup(IQ1_GRID, load_u8(block, at + QS + run) | ((nibble & 7) << 8))
    delta = single(EIGHTH_BITS | ((nibble & 8) << 28))
    return half(d_bits) * to_float(2 * scale + 1) * (signed_bytes(point) + delta)


def quants(block: Any, at: int, run: int) -> Any:
    scales = load_8_bytes(block, at + SCALES)
    scale = (scales >> (16 * (run >> 3) + 3 * ((run >> 1) & 3))) & 7
    nibble = load_u8(block, at + QH + (run >> 1)) >> (4 * (run & 1))
    point = lookup_in_tile(block, IQ1_GRID, load_u8(block, at + QS + run) | ((nibble & 7) << 8))
    # Eight times the values, so that delta is 1 or -1.
    eightfold = (point << 3) & -0x0707070707070708
    return scaled(
        halves_of_bytes(eightfold ^ -0x7F7F7F7F7F7F7F80, 127 + ((nibble >> 2) & 2)), equal_halves(2 * scale + 1)
    )


def scale(block: Any, at: int) -> Any:
    scales = load_8_bytes(block, at + SCALES)
    d_bits = ((scales >> 12) & 0xF) | ((scales >> 24) & 0xF0) | ((scales >> 36) & 0xF00) | ((scales >> 48) & 0xF000)
    return half(d_bits) * single(EIGHTH_BITS)


IQ1_M = Format(
    "IQ1_M",
    29,
    256,
    LAYOUT,
    "32 ternary points of 8 values, grid of 2048; scale per 2 points, delta per point",
    dequantize,
    decode,
    Factors(quants, scale, table=IQ1_GRID),
)
