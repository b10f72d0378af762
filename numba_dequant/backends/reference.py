"""Bytes to a NumPy array with `Format.dequantize`, the specification of a format."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.format import Format

CHUNK = 1 << 20
"""Elements per step. Steps avoid a float32 copy of a whole tensor."""


def dequantize_into(data: NDArray[np.uint8], fmt: Format, out: NDArray[Any]) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to its dtype."""
    assert fmt.dequantize is not None
    blocks = data.view(fmt.layout)
    step = max(CHUNK // fmt.block_size, 1)
    # Scales may be infinite or NaN. The results are well defined, so NumPy must not warn.
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            values = fmt.dequantize(blocks[first : first + step])
            out[first * fmt.block_size : first * fmt.block_size + values.size] = values.reshape(-1)
