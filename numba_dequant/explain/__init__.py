"""Explains formats and blocks, as text, HTML and SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba_dequant.arguments import host_bytes
from numba_dequant.bits import RUN
from numba_dequant.errors import DataError, ShapeError, shown
from numba_dequant.format import Format, element_of, whole_number
from numba_dequant.formats import format_named

if TYPE_CHECKING:
    from numba_dequant.explain.explanation import Explanation


def explain(data: Any, format: str | int | Format, block: int = 0, element: int = 0) -> Explanation:
    """Explain how the values of one block are computed.

    >>> import numpy as np, numba_dequant as nd
    >>> data = np.float16(0.5).tobytes() + bytes(range(16))
    >>> print(nd.explain(data, "Q4_0", element=17))
    Q4_0, block 0: element 17, in the run 16 to 23
    fields
      d   0.5
      qs  [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
    bytes
         0  00 38 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d
        16  0e 0f
    bits of element 17, the highest of a byte first:
      byte   0  00000000  d, byte 0
      byte   1  00111000  d, byte 1
      byte   3  0000····  qs[1]
    steps of decode
      packed = load_8_bytes(block, at + QS + 8 * (run & 1))
          load_8_bytes(block, 2)  0  1  2  3  4  5  6  7
          packed                  0  1  2  3  4  5  6  7
      quants = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
          quants                  0  0  0  0  0  0  0  0
      half(load_u16(block, at + D)) * centred_bytes(quants, 8)
          load_u16(block, 0)      14336 = 0x3800
          half(14336)             0.5
          centred_bytes(0, 8)     -8  -8  -8  -8  -8  -8  -8  -8
          value                   -4  -4  -4  -4  -4  -4  -4  -4
    value of element 17: -4

    Args:
        data: whole blocks, as for `dequantize`, on the host.
        format: the format of the blocks.
        block: the index of the block.
        element: the index of the element in the block; the steps are those of its run of eight.

    Raises:
        UnknownFormatError: `format` is unknown.
        DataError: `data` is not whole blocks on the host, or `format` is a type that is returned as it is stored.
        ShapeError: `block` or `element` is out of range.
    """
    from numba_dequant.explain.explanation import Explanation  # few programs need it

    fmt = format_named(format)
    if fmt.dequantize is None:
        raise DataError(f"{fmt.name} is stored as it is, so there is nothing to explain; pass a format of blocks")
    raw = host_bytes(data)
    # Plain arrays are explained in runs of eight elements.
    size, n_bytes = (fmt.block_size, fmt.type_size) if fmt.block_size > 1 else (RUN, RUN * fmt.type_size)
    n_blocks = fmt.n_elements(raw.size) // size
    number = whole_number(block, 0)
    if number is None or number >= n_blocks:
        raise ShapeError(f"the data has {n_blocks} blocks of {size} elements; there is no block {shown(block)}")
    element = element_of(fmt.name, element, size)
    return Explanation(fmt, number, element, raw[number * n_bytes : (number + 1) * n_bytes].copy())
