"""IQ2_XS: x = d * (scales[i] + 0.5) / 4 * grid[q] * sign; 256 weights in 16 sub-blocks of 16, 2.3125 bits per weight.

A sub-block has two grid points and one scale. Each item of `qs` belongs to one point. Its low nine bits are the index
q, which selects eight values. Its top seven bits are signs, 1 for minus. The eighth sign makes the number of minus
signs even. Each byte of `scales` holds two scales, the first in the low nibble.

Source: GGML, `block_iq2_xs` and `iq2xs_grid` in ggml-common.h, `dequantize_row_iq2_xs` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, load_u16, lookup, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ2_XS_GRID, even_signs, even_signs_of, negate_bytes, points
from numba_dequant.halves import byte_as_halves, halves_of_bytes, lookup_in_tile, negated, scaled

LAYOUT = block_layout(d="f2", qs=("u2", 32), scales=("u1", 8))
D, QS, SCALES = field_offsets(LAYOUT)
EIGHTH = np.float32(0.125)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    scales = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], axis=2).reshape(-1, 16).astype(np.float32)
    d = blocks["d"].astype(np.float32)[:, None] * (scales + np.float32(0.5)) * np.float32(0.25)
    values = np.repeat(d, 2, axis=1)[:, :, None] * points(IQ2_XS_GRID, blocks["qs"] & 511)
    return (values * even_signs_of(blocks["qs"] >> 9)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    quant = load_u16(block, at + QS + 2 * run)
    scale = (load_u8(block, at + SCALES + (run >> 2)) >> (4 * ((run >> 1) & 1))) & 15
    d = half(load_u16(block, at + D)) * to_float(2 * scale + 1) * EIGHTH
    return d * signed_bytes(negate_bytes(lookup(IQ2_XS_GRID, quant & 511), even_signs(quant >> 9)))


def quants(block: Any, at: int, run: int) -> Any:
    quant = load_u16(block, at + QS + 2 * run)
    point = lookup_in_tile(block, IQ2_XS_GRID, quant & 511)
    nibbles = load_8_bytes(block, at + SCALES) >> (4 * ((run >> 1) & 1))
    scale = byte_as_halves(((nibbles & 0x0F0F0F0F0F0F0F0F) << 1) | 0x0101010101010101, run >> 2, 0)
    return scaled(negated(halves_of_bytes(point, 0), even_signs(quant >> 9)), scale)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D)) * EIGHTH


IQ2_XS = Format(
    "IQ2_XS",
    17,
    256,
    LAYOUT,
    "32 points of 8 values, grid of 512; a 4-bit scale per 2 points",
    dequantize,
    decode,
    Factors(quants, scale, table=IQ2_XS_GRID),
)
