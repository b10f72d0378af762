"""IQ3_XXS: x = d * (scale + 0.5) / 2 * grid[q] * sign; 256 weights in 8 sub-blocks of 32, 3.0625 bits per weight.

A sub-block has eight grid points and one scale. The first 64 bytes of `qs` are the indexes q. Each selects a point:
four values. The last 32 bytes of `qs` are a 32-bit word per sub-block. Its low 28 bits are signs, seven bits per eight
weights, 1 for minus. The eighth sign makes the number of minus signs even. The top four bits are the scale.

Source: GGML, `block_iq3_xxs` and `iq3xxs_grid` in ggml-common.h, `dequantize_row_iq3_xxs` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_u16, load_u32, lookup, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ3_XXS_GRID, even_signs, even_signs_of, negate_bytes, points
from numba_dequant.halves import equal_halves, halves_of_bytes, lookup_in_tile, negated, scaled

LAYOUT = block_layout(d="f2", qs=("u1", 96))
D, QS = field_offsets(LAYOUT)
WORDS = QS + 64
QUARTER = np.float32(0.25)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    words = np.ascontiguousarray(blocks["qs"][:, 64:]).view("<u4")
    scales = (words >> 28).astype(np.float32)
    signs = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & 127
    d = blocks["d"].astype(np.float32)[:, None] * (scales + np.float32(0.5)) * np.float32(0.5)
    grid = points(IQ3_XXS_GRID, blocks["qs"][:, :64]).reshape(-1, 8, 4, 8)
    return (d[:, :, None, None] * grid * even_signs_of(signs)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    pair = load_u16(block, at + QS + 2 * run)
    eight = lookup(IQ3_XXS_GRID, pair & 255) | (lookup(IQ3_XXS_GRID, pair >> 8) << 32)
    # Two loads of 16 bits: blocks have even addresses, and one load of 32 bits would be two of 32 bits and a shift.
    start = at + WORDS + 4 * (run >> 2)
    word = load_u16(block, start) | (load_u16(block, start + 2) << 16)
    signs = even_signs((word >> (7 * (run & 3))) & 127)
    d = half(load_u16(block, at + D)) * to_float(2 * (word >> 28) + 1) * QUARTER
    return d * signed_bytes(negate_bytes(eight, signs))


def quants(block: Any, at: int, run: int) -> Any:
    pair = load_u16(block, at + QS + 2 * run)
    point = lookup_in_tile(block, IQ3_XXS_GRID, pair & 255) | (lookup_in_tile(block, IQ3_XXS_GRID, pair >> 8) << 32)
    word = load_u32(block, at + WORDS + 4 * (run >> 2))
    return scaled(
        negated(halves_of_bytes(point, 0), even_signs((word >> (7 * (run & 3))) & 127)),
        equal_halves(2 * (word >> 28) + 1),
    )


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D)) * QUARTER


IQ3_XXS = Format(
    "IQ3_XXS",
    18,
    256,
    LAYOUT,
    "64 points of 4 values, grid of 256; a 4-bit scale per 8 points",
    dequantize,
    decode,
    Factors(quants, scale, table=IQ3_XXS_GRID),
)
