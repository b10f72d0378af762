"""Bytes to a NumPy array through `Format.dequantize`: the specification, written to be right rather than fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.format import Format

CHUNK = 1 << 20
"""Elements per step, so that a large tensor needs no large float32 copy of itself."""


def dequantize_into(data: NDArray[np.uint8], fmt: Format, out: NDArray[Any]) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to its dtype."""
    assert fmt.dequantize is not None
    blocks = data.view(fmt.layout)
    step = max(CHUNK // fmt.block_size, 1)
    # Scales may be infinite or NaN: the results are well defined, NumPy's warnings about them are not wanted.
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            values = fmt.dequantize(blocks[first : first + step])
            out[first * fmt.block_size : first * fmt.block_size + values.size] = values.reshape(-1)
