"""IQ4_NL: x = d * kvalues_iq4nl[q]; 32 weights, 4.5 bits per weight.

Byte k of `qs` holds quant k in its low nibble and quant k + 16 in its high nibble. The table `kvalues_iq4nl` has 16
values.

Source: GGML, `block_iq4_nl` in ggml-common.h and `dequantize_row_iq4_nl` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u16, load_u32, lookup_nibbles, signed_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.formats._codebooks import IQ4_NL_VALUES
from numba_dequant.halves import LOOKED_UP_NIBBLES, halves_of_table

LAYOUT = block_layout(d="f2", qs=("u1", 16))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    nibbles = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1)
    return d * IQ4_NL_VALUES.items.take(nibbles).astype(np.float32)


def decode(block: Any, at: int, run: int) -> Any:
    packed = load_8_bytes(block, at + QS + 8 * (run & 1))
    nibbles = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
    return half(load_u16(block, at + D)) * signed_bytes(lookup_nibbles(IQ4_NL_VALUES, nibbles))


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_table(IQ4_NL_VALUES, load_u32(block, at + QS + 4 * run))


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


IQ4_NL = Format(
    "IQ4_NL",
    20,
    32,
    LAYOUT,
    "32 four-bit indexes into a table of 16 values; one scale",
    dequantize,
    decode,
    Factors(quants, scale, LOOKED_UP_NIBBLES),
)
