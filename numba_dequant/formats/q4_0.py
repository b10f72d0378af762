"""Q4_0: x = d * (q - 8); 32 weights, 4.5 bits per weight.

Byte k of `qs` holds quant k in its low nibble and quant k + 16 in its high nibble.

Source: GGML, `block_q4_0` in ggml-common.h and `dequantize_row_q4_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_u16, load_u32
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import NIBBLES, halves_of_nibbles

LAYOUT = block_layout(d="f2", qs=("u1", 16))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    quants = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1).astype(np.float32)
    return d * (quants - 8)


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    quants = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    return half(load_u16(block, at + D)) * centred_bytes(quants, 8)


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_nibbles(load_u32(block, at + QS + 4 * run), 8)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q4_0 = Format(
    "Q4_0",
    2,
    32,
    LAYOUT,
    "32 four-bit quants centred on 8; one scale",
    dequantize,
    decode,
    Factors(quants, scale, NIBBLES),
)
