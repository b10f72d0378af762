"""IQ4_XS: x = d * (scales[i] - 32) * kvalues_iq4nl[q]; 256 weights in 8 sub-blocks of 32, 4.25 bits per weight.

Each scale has 6 bits. `scales_l` holds the low four bits, two scales per byte, and `scales_h` holds the top two bits.
Both start with sub-block 0 in the lowest bits. A sub-block takes 16 bytes of `qs`. Byte k of a sub-block holds its
quant k in the low nibble and its quant k + 16 in the high nibble. The table of 16 values is that of IQ4_NL.

Source: GGML, `block_iq4_xs` in ggml-common.h and `dequantize_row_iq4_xs` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import (
    half,
    helper,
    load_8_bytes,
    load_u8,
    load_u16,
    load_u32,
    lookup_nibbles,
    signed_bytes,
    to_float,
)
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ4_NL_VALUES
from numba_dequant.halves import LOOKED_UP_NIBBLES, byte_as_halves, scaled_halves_of_table

LAYOUT = block_layout(d="f2", scales_h="u2", scales_l=("u1", 4), qs=("u1", 128))
D, SCALES_H, SCALES_L, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    low = np.stack([blocks["scales_l"] & 15, blocks["scales_l"] >> 4], axis=2).reshape(-1, 8)
    high = (blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    d: NDArray[np.float32] = blocks["d"].astype(np.float32)[:, None] * ((low | (high << 4)).astype(np.float32) - 32)
    pairs = blocks["qs"].reshape(-1, 8, 16)
    nibbles = np.concatenate([pairs & 15, pairs >> 4], axis=2)
    return (d[:, :, None] * IQ4_NL_VALUES.items.take(nibbles).astype(np.float32)).reshape(-1, 256)


def decode(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    low = (load_u8(block, at + SCALES_L + (sub_block >> 1)) >> (4 * (sub_block & 1))) & 15
    high = (load_u16(block, at + SCALES_H) >> (2 * sub_block)) & 3
    d = half(load_u16(block, at + D)) * to_float((low | (high << 4)) - 32)
    packed = load_8_bytes(block, at + QS + 16 * sub_block + 8 * (run & 1))
    nibbles = (packed >> (4 * ((run >> 1) & 1))) & 0x0F0F0F0F0F0F0F0F
    return d * signed_bytes(lookup_nibbles(IQ4_NL_VALUES, nibbles))


@helper
def packed_scales(block: Any, at: int) -> int:
    """The eight scales, one per byte of the result: those of sub-blocks 0, 2, 4 and 6, then the others."""
    low, high = load_u32(block, at + SCALES_L), load_u16(block, at + SCALES_H)
    high = (high & 255) * 0x0101 | (high >> 8) * 0x01010000
    even = (low & 0x0F0F0F0F) | ((high << 4) & 0x00300030) | (high & 0x30003000)
    odd = ((low >> 4) & 0x0F0F0F0F) | ((high << 2) & 0x00300030) | ((high >> 2) & 0x30003000)
    return even | (odd << 32)


def quants(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 2
    scale = byte_as_halves(packed_scales(block, at), (sub_block >> 1) | ((sub_block & 1) << 2), 32)
    # Up to 32 * 127, which has 12 bits, so a large product is rounded.
    return scaled_halves_of_table(IQ4_NL_VALUES, load_u32(block, at + QS + 4 * run), scale)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


IQ4_XS = Format(
    "IQ4_XS",
    23,
    256,
    LAYOUT,
    "8 sub-blocks of 32 indexes into a table of 16 values; a 6-bit scale each",
    dequantize,
    decode,
    Factors(quants, scale, LOOKED_UP_NIBBLES),
)
