"""Q5_1: x = d * q + m; 32 weights, 6 bits per weight.

Byte k of `qs` holds the low four bits of quants k (low nibble) and k + 16 (high nibble). Bit k of `qh` is the fifth bit
of quant k.

Source: GGML, `block_q5_1` in ggml-common.h and `dequantize_row_q5_1` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, load_u16, load_u32, spread_bits, unsigned_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import NIBBLES, halves_of_bytes

LAYOUT = block_layout(d="f2", m="f2", qh=("u1", 4), qs=("u1", 16))
D, M, QH, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    m = blocks["m"].astype(np.float32)[:, None]
    low = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    return d * (low | (high << 4)).astype(np.float32) + m


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    low = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    high = spread_bits(load_u8(block, at + QH + run)) << 4
    return half(load_u16(block, at + D)) * unsigned_bytes(low | high) + half(load_u16(block, at + M))


def quants(block: Any, at: int, run: int) -> Any:
    four, high = load_u32(block, at + QS + 4 * run), load_u32(block, at + QH) >> (4 * run)
    # A product puts four bits into bits 4, 12, 20 and 28.
    low_four = (four & 0x0F0F0F0F) | (((high & 15) * 0x2040810) & 0x10101010)
    high_four = ((four >> 4) & 0x0F0F0F0F) | ((((high >> 16) & 15) * 0x2040810) & 0x10101010)
    return halves_of_bytes(low_four | (high_four << 32), 0)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def minimum(block: Any, at: int, number: int) -> Any:
    return half(load_u16(block, at + M))


Q5_1 = Format(
    "Q5_1",
    7,
    32,
    LAYOUT,
    "32 five-bit quants; one scale and one minimum",
    dequantize,
    decode,
    Factors(quants, scale, NIBBLES, minimum),
)
