"""TQ1_0: x = d * (q - 1); 256 weights, 1.6875 bits per weight.

Each quant is a base-3 digit: 0, 1 or 2. A byte b stores five digits as the fraction b / 256. The first digit is
3 * b >> 8. To get to the next digit, multiply b by 3 modulo 256.

Quants 0 to 159 are in bytes 0 to 31 of `qs`: the first digits of all these bytes, then the second digits, and so on to
the fifth. Quants 160 to 239 are in bytes 32 to 47 in the same order. Quants 240 to 255 are the first four digits of the
four bytes of `qh`, in the same order.

Source: GGML, `block_tq1_0` in ggml-common.h and `dequantize_row_tq1_0` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import centred_bytes, half, load_8_bytes, load_u16
from numba_dequant.format import Format, block_layout, field_offsets

LAYOUT = block_layout(qs=("u1", 48), qh=("u1", 4), d="f2")
QS, QH, D = field_offsets(LAYOUT)


def _digits(packed: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    shifted = (packed[:, None, :] * powers).astype(np.uint16)
    return ((shifted * 3) >> 8).reshape(-1, count * packed.shape[1]).astype(np.float32)


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    d = blocks["d"].astype(np.float32)[:, None]
    qs, qh = blocks["qs"], blocks["qh"]
    digits: NDArray[np.float32] = np.concatenate(
        [_digits(qs[:, :32], 5), _digits(qs[:, 32:], 5), _digits(qh, 4)], axis=1
    )
    return d * (digits - 1)


def decode(block: Any, at: int, run: int) -> Any:
    if run < 20:
        digit, start, shift = run >> 2, QS + 8 * (run & 3), 0
    elif run < 30:
        digit, start, shift = (run - 20) >> 1, QS + 32 + 8 * (run & 1), 0
    else:
        digit, start, shift = 2 * (run - 30), QH - 4, 32
    packed = load_8_bytes(block, at + start) >> shift
    if run >= 30:
        # The four bytes of `qh` twice: the upper four are multiplied by 3, to give the next digit.
        tripled = ((packed & 0x00FF00FF) * 3 & 0x00FF00FF) | ((packed & 0xFF00FF00) * 3 & 0xFF00FF00)
        packed = (packed & 0xFFFFFFFF) | (tripled << 32)
    power = (0x511B090301 >> (8 * digit)) & 0xFF
    # Every other byte, so that each product has 16 bits.
    even = ((packed & 0x00FF00FF00FF00FF) * power) & 0x00FF00FF00FF00FF
    odd = (((packed >> 8) & 0x00FF00FF00FF00FF) * power) & 0x00FF00FF00FF00FF
    digits = (((even * 3) >> 8) & 0x0003000300030003) | ((odd * 3) & 0x0300030003000300)
    return half(load_u16(block, at + D)) * centred_bytes(digits, 1)


TQ1_0 = Format("TQ1_0", 34, 256, LAYOUT, "256 base-3 digits, 5 per byte; one scale", dequantize, decode)
