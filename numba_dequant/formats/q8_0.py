"""Q8_0: x = d * q; 32 weights, 8.5 bits per weight.

`qs` holds the quants as signed bytes.

Source: GGML, `block_q8_0` in ggml-common.h and `dequantize_row_q8_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import half, load_8_bytes, load_u16, signed_bytes
from numba_dequant.format import Factors, Format, block_layout, field_offsets
from numba_dequant.halves import halves_of_bytes

LAYOUT = block_layout(d="f2", qs=("i1", 32))
D, QS = field_offsets(LAYOUT)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    return d * blocks["qs"].astype(np.float32)


def decode(block: Any, at: int, run: int) -> Any:
    return half(load_u16(block, at + D)) * signed_bytes(load_8_bytes(block, at + QS + 8 * run))


def quants(block: Any, at: int, run: int) -> Any:
    return halves_of_bytes(load_8_bytes(block, at + QS + 8 * run) ^ -0x7F7F7F7F7F7F7F80, 128)


def scale(block: Any, at: int) -> Any:
    return half(load_u16(block, at + D))


Q8_0 = Format("Q8_0", 8, 32, LAYOUT, "32 signed bytes; one scale", dequantize, decode, Factors(quants, scale))
