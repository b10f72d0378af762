"""Q2_0: x = d * (q - 1); 64 weights, 2.25 bits per weight.

Byte k of `qs` holds quants 4k to 4k + 3, starting from the lowest bits.

Source: GGML, `block_q2_0` in ggml-common.h and `dequantize_row_q2_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_u16
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import halves_of_pairs

LAYOUT = block_layout(d="f2", qs=("u1", 16))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    quants = (blocks["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return d * (quants.reshape(-1, 64).astype(np.float32) - 1)


def decode(block: Any, at: int, run: int) -> Any:
    # Spread in three steps: two bytes to 32 bits each, then four nibbles to 16, then eight quants to 8.
    quants = load_u16(block, at + QS + 2 * run)
    quants = (quants | (quants << 24)) & 0x000000FF000000FF
    quants = (quants | (quants << 12)) & 0x000F000F000F000F
    quants = (quants | (quants << 6)) & 0x0303030303030303
    return half(load_u16(block, at + D)) * centred_bytes(quants, 1)


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_pairs(load_u16(block, at + QS + 2 * run), 1)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q2_0 = Format(
    "Q2_0", 42, 64, LAYOUT, "64 two-bit quants centred on 1; one scale", dequantize, decode, Factors(quants, scale)
)
