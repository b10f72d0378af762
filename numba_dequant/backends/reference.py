"""Bytes to a NumPy array with `Format.dequantize`, the specification of a format."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import OptionError
from numba_dequant.format import Format

CHUNK = 1 << 20
"""Elements per step. Steps avoid a float32 copy of a whole tensor."""


def dequantize_into(data: NDArray[np.uint8], fmt: Format, out: NDArray[Any]) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to its dtype.

    Raises:
        OptionError: `Format.dequantize` returns another number of values.
    """
    assert fmt.dequantize is not None
    blocks = data.view(fmt.layout)
    step = max(CHUNK // fmt.block_size, 1)
    # Scales may be infinite or NaN. The results are well defined, so NumPy must not warn.
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            target = out[first * fmt.block_size : (first + step) * fmt.block_size]
            values = fmt.dequantize(blocks[first : first + step])
            if values.size != target.size:
                raise OptionError(
                    f"{fmt.name}: dequantize returned {values.size:,} values, but the blocks have {target.size:,} "
                    "elements; return an array of shape (blocks, block_size)"
                )
            target[:] = values.reshape(-1)
