"""Reading the header of a GGUF file: a cursor that checks every length before it believes it.

The file is read in windows, not mapped: a file cut short under a map would end the process.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, overload

import numpy as np

from numba_dequant import native
from numba_dequant.errors import GgufError
from numba_dequant.native.records import STRINGS

ByteOrder = Literal["little", "big"]

WINDOW = 1 << 20
"""Bytes of the header in memory at a time."""

LARGEST_KEY = 65535
LARGEST_STRING = 1 << 26
"""Bytes of a single string: a chat template has thousands, a whole vocabulary as JSON some millions."""

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "u1", 10: "u8", 11: "i8", 12: "f8"}
"""NumPy type code of every value type that is a number or a bool."""

INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})


class Stamp(NamedTuple):
    """What is different once a file has been written to, or another has taken its place."""

    size: int
    modified: int
    number: int
    disk: int

    def is_unchanged(self, other: Stamp) -> bool:
        """Whether nothing says that the content is another; some network file systems number files anew."""
        return (self.size, self.modified) == (other.size, other.modified)

    def is_same_file(self, other: Stamp) -> bool:
        """Whether both are of one file, whatever has been written to it."""
        return (self.number, self.disk) == (other.number, other.disk)


def stamp_of(handle: int) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(handle)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


@cache
def _record(byte_order: ByteOrder, kinds: str) -> struct.Struct:
    return struct.Struct(("<" if byte_order == "little" else ">") + kinds)


class Cursor:
    """A place in the header of one open file.

    What its methods read next has the name `field`, for errors; ``{!r}`` in it stands for `subject`. A header has
    thousands of fields, and none of their names is ever needed unless one is wrong.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.stamp = stamp_of(file.fileno())
        self.size = self.stamp.size
        self.position = 0
        self.subject: object = None
        self.byte_order: ByteOrder = "little"
        self._file = file
        self._window = b""
        self._window_start = 0
        self._links_of = -1
        self._starts = self._ends = self._chain_ends = np.empty(0, np.int64)

    def fail(self, field: str, at: int, found: object, allowed: str) -> NoReturn:
        """Raise the error that names a field, its place, what is there and what may be."""
        raise GgufError(self.path, field.format(self.subject), at, found, allowed)

    def need(self, n_bytes: int, field: str, what: str) -> None:
        """Check that the file goes on for `n_bytes`, before anything is read or allocated for them."""
        left = self.size - self.position
        if n_bytes > left:
            self.fail(field, self.position, what, f"what fits in the {left} bytes that are left of the file")

    def take(self, n_bytes: int, field: str) -> bytes:
        """The next bytes."""
        start = self.position - self._window_start
        if not 0 <= start <= len(self._window) - n_bytes:
            self.need(n_bytes, field, f"{n_bytes} bytes")
            self._file.seek(self.position)
            self._window = self._file.read(max(WINDOW, n_bytes))
            self._window_start, start = self.position, 0
            if len(self._window) < n_bytes:
                self.fail(field, self.position, f"{len(self._window)} bytes", f"{n_bytes} bytes (the file has shrunk)")
        self.position += n_bytes
        return self._window[start : start + n_bytes]

    def number(self, kind: int, field: str) -> Any:
        """The next number of a value type."""
        dtype = self.dtype(kind)
        (value,) = np.frombuffer(self.take(dtype.itemsize, field), dtype)
        return value.item()

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

    def string(self, field: str, largest: int = LARGEST_STRING) -> str:
        """The next string, which must be UTF-8."""
        length = self.u64(field)
        if length > largest:
            self.fail(f"{field} length", self.position - 8, length, f"at most {largest}")
        raw = self.take(length, field)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(field, self.position - length + error.start, f"byte {raw[error.start]:#04x}", "UTF-8")

    def skip_strings(self, count: int, field: str) -> None:
        """Move past `count` strings without reading what they say."""
        while count:
            if self.byte_order == "little":
                count -= self._walk(count) if native.is_loaded() else self._skip_linked(count)
            for _ in range(min(count, 16)):
                at = self.position
                length = self.u64(f"{field} item length")
                if length > self.size - self.position:
                    self.fail(f"{field} item length", at, length, f"at most {self.size - self.position}, what is left")
                self.position += length
                count -= 1

    def _walk(self, count: int) -> int:
        """Move past strings, as many as the window shows, in compiled code, and say how many."""
        window = np.frombuffer(self._window, np.uint8)
        at = self.position - self._window_start
        strings = np.array([(window.ctypes.data, window.size, at, count)], STRINGS)
        if 0 <= at <= window.size:
            walk = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(native.load("walk_strings").value or 0)
            walk(strings.ctypes.data)
        self.position = self._window_start + int(strings["at"][0])
        return count - int(strings["left"][0])

    def _skip_linked(self, count: int) -> int:
        """Move past strings of under 256 bytes, as many as the window shows, and say how many.

        A vocabulary of 262 144 strings takes Python too long one by one. A short string starts with its length and
        seven zero bytes, so all places in the window that look like a start are found at once. Whether they are is
        not a guess: the string here is one, and each next one must lie just where the one before it ends.
        """
        if self._links_of != self._window_start:
            self._find_links()
        first = int(np.searchsorted(self._starts, self.position))
        if first == len(self._starts) or self._starts[first] != self.position:
            return 0
        last = int(self._chain_ends[np.searchsorted(self._chain_ends, first)])
        passed = min(last - first + 1, count)
        self.position = int(self._ends[first + passed - 1])
        return passed

    def _find_links(self) -> None:
        # Seven zero bytes hold a whole word of four that is zero: few are, so the rest is looked at only there. The
        # length is the last byte before it that is not zero; as many zeros as are missing must follow.
        words = np.frombuffer(self._window, "<u4", len(self._window) // 4)
        places = np.flatnonzero(words[1:-1] == 0).astype(np.int32)
        before, behind = words.take(places), words[2:].take(places)
        top = sum((before > most).view(np.uint8) for most in (0xFF, 0xFFFF, 0xFFFFFF))
        lengths = (before >> 8 * top).view(np.int32)
        starts = 4 * places + top
        ends = starts + 8 + lengths
        is_start = (lengths != 0) & (behind << (32 - 8 * top) == 0) & (ends <= len(self._window))
        starts, ends = starts[is_start], ends[is_start]
        is_last = np.append(starts[1:] != ends[:-1], True)[: len(starts)]
        self._chain_ends = np.flatnonzero(is_last)
        self._starts, self._ends = starts + self._window_start, ends + self._window_start
        self._links_of = self._window_start


class MetadataArray(Sequence[Any]):
    """An array among the metadata, read from the file when it is looked at.

    Attributes:
        key: its key.
        offset: byte position of its first item.
    """

    def __init__(self, cursor: Cursor, key: str, kind: int, length: int) -> None:
        self.key = key
        self.offset = cursor.position
        self._kind = kind
        self._length = length
        self._path, self._stamp = cursor.path, cursor.stamp
        self._byte_order = cursor.byte_order
        self._items: list[Any] | None = None

    def to_list(self) -> list[Any]:
        """All items, as Python's own.

        Raises:
            GgufError: a string is not UTF-8, or the file has changed.
        """
        if self._items is None:
            with open(self._path, "rb") as file:
                cursor = Cursor(self._path, file)
                cursor.subject = self.key
                if not cursor.stamp.is_unchanged(self._stamp):
                    found = "a file that has changed"
                    cursor.fail("metadata {!r}", self.offset, found, "the one that was opened; open it anew")
                cursor.position, cursor.byte_order = self.offset, self._byte_order
                field = "metadata {!r} item"
                if self._kind == STRING:
                    self._items = [cursor.string(field) for _ in range(self._length)]
                else:
                    dtype = cursor.dtype(self._kind)
                    values = np.frombuffer(cursor.take(dtype.itemsize * self._length, field), dtype)
                    self._items = (values.astype(bool) if self._kind == BOOL else values).tolist()
        return self._items

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.to_list()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_list())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, tuple, MetadataArray)) and self.to_list() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MetadataArray({self.key!r}, {self._length} items)"


def read_value(cursor: Cursor, key: str) -> tuple[int, Any]:
    """The next metadata value, with its type."""
    field = "metadata {!r}"
    cursor.subject = key
    at = cursor.position
    kind = cursor.u32(f"{field} type")
    if kind == ARRAY:
        return kind, _read_array(cursor, key)
    if kind == STRING:
        return kind, cursor.string(field)
    if kind not in NUMBERS:
        cursor.fail(f"{field} type", at, kind, "0 to 12")
    value_at = cursor.position
    value = cursor.number(kind, field)
    if kind == BOOL:
        if value > 1:
            cursor.fail(field, value_at, value, "a bool: 0 or 1")
        value = bool(value)
    return kind, value


def _read_array(cursor: Cursor, key: str) -> MetadataArray:
    field = "metadata {!r}"
    at = cursor.position
    kind = cursor.u32(f"{field} item type")
    if kind != STRING and kind not in NUMBERS:
        allowed = "0 to 8 and 10 to 12 (no arrays within arrays)"
        cursor.fail(f"{field} item type", at, kind, allowed)
    at = cursor.position
    length = cursor.u64(f"{field} length")
    array = MetadataArray(cursor, key, kind, length)
    if kind == STRING:
        if 8 * length > cursor.size - cursor.position:
            cursor.fail(f"{field} length", at, length, f"what fits in the {cursor.size - cursor.position} bytes left")
        cursor.skip_strings(length, field)
        return array
    n_bytes = length * np.dtype(NUMBERS[kind]).itemsize
    if n_bytes > cursor.size - cursor.position:
        cursor.fail(f"{field} length", at, length, f"what fits in the {cursor.size - cursor.position} bytes left")
    cursor.position += n_bytes
    return array
