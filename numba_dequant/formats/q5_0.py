"""Q5_0: x = d * (q - 16); 32 weights, 5.5 bits per weight.

Byte k of `qs` holds the low four bits of quants k (low nibble) and k + 16 (high nibble). Bit k of `qh` is the fifth bit
of quant k.

Source: GGML, `block_q5_0` in ggml-common.h and `dequantize_row_q5_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_u8, load_u16, load_u32, spread_bits
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import NIBBLES, halves_of_bytes

LAYOUT = block_layout(d="f2", qh=("u1", 4), qs=("u1", 16))
D, QH, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    low = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    return d * ((low | (high << 4)).astype(np.float32) - 16)


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    low = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    high = spread_bits(load_u8(block, at + QH + run)) << 4
    return half(load_u16(block, at + D)) * centred_bytes(low | high, 16)


def quants(block: Any, at: int, run: int) -> Any:
    four, high = load_u32(block, at + QS + 4 * run), load_u32(block, at + QH) >> (4 * run)
    # A product puts four bits into bits 4, 12, 20 and 28.
    low_four = (four & 0x0F0F0F0F) | (((high & 15) * 0x2040810) & 0x10101010)
    high_four = ((four >> 4) & 0x0F0F0F0F) | ((((high >> 16) & 15) * 0x2040810) & 0x10101010)
    return halves_of_bytes(low_four | (high_four << 32), 16)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q5_0 = Format(
    "Q5_0",
    6,
    32,
    LAYOUT,
    "32 five-bit quants centred on 16; one scale",
    dequantize,
    decode,
    Factors(quants, scale, NIBBLES),
)
