"""IQ2_XS: a super-block of 32 points of a grid, eight values each, and a 4-bit scale for every two of them.

An item of `qs` holds the number of a point in its low nine bits and seven signs above (the eighth makes the number of
minus signs even). Byte i of `scales` holds the scales of points 4i and 4i + 1 (low nibble) and the next two (high).

Source: GGML, `block_iq2_xs` and `iq2xs_grid` in ggml-common.h, `dequantize_row_iq2_xs` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_u8, load_u16, lookup, signed_bytes, to_float
from numba_dequant.format import Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ2_XS_GRID, even_signs, even_signs_of, negate_bytes, points

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


IQ2_XS = Format(
    "IQ2_XS", 17, 256, LAYOUT, "32 points of eight from a grid of 512, a 4-bit scale per two", dequantize, decode
)
