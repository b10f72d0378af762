"""NVFP4: four sub-blocks of 16 four-bit floats (sign, two bits of exponent, one of mantissa), with an 8-bit scale each.

A byte of `d` is a float with four bits of exponent (biased by 7) and three of mantissa. GGML ignores its sign bit, but
takes 0x7F, which is NaN elsewhere, for 0, and 0xFF for 480. The table holds the doubled four-bit floats, so the scale
is halved.
A sub-block takes 8 bytes of `qs`: byte i holds the nibbles of its elements i (low) and i + 8 (high).

Source: GGML, `block_nvfp4` in ggml-common.h, `ggml_ue4m3_to_fp32` in ggml-impl.h and `dequantize_row_nvfp4` in
ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, lookup_nibbles, signed_bytes, to_float
from numba_dequant.format import Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import FP4_DOUBLED_VALUES

LAYOUT = block_layout(d=("u1", 4), qs=("u1", 32))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    exponent = (blocks["d"] >> 3).astype(np.int32) & 15
    mantissa = (blocks["d"] & 7).astype(np.float32)
    # Three bits of mantissa, the bias of seven, and the half.
    d = np.ldexp(np.where(exponent == 0, mantissa, mantissa + 8), np.maximum(exponent, 1) - (3 + 7 + 1))
    d = np.where(blocks["d"] == 0x7F, np.float32(0), d)
    pairs = blocks["qs"].reshape(-1, 4, 8)
    nibbles = np.concatenate([pairs & 15, pairs >> 4], axis=2)
    return (d[:, :, None] * FP4_DOUBLED_VALUES.items.take(nibbles).astype(np.float32)).reshape(-1, 64)


def decode(block: Any, at: int, run: int) -> Any:
    sub_block = run >> 1
    scale = load_u8(block, at + D + sub_block)
    if scale == 0x7F:
        scale = 0
    # In the place of a float16's exponent and mantissa its bits mean the same, but for the bias: 7, not 15.
    d = half((scale & 0x7F) << 7) * to_float(1 << (15 - 7 - 1))
    packed = load_8_bytes(block, at + QS + 8 * sub_block)
    nibbles = (packed >> (4 * (run & 1))) & 0x0F0F0F0F0F0F0F0F
    return d * signed_bytes(lookup_nibbles(FP4_DOUBLED_VALUES, nibbles))


NVFP4 = Format(
    "NVFP4", 40, 64, LAYOUT, "four sub-blocks of 16 four-bit floats, an 8-bit float scale each", dequantize, decode
)
