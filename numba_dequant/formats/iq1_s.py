"""IQ1_S: a super-block of eight sub-blocks of 32: four ternary points of a grid, a 3-bit scale and a shift.

`qs` holds the low eight bits of the numbers of the points, eight values each. An item of `qh` belongs to a sub-block:
four times three bits, the tops of those numbers, the scale, and in the highest bit the sign of the eighth by which all
values of the sub-block are shifted, a set bit for minus.

Source: GGML, `block_iq1_s`, `iq1s_grid` and `IQ1S_DELTA` in ggml-common.h, `dequantize_row_iq1_s` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_u8, load_u16, lookup, signed_bytes, single, to_float
from numba_dequant.format import Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ1_GRID, points

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


IQ1_S = Format(
    "IQ1_S",
    19,
    256,
    LAYOUT,
    "32 shifted ternary points of eight from a grid of 2048, a 3-bit scale per four",
    dequantize,
    decode,
)
