"""Q3_K: x = d * (scales[i] - 32) * (q - 4); 256 weights in 16 sub-blocks of 16, 3.4375 bits per weight.

`qs` holds the low two bits of the quants. Each half of the block (128 quants) takes 32 bytes of `qs`. Byte k of a half
holds its quants k, k + 32, k + 64 and k + 96, starting from the lowest bits. The third bit of quant k of the block is
bit k // 32 of byte k % 32 of `hmask`.

`scales` packs 16 scales of 6 bits. The low four bits of scale i are in byte i % 8: in the low nibble for scales 0 to 7,
in the high nibble for the others. The top two bits are in byte 8 + i % 4, from bit 2 * (i // 4) up.

Source: GGML, `block_q3_K` in ggml-common.h and `dequantize_row_q3_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_u8, load_u16, load_u32, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import byte_as_halves, halves_of_bytes, scaled

LAYOUT = block_layout(hmask=("u1", 32), qs=("u1", 64), scales=("u1", 12), d="f2")
HMASK, QS, SCALES, D = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    packed = blocks["scales"]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    d = blocks["d"].astype(np.float32)[:, None] * ((low | (high << 4)).astype(np.float32) - 32)
    halves = blocks["qs"].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    two_bits = ((halves >> shifts) & 3).reshape(-1, 16, 16)
    third_bit = ((blocks["hmask"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(-1, 16, 16)
    return (d[:, :, None] * ((two_bits | (third_bit << 2)).astype(np.float32) - 4)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 1
    low = (load_u8(block, at + SCALES + (sub_block & 7)) >> (4 * (sub_block >> 3))) & 15
    high = (load_u8(block, at + SCALES + 8 + (sub_block & 3)) >> (2 * (sub_block >> 2))) & 3
    d = half(load_u16(block, at + D)) * to_float((low | (high << 4)) - 32)
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    two_bits = (packed >> (2 * ((run >> 2) & 3))) & 0x0303030303030303
    third_bit = (load_8_bytes(block, at + HMASK + 8 * (run & 3)) >> (run >> 2)) & 0x0101010101010101
    return d * centred_bytes(two_bits | (third_bit << 2), 4)


def quants(block: Any, at: int, run: int) -> Any:
    # The low four bits of scales 0 to 7 or 8 to 15, then their top two bits.
    late = run >> 4
    low = (load_8_bytes(block, at + SCALES) >> (4 * late)) & 0x0F0F0F0F0F0F0F0F
    top = load_u32(block, at + SCALES + 8) >> (4 * late)
    high = (top & 0x03030303) | (((top >> 2) & 0x03030303) << 32)
    scale = byte_as_halves(low | (high << 4), (run >> 1) & 7, 32)
    packed = load_8_bytes(block, at + QS + 32 * (run >> 4) + 8 * (run & 3))
    two_bits = (packed >> (2 * ((run >> 2) & 3))) & 0x0303030303030303
    third_bit = (load_8_bytes(block, at + HMASK + 8 * (run & 3)) >> (run >> 2)) & 0x0101010101010101
    return scaled(halves_of_bytes(two_bits | (third_bit << 2), 4), scale)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q3_K = Format(
    "Q3_K",
    11,
    256,
    LAYOUT,
    "16 sub-blocks of 16 three-bit quants centred on 4; a 6-bit scale each",
    dequantize,
    decode,
    Factors(quants, scale),
)
