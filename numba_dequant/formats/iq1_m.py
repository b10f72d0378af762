"""IQ1_M: a super-block of 32 ternary points of a grid, eight values each, a 3-bit scale for every two and a shift each.

`qs` holds the low eight bits of the points' numbers. A nibble of `qh` belongs to a point, the first in the low nibble:
three bits, the top of its number, and in the highest bit the sign of the eighth by which its values are shifted, a set
bit for minus. `scales` are four 16-bit words: four scales each, lowest bits first, and in the top four bits a nibble of
the float16 scale of the super-block, the lowest nibble first.

Source: GGML, `block_iq1_m`, `iq1s_grid` and `IQ1M_DELTA` in ggml-common.h, `dequantize_row_iq1_m` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, lookup, signed_bytes, single, to_float
from numba_dequant.format import Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ1_GRID, points

LAYOUT = block_layout(qs=("u1", 32), qh=("u1", 16), scales=("u1", 8))
QS, QH, SCALES = field_offsets(LAYOUT)
EIGHTH_BITS = 0x3E000000


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    words = np.ascontiguousarray(blocks["scales"]).view("<u2")
    whole = np.bitwise_or.reduce((words >> 12) << np.array([0, 4, 8, 12], np.uint16), axis=1, dtype=np.uint16)
    scales = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    d = whole.view(np.float16).astype(np.float32)[:, None] * (2 * scales.reshape(-1, 16) + 1).astype(np.float32)
    nibbles = np.stack([blocks["qh"] & 15, blocks["qh"] >> 4], axis=2).reshape(-1, 32)
    grid = points(IQ1_GRID, blocks["qs"] | ((nibbles & 7).astype(np.uint16) << 8))
    deltas = np.where(nibbles >> 3, np.float32(-0.125), np.float32(0.125))
    return (np.repeat(d, 2, axis=1)[:, :, None] * (grid + deltas[:, :, None])).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    scales = load_8_bytes(block, at + SCALES)
    whole = ((scales >> 12) & 0xF) | ((scales >> 24) & 0xF0) | ((scales >> 36) & 0xF00) | ((scales >> 48) & 0xF000)
    scale = (scales >> (16 * (run >> 3) + 3 * ((run >> 1) & 3))) & 7
    nibble = load_u8(block, at + QH + (run >> 1)) >> (4 * (run & 1))
    point = lookup(IQ1_GRID, load_u8(block, at + QS + run) | ((nibble & 7) << 8))
    delta = single(EIGHTH_BITS | ((nibble & 8) << 28))
    return half(whole) * to_float(2 * scale + 1) * (signed_bytes(point) + delta)


IQ1_M = Format(
    "IQ1_M",
    29,
    256,
    LAYOUT,
    "32 shifted ternary points of eight from a grid of 2048, a 3-bit scale per two",
    dequantize,
    decode,
)
