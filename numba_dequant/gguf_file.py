"""The header and the tensor table of a GGUF file, or of all shards of a split one, with all checks.

Source of the format: ggml's docs/gguf.md and src/gguf.cpp. Where they leave room, this is what we do:

* refused: a bool other than 0 and 1, keys, names and strings that are not UTF-8, names with a NUL, arrays within
  arrays (as in ggml), strings of more than 64 MiB, an alignment of more than 1 MiB;
* taken: a tensor without dimensions (a scalar), an empty tensor name, a dimension of 0, missing padding after the last
  tensor. The strings of an array are checked when they are looked at.

Nothing here touches CUDA or Numba, and nothing but the header is read.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba_dequant import tables
from numba_dequant.errors import GgufError, TensorNotFoundError, UnknownFormatError
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_with_id
from numba_dequant.gguf_header import INTEGERS, LARGEST_KEY, UINT32, ByteOrder, Cursor, Stamp, read_value

DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 20
LARGEST_NAME = 63
MOST_DIMENSIONS = 4
_ENTRY = tuple(f"{n_dimensions}QIQ" for n_dimensions in range(MOST_DIMENSIONS + 1))
"""What follows the number of dimensions: each of them, a type and an offset."""
MOST_SHARDS = 65535
SMALLEST_ENTRY = 13
"""Bytes that a metadata entry takes at least: the length of its key, its type, and one byte."""
SMALLEST_TENSOR = 24
"""Bytes that an entry of the tensor table takes at least: the length of its name, its dimensions, type and offset."""


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is.

    Attributes:
        name: its name.
        format: its storage format.
        shape: rows first; a file stores dimensions the other way round.
        path: the file that holds it.
        offset: byte position of its data in that file.
        n_bytes: length of its data.
        n_elements: number of elements.
        byte_order: of its data, "little" or "big".
        stamp: what tells whether the file is still the same.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    path: str
    offset: int
    n_bytes: int
    n_elements: int
    byte_order: ByteOrder
    stamp: Stamp

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields[:-1], self, strict=False))
        return f"TensorInfo({shown})"

    def _repr_html_(self) -> str:
        rows = [
            ("format", f"{self.format.name}: {self.format.summary}"),
            ("shape", " x ".join(map(str, self.shape)) or "scalar"),
            ("elements", f"{self.n_elements:,}, {self.format.bits_per_weight:.4g} bits each"),
            ("bytes", f"{self.n_bytes:,}, {self.byte_order}-endian"),
            ("place", f"byte {self.offset:,} of {self.path}"),
        ]
        return tables.html(("tensor", tables.plain(self.name)), rows)


class TensorTable(Mapping[str, TensorInfo]):
    """The tensors of a model by name, in file order."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._tensors, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TensorNotFoundError(f"there is no tensor {name!r} among {len(self)}{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _repr_html_(self) -> str:
        return tables.html(tables.TENSOR_HEAD, tables.tensor_rows(self.values()))

    def __repr__(self) -> str:
        if not self:
            return "no tensors"
        rows = tables.tensor_rows(self.values())
        return tables.text(tables.TENSOR_HEAD, rows, tables.TENSOR_SIDES, tables.MOST_LINES)


@dataclass(frozen=True)
class GgufFile:
    """What the header of a model says; for a split model, `metadata` is that of the first shard.

    Attributes:
        path: the file, or the first shard.
        version: of the format, 2 or 3.
        byte_order: "little" or "big".
        alignment: of tensor data, in bytes.
        metadata: keys and values; arrays are read when they are looked at.
        tensors: the tensors of all shards.
        shards: all files.
    """

    path: str
    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the header of a GGUF file, and of the other shards if it is the first of a split.

    Raises:
        GgufError: it is no GGUF file, breaks a rule of the format, is a later shard, or a shard is missing.
        OSError: it cannot be read.
    """
    first = _read_file(os.fspath(path))
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or not 0 <= count <= MOST_SHARDS:
        raise GgufError(first.path, "metadata 'split.count'", None, count, f"a number up to {MOST_SHARDS}")
    if count <= 1:
        return first
    return _join(first, count)


def _join(first: GgufFile, count: int) -> GgufFile:
    paths = _shard_paths(first, count)
    shards = [first]
    for number, path in enumerate(paths[1:], 1):
        try:
            shard = _read_file(path)
        except FileNotFoundError:
            raise GgufError(first.path, "metadata 'split.count'", None, f"{count}, but no file {path}", "all") from None
        for key, expected in (("split.no", number), ("split.count", count)):
            if shard.metadata.get(key) != expected:
                raise GgufError(path, f"metadata {key!r}", None, shard.metadata.get(key), f"{expected}, as in its name")
        shards.append(shard)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise GgufError(shard.path, f"tensor {name!r} name", None, f"it in {tensors[name].path} too", "one")
            tensors[name] = tensor
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise GgufError(first.path, "metadata 'split.tensors.count'", None, total, f"{len(tensors)}, as in the shards")
    return GgufFile(
        first.path,
        first.version,
        first.byte_order,
        first.alignment,
        first.metadata,
        TensorTable(tensors),
        tuple(paths),
    )


def _shard_paths(first: GgufFile, count: int) -> list[str]:
    """The names of all shards, which follow from that of the first."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", first.path, re.DOTALL)
    if match is None or int(match[3]) != count:
        allowed = f"a file name that ends in -00001-of-{count:05}.gguf"
        raise GgufError(first.path, "metadata 'split.count'", None, count, allowed)
    paths = [f"{match[1]}-{number:05}-of-{match[3]}{match[4]}" for number in range(1, count + 1)]
    if int(match[2]) != 1 or first.metadata.get("split.no") != 0:
        found = first.metadata.get("split.no")
        raise GgufError(first.path, "metadata 'split.no'", None, found, f"0: open the first shard, {paths[0]}")
    return paths


def _read_file(path: str) -> GgufFile:
    # A pipe would wait for its other end; a folder has no size to speak of.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise GgufError(path, "file", None, "no regular file", "a GGUF file")
    with open(path, "rb") as file:
        return _read_header(Cursor(path, file))


def _read_header(cursor: Cursor) -> GgufFile:
    if cursor.size < 4 or (magic := cursor.take(4, "magic")) != b"GGUF":
        found = f"{cursor.size} bytes" if cursor.size < 4 else repr(magic)
        cursor.fail("magic", 0, found, "b'GGUF': this is no GGUF file")
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor count", SMALLEST_TENSOR)
    n_entries = _read_count(cursor, "metadata count", SMALLEST_ENTRY)
    metadata, alignment = _read_metadata(cursor, n_entries)
    entries = _read_table(cursor, n_tensors)
    tensors = _place(cursor, entries, alignment)
    return GgufFile(cursor.path, version, cursor.byte_order, alignment, metadata, TensorTable(tensors), (cursor.path,))


def _read_version(cursor: Cursor) -> int:
    raw = cursor.take(4, "version")
    # The number is small: if its low half is zero, it has been read from the wrong end.
    cursor.byte_order = "big" if raw[:2] == b"\0\0" and raw != bytes(4) else "little"
    version = int.from_bytes(raw, cursor.byte_order)
    if version not in (2, 3):
        cursor.fail("version", 4, version, "2 or 3")
    return version


def _read_count(cursor: Cursor, field: str, smallest: int) -> int:
    at = cursor.position
    count = cursor.u64(field)
    if count * smallest > cursor.size - cursor.position:
        most = (cursor.size - cursor.position) // smallest
        cursor.fail(field, at, count, f"at most {most}, what fits in the rest of the file")
    return count


def _read_metadata(cursor: Cursor, n_entries: int) -> tuple[dict[str, Any], int]:
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(n_entries):
        at, cursor.subject = cursor.position, index
        key = cursor.string("metadata key {!r}", LARGEST_KEY)
        if key in metadata:
            cursor.fail("metadata key {!r}", at, f"{key!r} again", "each key once")
        at = cursor.position
        kind, value = read_value(cursor, key)
        if key == "general.alignment":
            is_sound = kind == UINT32 and 0 < value <= LARGEST_ALIGNMENT and value & (value - 1) == 0
            if not is_sound:
                found = value if kind == UINT32 else f"a value of type {kind}"
                cursor.fail("metadata 'general.alignment'", at, found, "a uint32, a power of two up to 1 MiB")
            alignment = value
        if key.startswith("split.") and kind not in INTEGERS:
            cursor.fail("metadata {!r}", at, f"a value of type {kind}", "an integer")
        metadata[key] = value
    return metadata, alignment


class _Entry(NamedTuple):
    """A line of the tensor table, before its offset has been looked at."""

    name: str
    format: Format
    shape: tuple[int, ...]
    n_bytes: int
    n_elements: int
    offset: int
    offset_at: int


def _read_table(cursor: Cursor, n_tensors: int) -> list[_Entry]:
    entries = []
    names: set[str] = set()
    for index in range(n_tensors):
        at, cursor.subject = cursor.position, index
        name = cursor.string("name of tensor {!r}", LARGEST_NAME)
        if "\0" in name:
            cursor.fail("name of tensor {!r}", at, repr(name), "no NUL")
        if name in names:
            cursor.fail("name of tensor {!r}", at, f"{name!r} again", "each name once")
        names.add(name)
        entries.append(_read_entry(cursor, name))
    return entries


def _read_entry(cursor: Cursor, name: str) -> _Entry:
    cursor.subject = name
    n_dimensions = cursor.u32("tensor {!r} number of dimensions")
    shape_at = cursor.position
    if n_dimensions > MOST_DIMENSIONS:
        allowed = f"at most {MOST_DIMENSIONS}"
        cursor.fail("tensor {!r} number of dimensions", shape_at - 4, n_dimensions, allowed)
    *extents, ggml_id, offset = cursor.numbers(_ENTRY[n_dimensions], "tensor {!r} dimensions, type and offset")
    shape = tuple(extents[::-1])
    n_elements = math.prod(shape)
    if n_elements >= 1 << 63 or (not n_elements and max(shape) >= 1 << 63):
        cursor.fail("tensor {!r} dimensions", shape_at, shape, "fewer than 2**63 elements")
    try:
        source = format_with_id(ggml_id)
    except UnknownFormatError as error:
        allowed = ", ".join(str(known.ggml_id) for known in FORMATS.values())
        raise GgufError(cursor.path, f"tensor {name!r} type", cursor.position - 12, str(error), allowed) from None
    row = shape[-1] if shape else 1
    if row % source.block_size:
        allowed = f"rows of whole blocks: {source.name} has {source.block_size} elements a block"
        cursor.fail("tensor {!r} dimensions", shape_at, f"rows of {row}", allowed)
    n_bytes = n_elements // source.block_size * source.type_size
    return _Entry(name, source, shape, n_bytes, n_elements, offset, cursor.position - 8)


def _place(cursor: Cursor, entries: list[_Entry], alignment: int) -> dict[str, TensorInfo]:
    """Check that the tensors lie one behind the other, whole, in the file."""
    start = expected = _padded(cursor.position, alignment)
    path, byte_order, stamp = cursor.path, cursor.byte_order, cursor.stamp
    tensors = {}
    for name, source, shape, n_bytes, n_elements, offset, offset_at in entries:
        cursor.subject = name
        if start + offset != expected:
            allowed = f"{expected - start}, behind the tensor before it"
            cursor.fail("tensor {!r} offset", offset_at, offset, allowed)
        if expected + n_bytes > cursor.size:
            found = f"a file of {cursor.size} bytes"
            cursor.fail("tensor {!r} data", expected, found, f"at least {expected + n_bytes}")
        tensors[name] = TensorInfo(name, source, shape, path, expected, n_bytes, n_elements, byte_order, stamp)
        expected += _padded(n_bytes, alignment)
    return tensors


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def truncated(tensor: TensorInfo) -> GgufError:
    """The error for a file that has become shorter than it was when it was opened."""
    found = f"a file of {os.path.getsize(tensor.path)} bytes"
    allowed = f"at least {tensor.offset + tensor.n_bytes}"
    return GgufError(tensor.path, f"tensor {tensor.name!r} data", tensor.offset, found, allowed)
