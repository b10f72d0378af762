"""NVFP4: x = d[i] / 2 * kvalues_mxfp4[q]; 64 weights in 4 sub-blocks of 16, 4.5 bits per weight.

A quant is an E2M1 float: a sign bit, two bits of exponent, one bit of mantissa. The table holds twice its value, so the
scale is halved. `d[i]` is a UE4M3 float: four bits of exponent (bias 7) and three bits of mantissa. GGML ignores its
sign bit. GGML reads 0x7F, which is NaN in E4M3, as 0, and 0xFF as 480.

A sub-block takes 8 bytes of `qs`. Byte k of a sub-block holds its quant k in the low nibble and its quant k + 8 in the
high nibble.

Source: GGML, `block_nvfp4` in ggml-common.h, `ggml_ue4m3_to_fp32` in ggml-impl.h and `dequantize_row_nvfp4` in
ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u8, load_u32, lookup_nibbles, signed_bytes, to_float
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import FP4_DOUBLED_VALUES
from numba_dequant.halves import LOOKED_UP_NIBBLES_OF_16, halves_of_table, halves_with_bits, scaled

LAYOUT = block_layout(d=("u1", 4), qs=("u1", 32))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    exponent = (blocks["d"] >> 3).astype(np.int32) & 15
    mantissa = (blocks["d"] & 7).astype(np.float32)
    # 3 for the bits of mantissa, 7 for the bias, 1 for the division by two.
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
    # Shifted to the bits of a float16, it has the same fields but bias 7 instead of 15.
    d = half((scale & 0x7F) << 7) * to_float(1 << (15 - 7 - 1))
    packed = load_8_bytes(block, at + QS + 8 * sub_block)
    nibbles = (packed >> (4 * (run & 1))) & 0x0F0F0F0F0F0F0F0F
    return d * signed_bytes(lookup_nibbles(FP4_DOUBLED_VALUES, nibbles))


def quants(block: Any, at: int, run: int) -> Any:
    scale = load_u8(block, at + D + (run >> 1))
    if scale == 0x7F:
        scale = 0
    values = halves_of_table(FP4_DOUBLED_VALUES, load_u32(block, at + QS + 4 * run))
    return scaled(values, halves_with_bits((scale & 0x7F) << 7))


def scale(block: Any, at: int) -> Any:
    return to_float(1 << (15 - 7 - 1))


NVFP4 = Format(
    "NVFP4",
    40,
    64,
    LAYOUT,
    "4 sub-blocks of 16 FP4 (E2M1) values; an FP8 (UE4M3) scale each",
    dequantize,
    decode,
    Factors(quants, scale, LOOKED_UP_NIBBLES_OF_16),
)
