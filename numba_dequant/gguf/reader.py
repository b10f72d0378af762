"""Reading one GGUF file, which may be a shard: its header and its tensor table, with all checks.

The rules are those that `file` lists.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba_dequant.errors import GgufError, NumbaDequantError, UnknownFormatError
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_with_id
from numba_dequant.gguf.header import CUT_SHORT, INTEGERS, UINT32, Cursor
from numba_dequant.gguf.metadata import Metadata, read_value
from numba_dequant.gguf.not_gguf import LOOKED_AT, guess
from numba_dequant.gguf.source import NotRegularFileError, Source, read_error
from numba_dequant.gguf.tensors import GgufFile, TensorInfo, TensorTable, truncated

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 8
_ENTRY = tuple(f"{n_dimensions}QIQ" for n_dimensions in range(MAX_DIMENSIONS + 1))
"""What follows the number of dimensions: each of them, a type and an offset."""
MAX_ELEMENTS = 1 << 60
"""Elements that no tensor has: NumPy counts bytes up to 2**63, and an element may take 8."""
MIN_ENTRY = 13
"""Bytes that a metadata entry takes at least: the length of its key, its type, and one byte."""
MIN_TENSOR = 24
"""Bytes that an entry of the tensor table takes at least: the length of its name, its dimensions, type and offset."""
SPLIT_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})


def read_file(source: Source, offset: int = 0, *, allow_truncated: bool = False) -> GgufFile:
    """Read the header of one file, which begins at a byte of the source.

    Raises:
        GgufError: it is no GGUF file, or breaks a rule of the format.
        ReadError: it cannot be read.
    """
    try:
        with source.open_first() as file:
            cursor = Cursor(source, file, offset, is_first=True)
            found = _read_header(cursor, allow_truncated=allow_truncated)
            cursor.keep_checksum()
            source.may_grow = found.n_bytes_here < found.n_bytes
            return found
    except NotRegularFileError as error:
        raise GgufError(source.name, "file", None, f"no regular file: {error.strerror}", "a GGUF file") from error
    except NumbaDequantError:
        raise
    except OSError as error:
        raise read_error(source.name, error) from error


def _read_header(cursor: Cursor, *, allow_truncated: bool) -> GgufFile:
    start = cursor.position
    _check_magic(cursor)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensor count", MIN_TENSOR)
    n_entries = _read_count(cursor, "metadata count", MIN_ENTRY)
    metadata, alignment = _read_metadata(cursor, n_entries)
    entries = _read_table(cursor, n_tensors)
    data_start = start + _padded(cursor.position - start, alignment)
    tensors, end = _place(cursor, entries, data_start, alignment, allow_truncated=allow_truncated)
    name = cursor.source.name
    return GgufFile(
        name,
        version,
        cursor.byte_order,
        alignment,
        metadata,
        TensorTable(tensors),
        (name,),
        end,
        min(end, cursor.size),
    )


def _check_magic(cursor: Cursor) -> None:
    at = cursor.position
    if at > cursor.size:
        cursor.fail("offset", at, f"a file of {cursor.size} bytes", "a place within the file")
    start = cursor.peek(LOOKED_AT)
    if start[:4] == b"GGUF":
        cursor.position += 4
        return
    found = repr(start[:4]) if len(start) >= 4 else f"{len(start)} bytes"
    what = guess(start) if start or not at else None
    looks = f"; it looks like {what}" if what else ""
    cursor.fail("magic", at, found, f"b'GGUF': this is not a GGUF file{looks}")


def _read_version(cursor: Cursor) -> int:
    at = cursor.position
    raw = cursor.take(4, "version")
    # The number is small: if its low half is zero, it has been read from the wrong end.
    cursor.byte_order = "big" if raw[:2] == b"\0\0" and raw != bytes(4) else "little"
    version = int.from_bytes(raw, cursor.byte_order)
    if version == 1:
        cursor.fail("version", at, "1, which was written in August 2023 only", "2 or 3; convert the model again")
    if version not in (2, 3):
        cursor.fail("version", at, version, "2 or 3")
    return version


def _read_count(cursor: Cursor, field: str, smallest: int) -> int:
    at = cursor.position
    count = cursor.u64(field)
    if count * smallest > cursor.left:
        most = cursor.left // smallest
        cursor.fail(field, at, count, f"at most {most}, what fits in the rest of the file{CUT_SHORT}")
    return count


def _read_metadata(cursor: Cursor, n_entries: int) -> tuple[Metadata, int]:
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for index in range(n_entries):
        at, cursor.subject = cursor.position, index
        key = cursor.name("metadata key {!r}")
        if not key:
            cursor.fail("metadata key {!r}", at, "an empty key", "at least one byte that is not NUL")
        if key in metadata:
            cursor.fail("metadata key {!r}", at, f"{key!r} again", "each key once")
        at = cursor.position
        kind, value = read_value(cursor, key)
        if key == "general.alignment":
            is_sound = kind == UINT32 and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
            if not is_sound:
                found = value if kind == UINT32 else f"a value of type {kind}"
                cursor.fail("metadata 'general.alignment'", at, found, "a uint32, a power of two up to 1 MiB")
            alignment = value
        if key in SPLIT_KEYS and kind not in INTEGERS:
            cursor.fail("metadata {!r}", at, f"a value of type {kind}", "an integer")
        metadata[key] = value
    return Metadata(metadata), alignment


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
        name = cursor.name("name of tensor {!r}")
        if "\0" in name:
            cursor.fail("name of tensor {!r}", at, repr(name), "no NUL, except at the end")
        if name in names:
            cursor.fail("name of tensor {!r}", at, f"{name!r} again", "each name once")
        names.add(name)
        entries.append(_read_entry(cursor, name))
    return entries


def _read_entry(cursor: Cursor, name: str) -> _Entry:
    cursor.subject = name
    n_dimensions = cursor.u32("tensor {!r} number of dimensions")
    shape_at = cursor.position
    if n_dimensions > MAX_DIMENSIONS:
        allowed = f"at most {MAX_DIMENSIONS}"
        cursor.fail("tensor {!r} number of dimensions", shape_at - 4, n_dimensions, allowed)
    *extents, ggml_id, offset = cursor.numbers(_ENTRY[n_dimensions], "tensor {!r} dimensions, type and offset")
    shape = tuple(extents[::-1])
    if math.prod(extent or 1 for extent in shape) >= MAX_ELEMENTS:
        allowed = "fewer than 2**60 elements, where a dimension of 0 counts as 1: NumPy holds no more"
        cursor.fail("tensor {!r} dimensions", shape_at, shape, allowed)
    try:
        source = format_with_id(ggml_id)
    except UnknownFormatError as error:
        allowed = ", ".join(str(known.ggml_id) for known in FORMATS.values())
        cursor.fail("tensor {!r} type", cursor.position - 12, str(error), allowed)
    row = shape[-1] if shape else 1
    if row % source.block_size:
        allowed = f"rows of whole blocks: {source.name} has {source.block_size} elements a block"
        cursor.fail("tensor {!r} dimensions", shape_at, f"rows of {row}", allowed)
    n_elements = math.prod(shape)
    n_bytes = n_elements // source.block_size * source.type_size
    return _Entry(name, source, shape, n_bytes, n_elements, offset, cursor.position - 8)


def _place(
    cursor: Cursor, entries: list[_Entry], start: int, alignment: int, *, allow_truncated: bool
) -> tuple[dict[str, TensorInfo], int]:
    """Check that the tensors lie one behind the other, whole, in the file; the tensors, and where the last one ends."""
    expected, end = start, cursor.position
    cut_at: _Entry | None = None
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        name, source, shape, n_bytes, n_elements, offset, offset_at = entry
        if start + offset != expected:
            cursor.subject = name
            allowed = f"{expected - start}, behind the tensor before it"
            cursor.fail("tensor {!r} offset", offset_at, offset, allowed)
        tensors[name] = TensorInfo(
            name,
            source,
            shape,
            cursor.source.name,
            expected,
            n_bytes,
            n_elements,
            cursor.byte_order,
            cursor.source,
        )
        end = expected + n_bytes
        cut_at = entry if cut_at is None and end > cursor.size else cut_at
        expected += _padded(n_bytes, alignment)
    if cut_at is not None and not allow_truncated:
        raise truncated(tensors[cut_at.name], cursor.size, f", and {end} for all tensors")
    return tensors, end


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
