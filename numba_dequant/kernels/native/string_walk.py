"""Skips strings, compiled by Numba: see `gguf.header.Cursor.skip_strings`."""

from __future__ import annotations

from numba import carray

from numba_dequant.kernels.native.intrinsics import load_long, pointer
from numba_dequant.kernels.native.records import strings_dtype


def walk_strings(strings_at: int) -> int:
    """Skip complete strings; returns how many are left."""
    strings = carray(pointer(strings_at), 1, strings_dtype)[0]
    while strings.left and strings.n_bytes - strings.at >= 8:
        length = load_long(strings.data + strings.at)
        if length < 0 or length > strings.n_bytes - strings.at - 8:
            break
        strings.at += 8 + length
        strings.left -= 1
    return int(strings.left)
