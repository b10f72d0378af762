"""Q5_K: x = d * scales[i] * q - dmin * mins[i]; 256 weights in 8 sub-blocks of 32, 5.5 bits per weight.

The field `scales` packs the scales and the minima (`mins`) as in Q4_K. Each pair of sub-blocks takes 32 bytes of `qs`,
which hold the low four bits of the quants: the first sub-block in the low nibbles, the second in the high nibbles. The
fifth bit of quant k of sub-block i is bit i of byte k of `qh`.

Source: GGML, `block_q5_K` in ggml-common.h and `dequantize_row_q5_K` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u16, to_float, unsigned_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._scales import minimum_of, packed_minima, packed_scales, scale_of, unpack_scales
from numba_dequant.halves import byte_as_halves, scaled_fields

LAYOUT = block_layout(d="f2", dmin="f2", scales=("u1", 12), qh=("u1", 32), qs=("u1", 128))
D, DMIN, SCALES, QH, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    scales, minima = unpack_scales(blocks["scales"])
    d = blocks["d"].astype(np.float32)[:, None] * scales
    dmin = blocks["dmin"].astype(np.float32)[:, None] * minima
    pairs = blocks["qs"].reshape(-1, 4, 1, 32)
    low = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    high = (blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    quants = (low | (high << 4)).astype(np.float32)
    return (d[:, :, None] * quants - dmin[:, :, None]).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    d = half(load_u16(block, at + D)) * to_float(scale_of(block, at + SCALES, sub_block))
    dmin = half(load_u16(block, at + DMIN)) * to_float(minimum_of(block, at + SCALES, sub_block))
    packed = load_8_bytes(block, at + QS + 32 * (sub_block >> 1) + 8 * (run & 3))
    low = (packed >> (4 * (sub_block & 1))) & 0x0F0F0F0F0F0F0F0F
    high = (load_8_bytes(block, at + QH + 8 * (run & 3)) >> sub_block) & 0x0101010101010101
    values: NDArray[np.float32] = d * unsigned_bytes(low | (high << 4)) - dmin
    return values


def quants(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    packed = load_8_bytes(block, at + QS + 32 * (sub_block >> 1) + 8 * (run & 3))
    low = (packed >> (4 * (sub_block & 1))) & 0x0F0F0F0F0F0F0F0F
    high = (load_8_bytes(block, at + QH + 8 * (run & 3)) >> sub_block) & 0x0101010101010101
    scale = byte_as_halves(packed_scales(block, at + SCALES), sub_block, 0)
    return scaled_fields(low | (high << 4), 0, 5, scale)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


def minimum(block: Any, at: int, number: int) -> Any:
    return to_float((packed_minima(block, at + SCALES) >> (8 * number)) & 63)


def offset(block: Any, at: int) -> Any:
    return -half(load_u16(block, at + DMIN))


Q5_K = Format(
    "Q5_K",
    13,
    256,
    LAYOUT,
    "8 sub-blocks of 32 five-bit quants; a 6-bit scale and minimum each",
    dequantize,
    decode,
    Factors(quants, scale, minimum=minimum, offset=offset),
)
