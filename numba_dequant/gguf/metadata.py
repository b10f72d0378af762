"""The metadata of a GGUF file. Arrays and long strings are read on first access."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NoReturn

import numpy as np

from numba_dequant import display
from numba_dequant.errors import DeviceError, NumbaDequantError, OptionError, shown
from numba_dequant.gguf.header import ARRAY, BOOL, INTEGERS, NUMBERS, STRING, Cursor
from numba_dequant.gguf.source import Source, read_error

LONG_STRING = 1 << 20
"""Strings of more bytes stay in the file until they are accessed."""

MAX_ITEMS = 1 << 26
"""Maximum items of an array, as in GGML."""

MAX_KEPT_ITEMS = 1 << 20
"""Arrays up to this length are read whole after several accesses to single items."""

ITEM = "metadata {!r} item"
"""The name of the field in errors about an item of an array."""

SHOWN_ITEMS, SHOWN_CHARACTERS = 3, 60
"""How many items of an array and characters of a string tables show."""


@contextmanager
def _reopened(source: Source, key: str, offset: int) -> Iterator[Cursor]:
    """A cursor at byte `offset` of a file whose header was read before.

    Raises:
        GgufError: the file has changed.
        ReadError: the file cannot be read.
        DeviceError: not enough memory.
    """
    try:
        with source.open() as file:
            cursor = Cursor(source, file, offset, is_first=False)
            cursor.subject = key
            if not source.is_unchanged(file):
                reason = f"metadata {shown(key)} cannot be read: the file has changed since it was opened; reopen it"
                cursor.fail("metadata {!r}", offset, "a file that has changed", "the file that was opened", reason)
            yield cursor
    except NumbaDequantError:
        raise
    except OSError as error:
        raise read_error(source.name, error, offset=offset, what=f"metadata {shown(key)}: ") from error
    except MemoryError as error:
        raise DeviceError(f"{source.name}: metadata {shown(key)}: out of memory") from error


def _decoded(raw: bytes) -> str:
    """Decode a string value, without NULs at its end. Invalid UTF-8 becomes U+FFFD, which can be printed."""
    return raw.rstrip(b"\0").decode(errors="replace")


class LongString:
    """A long string of the metadata, which `Metadata` reads from the file on each access."""

    def __init__(self, cursor: Cursor, length: int) -> None:
        self._source, self._key = cursor.source, str(cursor.subject)
        self._offset, self._length = cursor.position - length, length

    @property
    def n_bytes(self) -> int:
        """The length of the string in the file."""
        return self._length

    def read(self, most: int | None = None) -> str:
        """The string, or at most its first `most` bytes."""
        with _reopened(self._source, self._key, self._offset) as cursor:
            length = self._length if most is None else min(self._length, most)
            return _decoded(cursor.take(length, "metadata {!r}"))

    def shown(self) -> str:
        """The first characters, for tables."""
        return _shown(self.read(4 * SHOWN_CHARACTERS + 4))


class MetadataArray(list[Any]):
    """A read-only list: an array of the metadata, read from the file on access.

    Access to an item or a slice decodes only that. In an array of strings, the strings before it are passed over. After
    several such accesses, an array of up to `MAX_KEPT_ITEMS` items is read whole and kept. An operation on all items,
    such as iterating, always reads the whole array and keeps it. Strings keep their NULs; invalid UTF-8 becomes U+FFFD.

    `json.dumps` accepts it. orjson and ujson read the memory of a list directly: pass them `to_list()`.

    Attributes:
        key: the metadata key.
        offset: byte position of the first item.
    """

    def __init__(self, cursor: Cursor, key: str, value_type: int, length: int) -> None:
        self.key = key
        self.offset = cursor.position
        self._source, self._byte_order, self._limits = cursor.source, cursor.byte_order, cursor.limits
        self._type, self._length = value_type, length
        self._items: list[Any] | None = None
        self._accesses = 0

    @property
    def is_of_integers(self) -> bool:
        """Whether the items are integers."""
        return self._type in INTEGERS

    def to_list(self) -> list[Any]:
        """All items as a plain Python list.

        Raises:
            GgufError: the file has changed.
            ReadError: the file cannot be read.
            DeviceError: there is not enough memory.
        """
        return list(self._all())

    def _all(self) -> list[Any]:
        if self._items is None:
            self._items = self._read(0, self._length)
        return self._items

    def _read(self, start: int, stop: int, most: int | None = None) -> list[Any]:
        """Items `start` to `stop` (exclusive); at most `most` bytes of each string, if given."""
        if stop <= start:
            return []
        with self._opened(start) as cursor:
            return self._take(cursor, stop - start, most)

    @contextmanager
    def _opened(self, start: int) -> Iterator[Cursor]:
        """A cursor at item `start`."""
        with _reopened(self._source, self.key, self.offset) as cursor:
            cursor.byte_order, cursor.limits = self._byte_order, self._limits
            if self._type == STRING:
                cursor.skip_strings(start, ITEM)
            else:
                cursor.position += cursor.dtype(self._type).itemsize * start
            yield cursor

    def _take(self, cursor: Cursor, count: int, most: int | None = None) -> list[Any]:
        """The next `count` items; at most `most` bytes of each string, if given."""
        if self._type == STRING:
            return [cursor.item(ITEM, most) for _ in range(count)]
        dtype = cursor.dtype(self._type)
        values = np.frombuffer(cursor.take(dtype.itemsize * count, ITEM), dtype)
        items: list[Any] = (values.astype(bool) if self._type == BOOL else values).tolist()
        return items

    def first(self, count: int, most: int) -> list[Any]:
        """Up to `count` items from the start, and at most `most` bytes of each string."""
        return self._read(0, min(self._length, count), most)

    def pieces(self, count: int) -> Iterator[list[Any]]:
        """All items, in lists of up to `count`, which are not kept: an array may be larger than the memory.

        Raises:
            GgufError, ReadError, DeviceError: as for `to_list`.
        """
        with self._opened(0) as cursor:
            for start in range(0, self._length, count):
                yield self._take(cursor, min(count, self._length - start))

    def shown(self) -> str:
        """The first items, for tables."""
        items = ", ".join(_shown(item) for item in self.first(SHOWN_ITEMS, 256))
        return f"[{items}{', ...' if self._length > SHOWN_ITEMS else ''}] ({self._length:,} items)"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        indices = range(self._length)[index]
        # A loop over the indexes would otherwise open the file once per item.
        self._accesses += 1
        if self._items is not None or (self._accesses > 8 and self._length <= MAX_KEPT_ITEMS):
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
        return f"MetadataArray({shown(self.key)}, {self._length} items)"

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
        raise OptionError(f"metadata {shown(self.key)} is read-only; change the list that its to_list() returns")

    return method


# The methods of `list` would read the memory of the list, which is empty.
for _name in ("contains", "reversed", "eq", "ne", "lt", "le", "gt", "ge", "add", "mul", "rmul"):
    setattr(MetadataArray, f"__{_name}__", _by_items(f"__{_name}__"))
for _name in ("copy", "count", "index"):
    setattr(MetadataArray, _name, _by_items(_name))
for _name in ("__setitem__", "__delitem__", "__iadd__", "__imul__"):
    setattr(MetadataArray, _name, _refused(_name))
for _name in ("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"):
    setattr(MetadataArray, _name, _refused(_name))


class Metadata(Mapping[str, Any]):
    """The keys and values of a file. Arrays, and strings of more than 1 MiB, are read on access."""

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

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Each key with its value. Arrays and long strings are not read: they are `MetadataArray` and `LongString`."""
        return iter(self._values.items())

    def shown(self, most: int | None = None) -> Iterator[tuple[str, str]]:
        """Each key with its value, shortened for tables, or the first `most`. Only the shown part is read."""
        for key, value in islice(self._values.items(), most):
            try:
                text = value.shown() if isinstance(value, (LongString, MetadataArray)) else _shown(value)
            except NumbaDequantError as error:
                text = f"cannot be read: {error}"
            yield key, text

    def __repr__(self) -> str:
        parts = [f"{shown(key)}: {text}" for key, text in self.shown(display.MAX_LINES)]
        if len(self) > len(parts):
            parts.append(f"and {len(self) - len(parts):,} more")
        return f"Metadata({', '.join(parts)})"


def _shown(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[: SHOWN_CHARACTERS - 3] + "...")


def read_value(cursor: Cursor, key: str) -> tuple[int, Any]:
    """Read the next metadata value; returns its type and the value."""
    field = "metadata {!r}"
    cursor.subject = key
    at = cursor.position
    value_type = cursor.u32(f"{field} type")
    if value_type == ARRAY:
        return value_type, _read_array(cursor, key)
    if value_type == STRING:
        return value_type, _read_string(cursor)
    if value_type not in NUMBERS:
        reason = f"metadata {shown(key)} has the unknown value type {value_type}; GGUF has types 0 to 12"
        cursor.fail(f"{field} type", at, value_type, "0 to 12", reason)
    return value_type, cursor.number(value_type, field)


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
    item_type = cursor.u32(f"{field} item type")
    if item_type != STRING and item_type not in NUMBERS:
        what = "is an array of arrays" if item_type == ARRAY else f"is an array of the unknown value type {item_type}"
        reason = f"metadata {shown(key)} {what}; items may be numbers, bools and strings (types 0 to 8 and 10 to 12)"
        cursor.fail(f"{field} item type", at, item_type, "0 to 8 and 10 to 12", reason)
    at = cursor.position
    length = cursor.u64(f"{field} length")
    if length > MAX_ITEMS:
        reason = f"metadata {shown(key)} has {length} items; at most {MAX_ITEMS} are allowed"
        cursor.fail(f"{field} length", at, length, f"at most {MAX_ITEMS} items", reason)
    n_bytes = length * (8 if item_type == STRING else np.dtype(NUMBERS[item_type]).itemsize)
    cursor.need(n_bytes, f"{field} length", at, length)
    array = MetadataArray(cursor, key, item_type, length)
    if item_type == STRING:
        cursor.skip_strings(length, field)
    else:
        cursor.position += n_bytes
    return array
