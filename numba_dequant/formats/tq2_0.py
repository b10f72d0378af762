"""TQ2_0: x = d * (q - 1); 256 weights, 2.0625 bits per weight.

Each half of the block (128 quants) takes 32 bytes of `qs`. Byte k of a half holds its quants k, k + 32, k + 64 and k +
96, starting from the lowest bits. The format is meant for ternary weights: q is 0, 1 or 2.

Source: GGML, `block_tq2_0` in ggml-common.h and `dequantize_row_tq2_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_u16
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import halves_of_fields

LAYOUT = block_layout(qs=("u1", 64), d="f2")
QS, D = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    halves = blocks["qs"].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    quants = ((halves >> shifts) & 3).reshape(-1, 256)
    return d * (quants.astype(np.float32) - 1)


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    quants = (packed >> (2 * ((run >> 2) & 3))) & 0x0303030303030303
    return half(load_u16(block, at + D)) * centred_bytes(quants, 1)


def quants(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    return halves_of_fields(packed, 2 * ((run >> 2) & 3), 2, 1)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


TQ2_0 = Format(
    "TQ2_0", 35, 256, LAYOUT, "256 two-bit quants centred on 1; one scale", dequantize, decode, Factors(quants, scale)
)
