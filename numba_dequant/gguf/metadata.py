"""The metadata of a GGUF file: values, and arrays and long strings that are read when they are looked at."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from numba_dequant.errors import DeviceError, NumbaDequantError, OptionError
from numba_dequant.gguf.header import (
    ARRAY,
    BOOL,
    INTEGERS,
    MAX_STRING,
    NUMBERS,
    STRING,
    ByteOrder,
    Cursor,
)
from numba_dequant.gguf.source import Source, read_error

LONG_STRING = 1 << 20
"""Bytes beyond which a string stays in the file until it is looked at: a file may hold any number of them."""

MAX_ITEMS = 1 << 26
"""Items of an array; GGML has the same limit."""

MAX_KEPT_ITEMS = 1 << 20
"""Items of an array that are read together once several of them have been asked for one by one."""

SHOWN_ITEMS, SHOWN_CHARACTERS = 3, 60
"""What tables show of an array, and of a string."""


@contextmanager
def _reopened(source: Source, key: str, offset: int, byte_order: ByteOrder) -> Iterator[Cursor]:
    """A place in the header of a file that has been opened before.

    Raises:
        GgufError: the file has changed.
        ReadError: it cannot be read.
        DeviceError: there is not enough memory for what was asked for.
    """
    try:
        with source.open() as file:
            cursor = Cursor(source, file, offset, is_first=False)
            cursor.subject, cursor.byte_order = key, byte_order
            if not source.is_unchanged(file):
                cursor.fail("metadata {!r}", offset, "a file that has changed", "the one that was opened; reopen it")
            yield cursor
    except NumbaDequantError:
        raise
    except OSError as error:
        raise read_error(source.name, error, offset=offset, what=f"metadata {key!r}: ") from error
    except MemoryError as error:
        raise DeviceError(f"{source.name}: metadata {key!r}: out of memory") from error


def _decoded(raw: bytes) -> str:
    """A string value: NULs at its end are no part of it, and what is not UTF-8 is replaced by U+FFFD.

    With the replacement character a string can be printed, and written as UTF-8 or JSON; with Python's surrogates it
    could not.
    """
    return raw.rstrip(b"\0").decode(errors="replace")


class LongString:
    """A string among the metadata that stays in the file: `Metadata` reads it when it is asked for."""

    def __init__(self, cursor: Cursor, length: int) -> None:
        self._source, self._key = cursor.source, str(cursor.subject)
        self._offset, self._length = cursor.position - length, length
        self._byte_order = cursor.byte_order

    def read(self, most: int = MAX_STRING) -> str:
        """The string, or what its first bytes say."""
        with _reopened(self._source, self._key, self._offset, self._byte_order) as cursor:
            return _decoded(cursor.take(min(self._length, most), "metadata {!r}"))

    def shown(self) -> str:
        """Its start, for tables."""
        return _shown(self.read(4 * SHOWN_CHARACTERS + 4))


class MetadataArray(list[Any]):
    """An array among the metadata: a list that is read from the file when it is looked at, and cannot be changed.

    One item or a slice is read by itself; whatever needs all items, such as iterating, reads all and keeps them. The
    strings are as they stand in the file, except that what is not UTF-8 is replaced by U+FFFD.

    `json.dumps` takes it as any list. What reads the memory of a list without asking it for its items (orjson and
    ujson do) needs `to_list`.

    Attributes:
        key: its key.
        offset: byte position of its first item.
    """

    def __init__(self, cursor: Cursor, key: str, kind: int, length: int) -> None:
        super().__init__()
        self.key = key
        self.offset = cursor.position
        self._source, self._byte_order = cursor.source, cursor.byte_order
        self._kind, self._length = kind, length
        self._items: list[Any] | None = None
        self._looks = 0

    @property
    def is_of_integers(self) -> bool:
        """Whether its items are stored as integers."""
        return self._kind in INTEGERS

    def to_list(self) -> list[Any]:
        """All items, as a list of Python's own.

        Raises:
            GgufError: the file has changed.
            ReadError: the file cannot be read.
        """
        return list(self._all())

    def _all(self) -> list[Any]:
        if self._items is None:
            self._items = self._read(0, self._length)
        return self._items

    def _read(self, start: int, stop: int, most: int = MAX_STRING) -> list[Any]:
        """The items from `start` on, up to `stop`; of strings the first `most` bytes."""
        if stop <= start:
            return []
        field = "metadata {!r} item"
        with _reopened(self._source, self.key, self.offset, self._byte_order) as cursor:
            if self._kind == STRING:
                cursor.skip_strings(start, field)
                return [cursor.item(field, most) for _ in range(start, stop)]
            dtype = cursor.dtype(self._kind)
            cursor.position += dtype.itemsize * start
            values = np.frombuffer(cursor.take(dtype.itemsize * (stop - start), field), dtype)
            items: list[Any] = (values.astype(bool) if self._kind == BOOL else values).tolist()
            return items

    def shown(self) -> str:
        """Its first items, for tables."""
        items = ", ".join(_shown(item) for item in self._read(0, min(self._length, SHOWN_ITEMS), 256))
        return f"[{items}{', ...' if self._length > SHOWN_ITEMS else ''}] ({self._length:,} items)"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        indices = range(self._length)[index]
        # Opening the file for each item would take long where somebody counts through them.
        self._looks += 1
        if self._items is not None or (self._looks > 8 and self._length <= MAX_KEPT_ITEMS):
            return self._all()[index]
        if isinstance(indices, int):
            return self._read(indices, indices + 1)[0]
        if not indices:
            return []
        first, last = min(indices[0], indices[-1]), max(indices[0], indices[-1])
        return self._read(first, last + 1)[:: indices.step]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __radd__(self, other: list[Any]) -> list[Any]:
        return other + self._all()

    def __repr__(self) -> str:
        return f"MetadataArray({self.key!r}, {self._length} items)"

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _by_items(name: str) -> Any:
    def method(self: MetadataArray, *others: Any) -> Any:
        plain = (other._all() if isinstance(other, MetadataArray) else other for other in others)
        return getattr(self._all(), name)(*plain)

    return method


def _refused(name: str) -> Any:
    def method(self: MetadataArray, *others: Any, **options: Any) -> NoReturn:
        raise OptionError(f"metadata {self.key!r} cannot be changed; change the list that its to_list() gives")

    return method


# What `list` would do by itself looks at memory of its own, in which there are no items.
for _name in ("contains", "reversed", "eq", "ne", "lt", "le", "gt", "ge", "add", "mul", "rmul"):
    setattr(MetadataArray, f"__{_name}__", _by_items(f"__{_name}__"))
for _name in ("copy", "count", "index"):
    setattr(MetadataArray, _name, _by_items(_name))
for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__"):
    setattr(MetadataArray, _name, _refused(_name))
for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"):
    setattr(MetadataArray, _name, _refused(_name))


class Metadata(Mapping[str, Any]):
    """The keys and values of a file. Arrays are read when they are looked at, and so are strings of over 1 MiB."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return value.read() if isinstance(value, LongString) else value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def shown(self) -> Iterator[tuple[str, str]]:
        """Each key with its value in a few words, for tables: no more is read than they show."""
        for key, value in self._values.items():
            try:
                shown = value.shown() if isinstance(value, (LongString, MetadataArray)) else _shown(value)
            except NumbaDequantError as error:
                shown = f"cannot be read: {error}"
            yield key, shown

    def __repr__(self) -> str:
        return f"Metadata({', '.join(f'{key!r}: {shown}' for key, shown in self.shown())})"


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[: SHOWN_CHARACTERS - 3] + "...")


def read_value(cursor: Cursor, key: str) -> tuple[int, Any]:
    """The next metadata value, with its type."""
    field = "metadata {!r}"
    cursor.subject = key
    at = cursor.position
    kind = cursor.u32(f"{field} type")
    if kind == ARRAY:
        return kind, _read_array(cursor, key)
    if kind == STRING:
        return kind, _read_string(cursor)
    if kind not in NUMBERS:
        cursor.fail(f"{field} type", at, kind, "0 to 12")
    return kind, cursor.number(kind, field)


def _read_string(cursor: Cursor) -> str | LongString:
    field = "metadata {!r}"
    length = cursor.string_length(field)
    if length <= LONG_STRING:
        return _decoded(cursor.take(length, field))
    cursor.need(length, field, cursor.position, f"{length} bytes")
    cursor.position += length
    return LongString(cursor, length)


def _read_array(cursor: Cursor, key: str) -> MetadataArray:
    field = "metadata {!r}"
    at = cursor.position
    kind = cursor.u32(f"{field} item type")
    if kind != STRING and kind not in NUMBERS:
        cursor.fail(f"{field} item type", at, kind, "0 to 8 and 10 to 12 (no arrays within arrays)")
    at = cursor.position
    length = cursor.u64(f"{field} length")
    if length > MAX_ITEMS:
        cursor.fail(f"{field} length", at, length, f"at most {MAX_ITEMS} items")
    n_bytes = length * (8 if kind == STRING else np.dtype(NUMBERS[kind]).itemsize)
    cursor.need(n_bytes, f"{field} length", at, length)
    array = MetadataArray(cursor, key, kind, length)
    if kind == STRING:
        cursor.skip_strings(length, field)
    else:
        cursor.position += n_bytes
    return array
