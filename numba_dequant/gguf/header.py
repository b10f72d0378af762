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

from numba_dequant.errors import GgufError, shown
from numba_dequant.gguf.limits import Allowance, Limits
from numba_dequant.gguf.source import Source, checksum
from numba_dequant.kernels import native
from numba_dequant.kernels.native.records import strings_dtype

ByteOrder = Literal["little", "big"]

WINDOW = 1 << 20
"""Bytes of the header in memory at a time."""

SMALL_WINDOW = 1 << 12
"""Bytes to read first after a skip, because only a few may be needed."""

MAX_KEY = 65535
"""Maximum bytes of a key or a tensor name."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8"}
"""NumPy type code of each GGUF value type that is a number or a bool."""

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
        self._links_of = -1
        # Positions in the window, which never exceeds `LONGEST_STRING` bytes.
        self._starts = self._ends = np.empty(0, np.int32)
        self._chain_ends = np.empty(0, np.int64)

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
        dtype = self.dtype(value_type)
        (value,) = np.frombuffer(self.take(dtype.itemsize, field), dtype)
        return bool(value) if value_type == BOOL else value.item()

    def numbers(self, codes: str, field: str) -> tuple[int, ...]:
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
            passed = 0
            if count > fewest:
                passed = self._skip_compiled(count) if self._has_walk() else 0
            if not passed and count > fewest:
                passed = self._skip_empty(count)
                passed += self._skip_linked(count - passed)
                # If that makes no progress, it is tried less often.
                at_once = fewest if passed > at_once else min(2 * at_once, 4096)
            count -= passed
            singly = min(count, at_once)
            self._skip_singly(singly, field)
            count -= singly

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

    def _skip_linked(self, count: int) -> int:
        """Move past strings of 1 to 255 bytes within the window; returns how many.

        A Python loop over a vocabulary of 262 144 strings is too slow. Seven of the eight bytes of a short string's
        length are zero, so NumPy finds all possible starts in the window at once. Only those are used that form a
        chain from the current position: each string must start where the previous one ends.
        """
        if self.position >= self._window_start + len(self._window) - 8:
            return 0
        if self._links_of != self._window_start:
            self._find_links()
        at = np.int32(
            self.position - self._window_start
        )  # the dtype of `starts`, so that searchsorted converts nothing
        first = int(np.searchsorted(self._starts, at))
        if first == len(self._starts) or self._starts[first] != at:
            return 0
        last = int(self._chain_ends[np.searchsorted(self._chain_ends, first)])
        passed = min(last - first + 1, count)
        if passed:
            self.position = self._window_start + int(self._ends[first + passed - 1])
        return passed

    def _find_links(self) -> None:
        # Seven zero bytes contain an aligned zero word of four bytes. Zero words are rare; only they are examined.
        words = np.frombuffer(self._window, "<u4", len(self._window) // 4)
        zero_words = np.flatnonzero(words[1:-1] == 0).astype(np.int32)  # word index of the zero word, minus one
        preceding, following = words.take(zero_words), words[2:].take(zero_words)
        if self.byte_order == "little":
            # The length is the last nonzero byte preceding the zero word; the missing zeros must follow the word.
            at = sum((preceding > most).view(np.uint8) for most in (0xFF, 0xFFFF, 0xFFFFFF))
            lengths = (preceding >> 8 * at).view(np.int32)
            is_start = (lengths != 0) & (following << (32 - 8 * at) == 0)
            starts = 4 * zero_words + at
        else:
            # The length is the first nonzero byte after the zero word; the missing zeros must precede the word.
            at = sum((following & most == 0).view(np.uint8) for most in (0xFF, 0xFFFF, 0xFFFFFF))
            lengths = (following >> 8 * at & 0xFF).view(np.int32)
            is_start = (lengths != 0) & (preceding >> 8 * (1 + at) == 0)
            starts = 4 * zero_words + 1 + at
        ends = starts + 8 + lengths
        is_start &= ends <= len(self._window)
        self._starts, self._ends = starts[is_start], ends[is_start]
        is_last = np.append(self._starts[1:] != self._ends[:-1], True)[: len(self._starts)]
        self._chain_ends = np.flatnonzero(is_last)
        self._links_of = self._window_start
