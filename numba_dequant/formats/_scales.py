"""The packed 6-bit scales and minima of Q4_K and Q5_K: 12 bytes for 8 sub-blocks.

Source: GGML, `get_scale_min_k4` in ggml-quants.c.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import helper, load_u8, load_u32


def unpack_scales(packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unpack scales and minima: (n, 12) uint8 in, two float32 arrays of shape (n, 8) out."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


@helper
def scale_of(block: Any, at: int, sub_block: int) -> int:
    """The scale of one sub-block (0 to 7), from the 12 bytes that start at `at`."""
    is_late = sub_block >> 2
    low = load_u8(block, at + (sub_block & 3))
    late = (load_u8(block, at + 4 + sub_block) & 15) | (low >> 6 << 4)
    return (low & 63 & (is_late - 1)) | (late & -is_late)


@helper
def minimum_of(block: Any, at: int, sub_block: int) -> int:
    """The minimum of one sub-block (0 to 7), from the 12 bytes that start at `at`."""
    is_late = sub_block >> 2
    low = load_u8(block, at + 4 + (sub_block & 3))
    late = (load_u8(block, at + 4 + sub_block) >> 4) | (low >> 6 << 4)
    return (low & 63 & (is_late - 1)) | (late & -is_late)


@helper
def packed_scales(block: Any, at: int) -> int:
    """The eight scales, one per byte of the result, from the 12 bytes that start at `at`."""
    first, third = load_u32(block, at), load_u32(block, at + 8)
    late = (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)
    return (first & 0x3F3F3F3F) | (late << 32)


@helper
def packed_minima(block: Any, at: int) -> int:
    """The eight minima, one per byte of the result, from the 12 bytes that start at `at`."""
    second, third = load_u32(block, at + 4), load_u32(block, at + 8)
    late = ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)
    return (second & 0x3F3F3F3F) | (late << 32)
