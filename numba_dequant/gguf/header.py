"""A cursor that reads the header of a GGUF file and checks every length before using it.

The file is read in windows. It is not mapped, because truncating a mapped file ends the process.
"""

from __future__ import annotations

import ctypes
import io
import struct
from functools import cache
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import GgufError, shown
from numba_dequant.gguf.limits import Allowance, Limits
from numba_dequant.gguf.source import Source, checksum
from numba_dequant.kernels import native
from numba_dequant.kernels.native.records import strings_dtype

ByteOrder = Literal["little", "big"]

WINDOW = 1 << 18
"""Bytes of the header in memory at a time; they and what is computed of them stay in the cache of the processor."""

SMALL_WINDOW = 1 << 12
"""Bytes to read first after a skip, because only a few may be needed."""

PART = 1 << 18
"""Bytes of the window in which NumPy finds strings at a time, at most."""

MAX_KEY = 65535
"""Maximum bytes of a key or a tensor name."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Type code of each GGUF value type that is a number or a bool, the same in `struct` and in NumPy."""

INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})

INCOMPLETE = "; the download may be incomplete"


@cache
def record(byte_order: ByteOrder, codes: str) -> struct.Struct:
    """Numbers without padding between them; `codes` are format characters of `struct`."""
    return struct.Struct(("<" if byte_order == "little" else ">") + codes)


class Cursor:
    """A position in the header of one open file.

    Methods take the name of the field they read as `field`, for errors; ``{!r}`` in it stands for `subject`. It is
    formatted only in an error, because a header has thousands of fields.
    """

    def __init__(
        self, source: Source, file: io.RawIOBase, position: int, *, is_first: bool, allowance: Allowance | None = None
    ) -> None:
        """Start at byte `position`. With `is_first`, store checksums of the header in `source`.

        Without an `allowance`, the header may be as long as the file, and other limits are the default ones.
        """
        self.source = source
        self._is_first = is_first
        self.size = source.size(file)
        self.end = self.size if allowance is None else max(min(self.size, position + allowance.header_bytes), position)
        self.limits = Limits() if allowance is None else allowance.limits
        self.position = position
        self.subject: object = None
        self.byte_order: ByteOrder = "little"
        self._file = io.BufferedReader(file)
        self._window = b""
        self._window_start = position
        self._next_window = WINDOW if is_first else SMALL_WINDOW
        self._part = PART

    @property
    def left(self) -> int:
        """Bytes from the current position to the end of the file."""
        return self.size - self.position

    @property
    def ahead(self) -> tuple[bytes, int]:
        """Bytes of the header that are in memory, and the index of the current position among them.

        The index may be at or beyond their end.
        """
        return self._window, self.position - self._window_start

    def what(self, field: str) -> str:
        """The name of a field, for errors. A long `subject` is shortened."""
        return field.replace("{!r}", shown(self.subject))

    def fail(self, field: str, at: int, found: object, allowed: str, reason: str) -> NoReturn:
        """Raise a `GgufError` for a field at byte `at`."""
        raise GgufError(self.source.name, self.what(field), at, found, allowed, reason)

    def need(self, n_bytes: int, field: str, at: int, found: object) -> None:
        """Check that `n_bytes` more bytes exist, before anything is read or allocated for them."""
        if n_bytes > self.left:
            reason = f"{self.what(field)}: {n_bytes} more bytes are needed, but only {self.left} are left"
            self.fail(field, at, found, f"at most {self.left} bytes", reason + INCOMPLETE)
        if n_bytes > self.end - self.position:
            what = f"the header is not read beyond {self.what(field)}, because it is too long"
            raise self.limits.exceeded("header_bytes", self.source.name, at, found, what)

    def take(self, n_bytes: int, field: str) -> bytes:
        """Read the next `n_bytes` bytes."""
        start = self.position - self._window_start
        if not 0 <= start <= len(self._window) - n_bytes:
            self.need(n_bytes, field, self.position, f"{n_bytes} bytes")
            self._load_window(n_bytes)
            start = 0
            if len(self._window) < n_bytes:
                reason = f"{self.what(field)} cannot be read: the file has become shorter since it was opened"
                self.fail(field, self.position, f"{len(self._window)} bytes", f"{n_bytes} bytes", reason)
        self.position += n_bytes
        return self._window[start : start + n_bytes]

    def _load_window(self, n_bytes: int) -> None:
        if self.position - self._window_start - len(self._window) > WINDOW // 16:
            self._next_window = SMALL_WINDOW
        self.keep_checksum()
        self._file.seek(self.position)
        self._window = self._file.read(min(max(self._next_window, n_bytes), max(self.end - self.position, 0)))
        self._window_start = self.position
        self._next_window = min(4 * self._next_window, WINDOW)

    def keep_checksum(self) -> None:
        """Store a checksum of the header bytes that were read and passed."""
        passed = min(self.position - self._window_start, len(self._window))
        if passed > 0 and self._is_first:
            read = memoryview(self._window)[:passed]
            self.source.header.append((self._window_start, passed, checksum(read)))

    def peek(self, n_bytes: int) -> bytes:
        """The next bytes, without advancing; fewer at the end of the file."""
        if self.position + n_bytes > self._window_start + len(self._window):
            self._load_window(n_bytes)
        start = self.position - self._window_start
        return self._window[start : start + n_bytes]

    def number(self, value_type: int, field: str) -> Any:
        """The next number of a GGUF value type; a bool is True unless it is 0."""
        (value,) = self.numbers(NUMBERS[value_type], field)
        return bool(value) if value_type == BOOL else value

    def numbers(self, codes: str, field: str) -> tuple[Any, ...]:
        """The next numbers, whose types are format characters of `struct`."""
        numbers = record(self.byte_order, codes)
        return numbers.unpack(self.take(numbers.size, field))

    def u32(self, field: str) -> int:
        """The next 32-bit unsigned integer."""
        return int.from_bytes(self.take(4, field), self.byte_order)

    def u64(self, field: str) -> int:
        """The next 64-bit unsigned integer."""
        return int.from_bytes(self.take(8, field), self.byte_order)

    def dtype(self, value_type: int) -> np.dtype[Any]:
        """NumPy dtype of a number in this file."""
        return np.dtype(NUMBERS[value_type]).newbyteorder("<" if self.byte_order == "little" else ">")

    def name(self, field: str) -> str:
        """The next string, a key or a tensor name: UTF-8, without NULs at its end."""
        length = self.name_length(field)
        raw = self.take(length, field).rstrip(b"\0")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {raw[error.start]:#04x}"
            reason = f"{self.what(field)} is not valid UTF-8: {byte}"
            self.fail(field, self.position - length + error.start, byte, "UTF-8", reason)

    def name_length(self, field: str) -> int:
        """Read and check the length of the next key or tensor name, before it is read or allocated."""
        length = self.u64(field)
        if length > MAX_KEY:
            reason = f"{self.what(field)} has {length} bytes; at most {MAX_KEY} are allowed"
            self.fail(f"{field} length", self.position - 8, length, f"at most {MAX_KEY}", reason)
        return length

    def string_length(self, field: str) -> int:
        """Read and check the length of the next string, before the string is read or allocated."""
        length = self.u64(field)
        if length > self.limits.string_bytes:
            what = f"{self.what(field)} has {length:,} bytes"
            raise self.limits.exceeded("string_bytes", self.source.name, self.position - 8, length, what)
        return length

    def item(self, field: str, most: int | None = None) -> str:
        """The next array item that is a string, up to `most` bytes; invalid UTF-8 becomes U+FFFD."""
        length = self.string_length(field)
        raw = self.take(length if most is None else min(length, most), field)
        self.position += length - len(raw)
        return raw.decode(errors="replace")

    def skip_strings(self, count: int, field: str) -> None:
        """Move past `count` strings without decoding them."""
        fewest = at_once = 64
        while count:
            passed = self._skip_many(count) if count > fewest else 0
            count -= passed
            # After much progress, only the string that stopped it is passed singly. Without, it is tried less often.
            less = min(max(2 * at_once, fewest), 4096)
            at_once = 1 if passed > 4 * fewest else fewest if passed > at_once else less
            singly = min(count, at_once if count > fewest else fewest)
            self._skip_singly(singly, field)
            count -= singly

    def _skip_many(self, count: int) -> int:
        """Move past strings within the window, many at a time; returns how many."""
        self.peek(8)
        passed = self._skip_compiled(count) if self._has_walk() else 0
        if not passed:
            passed = self._skip_short(count)
            passed += self._skip_empty(count - passed)
        return passed

    def _has_walk(self) -> bool:
        # A process that has loaded a model to a GPU has this code. Compiling it takes longer than NumPy needs.
        return self.byte_order == "little" and native.is_loaded()

    def _skip_compiled(self, count: int) -> int:
        """Move past strings that end within the window, in compiled code; returns how many."""
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
        unpack = record(self.byte_order, "Q").unpack_from
        while count:
            length = self.string_length(field)
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
        """Move past empty strings (eight zero bytes each) within the window; returns how many."""
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

    def _skip_short(self, count: int) -> int:
        """Move past strings of 1 to 255 bytes within the window; returns how many.

        A Python loop over a vocabulary of 262 144 strings is too slow. Seven of the eight bytes of a short string's
        length are zero, so NumPy finds all possible starts in a part of the window at once. Only those are used that
        form a chain from the current position: each string must start where the previous one ends.
        """
        left = count
        while left:
            at = self.position - self._window_start
            first = max(at - 4, 0) & -4  # words are aligned; a big-endian length needs the word before it
            n_words = (min(at + min(self._part, 32 * left + 64), len(self._window)) - first) // 4
            if n_words < 3:
                break
            starts, ends = short_strings(np.frombuffer(self._window, "<u4", n_words, first), self.byte_order)
            if not len(starts) or starts[0] != at - first:
                self._part = SMALL_WINDOW
                break
            is_followed = starts[1:] == ends[:-1]
            n_linked = int(np.argmin(is_followed)) + 1 if not is_followed.all() else len(starts)
            passed = min(n_linked, left)
            passed -= int(ends[passed - 1]) > len(self._window) - first  # only the last one may end beyond it
            if not passed:
                break
            self.position = self._window_start + first + int(ends[passed - 1])
            left -= passed
            # A part of which little was used was searched in vain.
            self._part = min(4 * self._part, PART) if n_linked == len(starts) else SMALL_WINDOW
            if n_linked < len(starts):
                break
        return count - left


def short_strings(words: NDArray[np.uint32], byte_order: ByteOrder) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """All places in memory where a string of 1 to 255 bytes may start, and where it would end; both in bytes.

    `words` are the bytes, as little-endian words. A start in the last two words may be missing.
    """
    # Seven zero bytes contain an aligned zero word of four bytes. Zero words are rare; only they are examined.
    zero_words = np.flatnonzero(words[1:-1] == 0)  # word index of the zero word, minus one
    preceding, following = words.take(zero_words), words[2:].take(zero_words)
    starts = zero_words.astype(np.int32)
    starts *= 4
    if byte_order == "little":
        # The length is the last nonzero byte preceding the zero word; the missing zeros must follow the word.
        at = (preceding > 0xFF).view(np.uint8)
        at += preceding > 0xFFFF
        at += preceding > 0xFFFFFF
        lengths = (preceding >> 8 * at).view(np.int32)
        is_start = following << (32 - 8 * at) == 0
    else:
        # The length is the first nonzero byte after the zero word; the missing zeros must precede the word.
        at = (following & 0xFF == 0).view(np.uint8)
        at += following & 0xFFFF == 0
        at += following & 0xFFFFFF == 0
        lengths = (following >> 8 * at & 0xFF).view(np.int32)
        is_start = preceding >> 8 * (1 + at) == 0
        starts += 1
    starts += at
    is_start &= lengths != 0
    if not is_start.all():
        starts, lengths = starts[is_start], lengths[is_start]
    return starts, starts + (lengths + np.int32(8))
