"""IQ2_XXS: x = d * (scale + 0.5) / 4 * grid[q] * sign; 256 weights in 8 sub-blocks of 32, 2.0625 bits per weight.

A sub-block has four grid points and one scale. It takes 8 bytes of `qs`: four index bytes q, then a 32-bit word. Each
index selects a point: eight values. The low 28 bits of the word are the signs, seven bits per point, 1 for minus. The
eighth sign of a point makes its number of minus signs even. The top four bits of the word are the scale.

Source: GGML, `block_iq2_xxs` and `iq2xxs_grid` in ggml-common.h, `dequantize_row_iq2_xxs` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import LookupTable, half, load_u8, load_u16, load_u32, lookup, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import (
    IQ2_SIGNED_LEVELS,
    IQ2_XXS_GRID,
    even_signs,
    even_signs_of,
    negate_bytes,
    points,
    signed_nibbles,
)
from numba_dequant.halves import equal_halves, lookup_in_tile, scaled_halves_of_table

LAYOUT = block_layout(d="f2", qs=("u2", 32))
D, QS = field_offsets(LAYOUT)
EIGHTH = np.float32(0.125)
SIGNED_NIBBLES = LookupTable(signed_nibbles(IQ2_XXS_GRID))


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    indexes = np.ascontiguousarray(blocks["qs"]).view(np.uint8).reshape(-1, 8, 8)[:, :, :4]
    words = np.ascontiguousarray(blocks["qs"]).view("<u4").reshape(-1, 8, 2)[:, :, 1]
    scales = (words >> 28).astype(np.float32)
    signs = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    d = blocks["d"].astype(np.float32)[:, None] * (scales + np.float32(0.5)) * np.float32(0.25)
    return (d[:, :, None, None] * points(IQ2_XXS_GRID, indexes) * even_signs_of(signs)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    start = at + QS + 8 * (run >> 2)
    index = load_u8(block, start + (run & 3))
    word = load_u32(block, start + 4)
    signs = even_signs((word >> (7 * (run & 3))) & 127)
    d = half(load_u16(block, at + D)) * to_float(2 * (word >> 28) + 1) * EIGHTH
    return d * signed_bytes(negate_bytes(lookup(IQ2_XXS_GRID, index), signs))


def quants(block: Any, at: int, run: int) -> Any:
    start = at + QS + 8 * (run >> 2)
    point = lookup_in_tile(block, SIGNED_NIBBLES, load_u8(block, start + (run & 3)))
    word = load_u32(block, start + 4)
    signs = lookup_in_tile(block, SIGNED_NIBBLES, 256 + ((word >> (7 * (run & 3))) & 127))
    return scaled_halves_of_table(IQ2_SIGNED_LEVELS, point | signs, equal_halves(2 * (word >> 28) + 1))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D)) * EIGHTH


IQ2_XXS = Format(
    "IQ2_XXS",
    16,
    256,
    LAYOUT,
    "32 points of 8 values, grid of 256; a 4-bit scale per 4 points",
    dequantize,
    decode,
    Factors(quants, scale, table=SIGNED_NIBBLES),
)
