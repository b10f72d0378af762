"""Q6_K: x = d * scales[i] * (q - 32); 256 weights in 16 sub-blocks of 16, 6.5625 bits per weight.

Each half of the block (128 quants) is four groups of 32. A half takes 64 bytes of `ql`, which hold the low four bits of
the quants: groups 0 and 1 in the low nibbles, groups 2 and 3 in the high nibbles. A half takes 32 bytes of `qh`, which
hold the top two bits. Byte k has those of quant k of each group, group 0 in the lowest bits.

Source: GGML, `block_q6_K` in ggml-common.h and `dequantize_row_q6_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_i8, load_u16, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import byte_as_halves, halves_of_bytes, scaled

LAYOUT = block_layout(ql=("u1", 128), qh=("u1", 64), scales=("i1", 16), d="f2")
QL, QH, SCALES, D = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None] * blocks["scales"].astype(np.float32)
    halves = blocks["ql"].reshape(-1, 2, 1, 64)
    low = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(-1, 16, 16)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((blocks["qh"].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 16, 16)
    return (d[:, :, None] * ((low | (high << 4)).astype(np.float32) - 32)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    group = (run >> 2) & 3
    d = half(load_u16(block, at + D)) * to_float(load_i8(block, at + SCALES + (run >> 1)))
    packed = load_8_bytes(block, at + QL + 64 * (run >> 4) + 32 * (group & 1) + 8 * (run & 3))
    low = (packed >> (4 * (group >> 1))) & 0x0F0F0F0F0F0F0F0F
    top = load_8_bytes(block, at + QH + 32 * (run >> 4) + 8 * (run & 3))
    high = (top >> (2 * group)) & 0x0303030303030303
    return d * centred_bytes(low | (high << 4), 32)


def quants(block: Any, at: int, run: int) -> Any:
    group = (run >> 2) & 3
    packed = load_8_bytes(block, at + QL + 64 * (run >> 4) + 32 * (group & 1) + 8 * (run & 3))
    low = (packed >> (4 * (group >> 1))) & 0x0F0F0F0F0F0F0F0F
    top = load_8_bytes(block, at + QH + 32 * (run >> 4) + 8 * (run & 3))
    high = (top >> (2 * group)) & 0x0303030303030303
    scales = load_8_bytes(block, at + SCALES + 8 * (run >> 4)) ^ -0x7F7F7F7F7F7F7F80
    # Up to 32 * 128, which has 13 bits, so a large product is rounded.
    return scaled(halves_of_bytes(low | (high << 4), 32), byte_as_halves(scales, (run >> 1) & 7, 128))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q6_K = Format(
    "Q6_K",
    14,
    256,
    LAYOUT,
    "16 sub-blocks of 16 six-bit quants centred on 32; an 8-bit scale each",
    dequantize,
    decode,
    Factors(quants, scale),
)
