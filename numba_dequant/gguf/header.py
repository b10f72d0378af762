"""Reading the header of a GGUF file: a cursor that checks every length before it believes it.

The file is read in windows, not mapped: a file cut short under a map would end the process.
"""

from __future__ import annotations

import ctypes
import io
import struct
from functools import cache
from typing import Any, Literal, NoReturn

import numpy as np

from numba_dequant.errors import GgufError
from numba_dequant.gguf.source import Source, checksum
from numba_dequant.kernels import native
from numba_dequant.kernels.native.records import strings_dtype

ByteOrder = Literal["little", "big"]

WINDOW = 1 << 20
"""Bytes of the header in memory at a time."""

SMALL_WINDOW = 1 << 12
"""Bytes that are read first where something has been passed over: perhaps only a few of them are needed."""

MAX_KEY = 65535
"""Bytes of a key, and of the name of a tensor."""

MAX_STRING = 1 << 26
"""Bytes of a single string: a chat template has thousands, a whole vocabulary as JSON some millions."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8"}
"""NumPy type code of every value type that is a number or a bool."""

INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})

CUT_SHORT = "; or the file ends within its header, as one does whose download is incomplete"


@cache
def _record(byte_order: ByteOrder, kinds: str) -> struct.Struct:
    return struct.Struct(("<" if byte_order == "little" else ">") + kinds)


class Cursor:
    """A place in the header of one open file.

    What its methods read next has the name `field`, for errors; ``{!r}`` in it stands for `subject`. A header has
    thousands of fields, and none of their names is ever needed unless one is wrong.
    """

    def __init__(self, source: Source, file: io.RawIOBase, position: int, *, is_first: bool) -> None:
        """Begin at a byte of an open file; `is_first` where the source is to remember what the header looked like."""
        self.source = source
        self._is_first = is_first
        self.size = source.size(file)
        self.position = position
        self.subject: object = None
        self.byte_order: ByteOrder = "little"
        self._file = io.BufferedReader(file)
        self._window = b""
        self._window_start = position
        self._next_window = WINDOW if is_first else SMALL_WINDOW
        self._links_of = -1
        # Places in the window, which is never larger than `MAX_STRING`.
        self._starts = self._ends = np.empty(0, np.int32)
        self._chain_ends = np.empty(0, np.int64)

    @property
    def left(self) -> int:
        """Bytes that are left of the file."""
        return self.size - self.position

    def fail(self, field: str, at: int, found: object, allowed: str) -> NoReturn:
        """Raise the error that names a field, its place, what is there and what may be."""
        raise GgufError(self.source.name, field.format(self.subject), at, found, allowed)

    def need(self, n_bytes: int, field: str, at: int, found: object) -> None:
        """Check that the file goes on for `n_bytes`, before anything is read or allocated for them."""
        if n_bytes > self.left:
            self.fail(field, at, found, f"what fits in the {self.left} bytes that are left of the file{CUT_SHORT}")

    def take(self, n_bytes: int, field: str) -> bytes:
        """The next bytes."""
        start = self.position - self._window_start
        if not 0 <= start <= len(self._window) - n_bytes:
            self.need(n_bytes, field, self.position, f"{n_bytes} bytes")
            self._load_window(n_bytes)
            start = 0
            if len(self._window) < n_bytes:
                self.fail(field, self.position, f"{len(self._window)} bytes", f"{n_bytes} bytes (the file has shrunk)")
        self.position += n_bytes
        return self._window[start : start + n_bytes]

    def _load_window(self, n_bytes: int) -> None:
        if self.position - self._window_start - len(self._window) > WINDOW // 16:
            self._next_window = SMALL_WINDOW
        self.keep_checksum()
        self._file.seek(self.position)
        self._window = self._file.read(max(self._next_window, n_bytes))
        self._window_start = self.position
        self._next_window = min(4 * self._next_window, WINDOW)

    def keep_checksum(self) -> None:
        """Note what the source's header looks like, as far as it has been read and passed."""
        passed = min(self.position - self._window_start, len(self._window))
        if passed > 0 and self._is_first:
            read = memoryview(self._window)[:passed]
            self.source.header.append((self._window_start, passed, checksum(read)))

    def peek(self, n_bytes: int) -> bytes:
        """The next bytes, which are not passed; fewer where the file ends."""
        if self.position + n_bytes > self._window_start + len(self._window):
            self._load_window(n_bytes)
        start = self.position - self._window_start
        return self._window[start : start + n_bytes]

    def number(self, kind: int, field: str) -> Any:
        """The next number of a value type; a bool is whether it is not 0."""
        dtype = self.dtype(kind)
        (value,) = np.frombuffer(self.take(dtype.itemsize, field), dtype)
        return bool(value) if kind == BOOL else value.item()

    def numbers(self, kinds: str, field: str) -> tuple[int, ...]:
        """The next numbers of kinds that `struct` names."""
        record = _record(self.byte_order, kinds)
        return record.unpack(self.take(record.size, field))

    def u32(self, field: str) -> int:
        """The next four bytes as a number."""
        return int.from_bytes(self.take(4, field), self.byte_order)

    def u64(self, field: str) -> int:
        """The next eight bytes as a number."""
        return int.from_bytes(self.take(8, field), self.byte_order)

    def dtype(self, kind: int) -> np.dtype[Any]:
        """NumPy dtype of a number in this file."""
        return np.dtype(NUMBERS[kind]).newbyteorder("<" if self.byte_order == "little" else ">")

    def name(self, field: str) -> str:
        """The next string, a key or a name of a tensor: UTF-8, of which NULs at the end are no part."""
        length = self.string_length(field, MAX_KEY)
        raw = self.take(length, field).rstrip(b"\0")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(field, self.position - length + error.start, f"byte {raw[error.start]:#04x}", "UTF-8")

    def string_length(self, field: str, largest: int = MAX_STRING) -> int:
        """The length of the next string, of which nothing has been read or allocated yet."""
        length = self.u64(field)
        if length > largest:
            self.fail(f"{field} length", self.position - 8, length, f"at most {largest}")
        return length

    def item(self, field: str, most: int = MAX_STRING) -> str:
        """The next string, an item of an array: as it stands, except for what is not UTF-8; of a long one the start."""
        length = self.string_length(field, MAX_STRING)
        raw = self.take(min(length, most), field)
        self.position += length - len(raw)
        return raw.decode(errors="replace")

    def skip_strings(self, count: int, field: str) -> None:
        """Move past `count` strings without reading what they say."""
        fewest = at_once = 64
        while count:
            passed = 0
            if count > fewest:
                passed = self._skip_compiled(count) if self._has_walk() else 0
            if not passed and count > fewest:
                passed = self._skip_empty(count)
                passed += self._skip_linked(count - passed)
                # Where that gets nowhere, it is tried less often.
                at_once = fewest if passed > at_once else min(2 * at_once, 4096)
            count -= passed
            singly = min(count, at_once)
            self._skip_singly(singly, field)
            count -= singly

    def _has_walk(self) -> bool:
        # A process that has loaded a model to a GPU has the code at hand; getting it takes longer than NumPy takes.
        return self.byte_order == "little" and native.is_loaded()

    def _skip_compiled(self, count: int) -> int:
        """Move past strings, as many as the window shows, in compiled code, and say how many."""
        at = self.position - self._window_start
        if not 0 <= at < len(self._window):
            return 0
        window = np.frombuffer(self._window, np.uint8)
        strings = np.array([(window.ctypes.data, window.size, at, count)], strings_dtype)
        walk = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(native.load("walk_strings").value or 0)
        walk(strings.ctypes.data)
        self.position = self._window_start + int(strings["at"][0])
        return count - int(strings["left"][0])

    def _skip_singly(self, count: int, field: str) -> None:
        unpack = _record(self.byte_order, "Q").unpack_from
        while count:
            length = self.string_length(field, MAX_STRING)
            self.need(length, f"{field} length", self.position - 8, length)
            self.position += length
            count -= 1
            at, last = self.position - self._window_start, len(self._window) - 8
            while count and at <= last:
                end = at + 8 + unpack(self._window, at)[0]
                if end > len(self._window):
                    break
                at = end
                count -= 1
            self.position = self._window_start + at

    def _skip_empty(self, count: int) -> int:
        """Move past empty strings, as many as the window shows, and say how many: each is eight zero bytes."""
        at = self.position - self._window_start
        most = min(count, (len(self._window) - at) // 8)
        passed, looked_at = 0, 16
        while passed < most:
            lengths = np.frombuffer(self._window, np.int64, min(looked_at, most - passed), at + 8 * passed)
            filled = np.flatnonzero(lengths)
            if len(filled):
                passed += int(filled[0])
                break
            passed += len(lengths)
            looked_at *= 8
        self.position += 8 * passed
        return passed

    def _skip_linked(self, count: int) -> int:
        """Move past strings of 1 to 255 bytes, as many as the window shows, and say how many.

        A vocabulary of 262 144 strings takes Python too long one by one. Seven of the eight bytes of a short string's
        length are zero, so all places in the window that look like a start are found at once. Whether they are is
        not a guess: the string here is one, and each next one must lie just where the one before it ends.
        """
        if self.position >= self._window_start + len(self._window) - 8:
            return 0
        if self._links_of != self._window_start:
            self._find_links()
        at = np.int32(self.position - self._window_start)  # of the type of `starts`, which would be converted otherwise
        first = int(np.searchsorted(self._starts, at))
        if first == len(self._starts) or self._starts[first] != at:
            return 0
        last = int(self._chain_ends[np.searchsorted(self._chain_ends, first)])
        passed = min(last - first + 1, count)
        if passed:
            self.position = self._window_start + int(self._ends[first + passed - 1])
        return passed

    def _find_links(self) -> None:
        # Seven zero bytes hold a whole word of four that is zero: few are, so the rest is looked at only there.
        words = np.frombuffer(self._window, "<u4", len(self._window) // 4)
        places = np.flatnonzero(words[1:-1] == 0).astype(np.int32)  # each is one less than that of the zero word
        before, behind = words.take(places), words[2:].take(places)
        if self.byte_order == "little":
            # The length is the last byte before the word that is not zero; as many zeros as are missing must follow.
            at = sum((before > most).view(np.uint8) for most in (0xFF, 0xFFFF, 0xFFFFFF))
            lengths = (before >> 8 * at).view(np.int32)
            is_start = (lengths != 0) & (behind << (32 - 8 * at) == 0)
            starts = 4 * places + at
        else:
            # The length is the first byte behind the word that is not zero; as many zeros must come before.
            at = sum((behind & most == 0).view(np.uint8) for most in (0xFF, 0xFFFF, 0xFFFFFF))
            lengths = (behind >> 8 * at & 0xFF).view(np.int32)
            is_start = (lengths != 0) & (before >> 8 * (1 + at) == 0)
            starts = 4 * places + 1 + at
        ends = starts + 8 + lengths
        is_start &= ends <= len(self._window)
        self._starts, self._ends = starts[is_start], ends[is_start]
        is_last = np.append(self._starts[1:] != self._ends[:-1], True)[: len(self._starts)]
        self._chain_ends = np.flatnonzero(is_last)
        self._links_of = self._window_start
