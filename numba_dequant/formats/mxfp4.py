"""MXFP4: x = 2**(e - 128) * kvalues_mxfp4[q]; 32 weights, 4.25 bits per weight.

A quant is an E2M1 float: a sign bit, two bits of exponent, one bit of mantissa. The table holds twice its value, which
is an integer, so the power of two is half of the E8M0 scale 2**(e - 127). For `e` of 0 and 1 it is a subnormal float32.
`e` = 255 is an ordinary exponent, not NaN. Byte k of `qs` holds quant k in its low nibble and quant k + 16 in its high
nibble.

Source: GGML, `block_mxfp4` in ggml-common.h, `ggml_e8m0_to_fp32_half` in ggml-impl.h and `dequantize_row_mxfp4` in
ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import load_8_bytes, load_u8, load_u32, lookup_nibbles, signed_bytes, single
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import FP4_DOUBLED_VALUES
from numba_dequant.halves import LOOKED_UP_NIBBLES, halves_of_table

LAYOUT = block_layout(e="u1", qs=("u1", 16))
E, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = np.ldexp(np.float32(1), blocks["e"].astype(np.int32) - 128)[:, None]
    nibbles = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    return d * FP4_DOUBLED_VALUES.items.take(nibbles).astype(np.float32)


def decode(block: Any, at: int, run: int) -> Any:
    e = load_u8(block, at + E)
    bits = (e - 1) << 23
    if e < 2:
        bits = 0x00200000 << e
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    nibbles = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    return single(bits) * signed_bytes(lookup_nibbles(FP4_DOUBLED_VALUES, nibbles))


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_table(FP4_DOUBLED_VALUES, load_u32(block, at + QS + 4 * run))


def scale(block: Any, at: int) -> Any:
    e = load_u8(block, at + E)
    bits = (e - 1) << 23
    if e < 2:
        bits = 0x00200000 << e
    return single(bits)


MXFP4 = Format(
    "MXFP4",
    39,
    32,
    LAYOUT,
    "32 FP4 (E2M1) values; a power of two as scale",
    dequantize,
    decode,
    Factors(quants, scale, LOOKED_UP_NIBBLES),
)
