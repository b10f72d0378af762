"""IQ3_S: x = d * (2 * scales[i] + 1) * grid[q] * sign; 256 weights in 8 sub-blocks of 32, 3.4375 bits per weight.

A sub-block has eight grid points and one scale. Each index q has nine bits and selects a point: four values. Byte k of
`qs` holds the low eight bits for point k, and bit k of `qh` holds the ninth. Bit k of `signs` is 1 if weight k is
negative. Each byte of `scales` holds two scales, the first in the low nibble.

Source: GGML, `block_iq3_s` and `iq3s_grid` in ggml-common.h, `dequantize_row_iq3_s` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_u8, load_u16, lookup, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ3_S_GRID, negate_bytes, points, signs_of
from numba_dequant.halves import equal_halves, halves_of_bytes, lookup_in_tile, negated, scaled

LAYOUT = block_layout(d="f2", qs=("u1", 64), qh=("u1", 8), signs=("u1", 32), scales=("u1", 4))
D, QS, QH, SIGNS, SCALES = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little").astype(np.uint16)
    grid = points(IQ3_S_GRID, blocks["qs"] | (high << 8)).reshape(-1, 8, 32)
    scales = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], axis=2).reshape(-1, 8).astype(np.float32)
    d = blocks["d"].astype(np.float32)[:, None] * (2 * scales + 1)
    return (d[:, :, None] * grid * signs_of(blocks["signs"]).reshape(-1, 8, 32)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    pair = load_u16(block, at + QS + 2 * run)
    high = load_u8(block, at + QH + (run >> 2)) >> (2 * (run & 3))
    first = lookup(IQ3_S_GRID, (pair & 255) | ((high & 1) << 8))
    second = lookup(IQ3_S_GRID, (pair >> 8) | ((high & 2) << 7))
    scale = (load_u8(block, at + SCALES + (run >> 3)) >> (4 * ((run >> 2) & 1))) & 15
    d = half(load_u16(block, at + D)) * to_float(2 * scale + 1)
    return d * signed_bytes(negate_bytes(first | (second << 32), load_u8(block, at + SIGNS + run)))


def quants(block: Any, at: int, run: int) -> Any:
    pair = load_u16(block, at + QS + 2 * run)
    high = load_u8(block, at + QH + (run >> 2)) >> (2 * (run & 3))
    first = lookup_in_tile(block, IQ3_S_GRID, (pair & 255) | ((high & 1) << 8))
    point = first | (lookup_in_tile(block, IQ3_S_GRID, (pair >> 8) | ((high & 2) << 7)) << 32)
    nibble = (load_u8(block, at + SCALES + (run >> 3)) >> (4 * ((run >> 2) & 1))) & 15
    return scaled(negated(halves_of_bytes(point, 0), load_u8(block, at + SIGNS + run)), equal_halves(2 * nibble + 1))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


IQ3_S = Format(
    "IQ3_S",
    21,
    256,
    LAYOUT,
    "64 points of 4 values, grid of 512; a 4-bit scale per 8 points",
    dequantize,
    decode,
    Factors(quants, scale, table=IQ3_S_GRID),
)
