"""Q4_K: x = d * scales[i] * q - dmin * mins[i]; 256 weights in 8 sub-blocks of 32, 4.5 bits per weight.

The field `scales` packs eight scales and eight minima (`mins`) of 6 bits in 12 bytes. Bytes 0 to 3 hold scales 0 to 3
and bytes 4 to 7 hold minima 0 to 3, each in the low six bits. Byte 8 + k holds the low four bits of scale 4 + k (low
nibble) and of minimum 4 + k (high nibble). Their top two bits are the top two bits of bytes k and 4 + k.

Each pair of sub-blocks takes 32 bytes of `qs`: the first in the low nibbles, the second in the high nibbles.

Source: GGML, `block_q4_K` in ggml-common.h, `get_scale_min_k4` and `dequantize_row_q4_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u16, to_float, unsigned_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._scales import minimum_of, packed_minima, packed_scales, scale_of, unpack_scales
from numba_dequant.halves import byte_as_halves, scaled_fields

LAYOUT = block_layout(d="f2", dmin="f2", scales=("u1", 12), qs=("u1", 128))
D, DMIN, SCALES, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    scales, minima = unpack_scales(blocks["scales"])
    d = blocks["d"].astype(np.float32)[:, None] * scales
    dmin = blocks["dmin"].astype(np.float32)[:, None] * minima
    pairs = blocks["qs"].reshape(-1, 4, 1, 32)
    quants = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    return (d[:, :, None] * quants - dmin[:, :, None]).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    d = half(load_u16(block, at + D)) * to_float(scale_of(block, at + SCALES, sub_block))
    dmin = half(load_u16(block, at + DMIN)) * to_float(minimum_of(block, at + SCALES, sub_block))
    packed = load_8_bytes(block, at + QS + 32 * (sub_block >> 1) + 8 * (run & 3))
    quants = (packed >> (4 * (sub_block & 1))) & 0x0F0F0F0F0F0F0F0F
    values: NDArray[np.float32] = d * unsigned_bytes(quants) - dmin
    return values


def quants(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    packed = load_8_bytes(block, at + QS + 32 * (sub_block >> 1) + 8 * (run & 3))
    scale = byte_as_halves(packed_scales(block, at + SCALES), sub_block, 0)
    return scaled_fields(packed, 4 * (sub_block & 1), 4, scale)


def minimum(block: Any, at: int, number: int) -> Any:
    return to_float((packed_minima(block, at + SCALES) >> (8 * number)) & 63)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def offset(block: Any, at: int) -> Any:
    return -half(load_u16(block, at + DMIN))


Q4_K = Format(
    "Q4_K",
    12,
    256,
    LAYOUT,
    "8 sub-blocks of 32 four-bit quants; a 6-bit scale and minimum each",
    dequantize,
    decode,
    Factors(quants, scale, minimum=minimum, offset=offset),
)
