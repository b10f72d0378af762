"""Targets for strings that the reader passes over: the compiled walk, and the reader's ways of doing without it."""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import structured
from choices import Choices
from reading import WINDOWS, check

from numba_dequant.kernels import native
from numba_dequant.kernels.native.records import strings_dtype


@cache
def walk() -> Callable[[int], None]:
    address = native.load("walk_strings").value or 0
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


PAGE = 1 << 14


@cache
def guarded() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory whose end is followed by a page that cannot be read."""
    memory = mmap.mmap(-1, 2 * PAGE)
    array = np.frombuffer(memory, np.uint8)
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        result = library.mprotect(ctypes.c_void_p(array.ctypes.data + PAGE), ctypes.c_size_t(PAGE), 0)
        assert result == 0, ctypes.get_errno()
    return array[:PAGE]


def strings(data: bytes) -> str:
    """Strings that the compiled walk passes, at the end of readable memory, as a plain loop passes them."""
    choices = Choices(data)
    window = b""
    for _ in range(choices.below(90)):
        text = choices.pick(structured.TEXTS) if choices.one_in(3) else bytes(choices.below(12))
        length = choices.pick(structured.HUGE) if choices.one_in(60) else len(text)
        window += struct.pack("<Q", length) + text
    window = window[: len(window) - choices.pick([0, 0, 1, 7, 8, 9])][:PAGE]
    at = choices.pick([0, 0, 8, max(len(window) - 8, 0), len(window)])
    at = min(at, len(window))
    left = choices.pick([0, 1, 5, 64, 65, 100, 1 << 26])
    expected_at, expected_left = at, left
    while expected_left and len(window) - expected_at >= 8:
        length = struct.unpack_from("<Q", window, expected_at)[0]
        if length > len(window) - expected_at - 8:
            break
        expected_at, expected_left = expected_at + 8 + length, expected_left - 1
    memory = guarded()[PAGE - len(window) :]
    memory[:] = np.frombuffer(window, np.uint8)
    record = np.array([(memory.ctypes.data, len(window), at, left)], strings_dtype)
    walk()(record.ctypes.data)
    assert (int(record["at"][0]), int(record["left"][0])) == (expected_at, expected_left)
    return "end" if expected_left else "all"


def arrays(data: bytes) -> str:
    """An array of strings that the reader passes over, in windows of all sizes, with and without compiled code."""
    choices = Choices(data)
    order = choices.pick("<>")
    some = choices.some(structured.TEXTS, 4) or [b"a"]
    items = [some[choices.below(len(some))] for _ in range(choices.pick([1, 63, 64, 65, 130, 400]))]
    file = structured.File(order, entries=[structured.Entry(b"a", 9, items, 8), structured.Entry(b"b", 10, 1 << 40)])
    content = bytearray(file.content())
    way = choices.below(3)
    if way == 1:
        at = 24 + choices.below(len(content) - 24)
        content[at : at + 1] = choices.bytes(1)
    elif way == 2:  # one byte of the length of one string
        item = choices.below(len(items))
        at = 24 + 9 + 4 + 12 + sum(8 + len(each) for each in items[:item]) + choices.below(8)
        content[at] = choices.pick([1, 2, 128, 255])
    if choices.one_in(8):
        del content[choices.below(len(content)) :]
    raw = bytes(content)
    outcomes = {check(raw, number) for number in range(2 * len(WINDOWS))}
    assert len(outcomes) == 1
    return outcomes.pop()
