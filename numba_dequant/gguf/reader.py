"""Reads and checks the header and the tensor table of one GGUF file, which may be a shard.

The module `file` lists the rules.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba_dequant.errors import GgufError, NumbaDequantError, UnknownFormatError, shown
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_with_id
from numba_dequant.gguf.header import INCOMPLETE, INTEGERS, UINT32, Cursor
from numba_dequant.gguf.limits import Allowance
from numba_dequant.gguf.metadata import Metadata, read_value
from numba_dequant.gguf.not_gguf import LOOKED_AT, guess
from numba_dequant.gguf.source import NotRegularFileError, Source, read_error
from numba_dequant.gguf.tensors import GgufFile, TensorInfo, TensorTable, truncated

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 8
_ENTRY = tuple(f"{n_dimensions}QIQ" for n_dimensions in range(MAX_DIMENSIONS + 1))
"""Format of a tensor entry after the number of dimensions: the dimensions, the type, the offset."""
MAX_ELEMENTS = 1 << 60
"""A tensor must have fewer elements: NumPy counts bytes up to 2**63, and an element may take 8."""
FIXED = 24
"""Bytes of the magic, the version and the two counts."""
MIN_ENTRY = 13
"""Minimum bytes of a metadata entry: the length of the key, the type, and one byte."""
MIN_TENSOR = 24
"""Minimum bytes of a tensor entry: the length of the name, the number of dimensions, the type, the offset."""
SPLIT_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})


def read_file(source: Source, offset: int = 0, *, allow_truncated: bool, allowance: Allowance) -> GgufFile:
    """Read the header of one file, which begins at byte `offset` of the source.

    What the file has is subtracted from `allowance`, which the shards of a model share.

    Raises:
        GgufError: the file is not a GGUF file, violates the format, or exceeds a limit.
        ReadError: the file cannot be read.
    """
    try:
        with source.open_first() as file:
            cursor = Cursor(source, file, offset, is_first=True, allowance=allowance)
            gguf_file = _read_header(cursor, allowance, allow_truncated=allow_truncated)
            allowance.header_bytes -= cursor.position - offset
            cursor.keep_checksum()
            source.may_grow = gguf_file.n_bytes_here < gguf_file.n_bytes
            return gguf_file
    except NotRegularFileError as error:
        reason = f"{error.strerror}; correct the path"
        raise GgufError(source.name, "file", None, error.strerror, "a regular file", reason) from error
    except NumbaDequantError:
        raise
    except OSError as error:
        raise read_error(source.name, error) from error


def _read_header(cursor: Cursor, allowance: Allowance, *, allow_truncated: bool) -> GgufFile:
    start = cursor.position
    _check_magic(cursor)
    version = _read_version(cursor)
    at = cursor.position
    n_tensors = _read_count(cursor, "tensor count", MIN_TENSOR)
    n_entries = _read_count(cursor, "metadata count", MIN_ENTRY)
    allowance.spend_tensors(n_tensors, cursor.source.name, at)
    allowance.spend_entries(n_entries, cursor.source.name, at + 8)
    metadata, alignment = _read_metadata(cursor, n_entries)
    entries = _read_table(cursor, n_tensors)
    data_start = start + _padded(cursor.position - start, alignment)
    tensors, end = _locate(cursor, entries, data_start, alignment, allow_truncated=allow_truncated)
    name, here = cursor.source.name, min(end, cursor.size)
    return GgufFile(name, version, cursor.byte_order, alignment, metadata, TensorTable(tensors), (name,), end, here)


def _check_magic(cursor: Cursor) -> None:
    at = cursor.position
    if at > cursor.size:
        reason = f"offset {at} is beyond the end of the file, which has {cursor.size} bytes"
        cursor.fail("offset", at, f"a file of {cursor.size} bytes", f"at most {cursor.size}", reason)
    cursor.need(min(cursor.left, FIXED), "the counts", at, f"{cursor.left} bytes")  # more may exceed the limit
    start = cursor.peek(LOOKED_AT)
    if start[:4] == b"GGUF":
        cursor.position += 4
        return
    found = repr(start[:4]) if len(start) >= 4 else f"{len(start)} bytes"
    what = guess(start) if start or not at else None
    begins = f"begins with {found}, not b'GGUF'" if len(start) >= 4 else f"has only {found}"
    looks = f"; it looks like {what}" if what else ""
    cursor.fail("magic", at, found, "b'GGUF'", f"this is not a GGUF file: it {begins}{looks}")


def _read_version(cursor: Cursor) -> int:
    at = cursor.position
    raw = cursor.take(4, "version")
    # Versions are small numbers: if the first two bytes are zero, the file is big-endian.
    cursor.byte_order = "big" if raw[:2] == b"\0\0" else "little"
    version = int.from_bytes(raw, cursor.byte_order)
    if version == 1:
        reason = "GGUF version 1, used in August 2023 only, is not supported; convert the model again"
        cursor.fail("version", at, version, "2 or 3", reason)
    if version not in (2, 3):
        cursor.fail("version", at, version, "2 or 3", f"GGUF version {version} is not supported, only 2 and 3")
    return version


def _read_count(cursor: Cursor, field: str, smallest: int) -> int:
    at = cursor.position
    count = cursor.u64(field)
    if count * smallest > cursor.left:
        most = cursor.left // smallest
        reason = f"{field} is {count}, but the rest of the file has room for {most} at most"
        cursor.fail(field, at, count, f"at most {most}", reason + INCOMPLETE)
    return count


def _read_metadata(cursor: Cursor, n_entries: int) -> tuple[Metadata, int]:
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for number in range(n_entries):
        at, cursor.subject = cursor.position, number
        key = cursor.name("metadata key {!r}")
        if not key:
            cursor.fail("metadata key {!r}", at, "an empty key", "a key", f"metadata key {number} is empty")
        if key in metadata:
            reason = f"metadata key {shown(key)} appears twice; a key must be unique"
            cursor.fail("metadata key {!r}", at, key, "each key once", reason)
        at = cursor.position
        value_type, value = read_value(cursor, key)
        if key == "general.alignment":
            is_valid = value_type == UINT32 and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
            if not is_valid:
                found = value if value_type == UINT32 else f"a value of type {value_type}"
                reason = f"general.alignment is {found}; it must be a uint32, a power of two up to 1 MiB"
                cursor.fail("metadata {!r}", at, found, "a uint32, a power of two up to 1 MiB", reason)
            alignment = value
        if key in SPLIT_KEYS and value_type not in INTEGERS:
            reason = f"{key} is a value of type {value_type}; it must be an integer"
            cursor.fail("metadata {!r}", at, f"a value of type {value_type}", "an integer", reason)
        metadata[key] = value
    return Metadata(metadata), alignment


class _Entry(NamedTuple):
    """An entry of the tensor table, before its offset is checked."""

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
    for number in range(n_tensors):
        at, cursor.subject = cursor.position, number
        name = cursor.name("name of tensor {!r}")
        if "\0" in name:
            reason = f"tensor name {shown(name)} contains a NUL; NULs are allowed only at the end"
            cursor.fail("name of tensor {!r}", at, shown(name), "no NUL, except at the end", reason)
        if name in names:
            reason = f"tensor name {shown(name)} appears twice; a name must be unique"
            cursor.fail("name of tensor {!r}", at, name, "each name once", reason)
        names.add(name)
        entries.append(_read_entry(cursor, name))
    return entries


def _read_entry(cursor: Cursor, name: str) -> _Entry:
    cursor.subject = name
    n_dimensions = cursor.u32("tensor {!r} number of dimensions")
    shape_at = cursor.position
    if n_dimensions > MAX_DIMENSIONS:
        allowed = f"at most {MAX_DIMENSIONS}"
        reason = f"tensor {shown(name)} has {n_dimensions} dimensions; {allowed} are allowed"
        cursor.fail("tensor {!r} number of dimensions", shape_at - 4, n_dimensions, allowed, reason)
    *extents, ggml_id, offset = cursor.numbers(_ENTRY[n_dimensions], "tensor {!r} dimensions, type and offset")
    shape = tuple(extents[::-1])
    if math.prod(extent or 1 for extent in shape) >= MAX_ELEMENTS:
        allowed = "fewer than 2**60 elements, where a dimension of 0 counts as 1"
        cursor.fail(
            "tensor {!r} dimensions", shape_at, shape, allowed, f"tensor {shown(name)} has shape {shape}; use {allowed}"
        )
    try:
        fmt = format_with_id(ggml_id)
    except UnknownFormatError as error:
        allowed = ", ".join(str(known.ggml_id) for known in FORMATS.values())
        cursor.fail("tensor {!r} type", cursor.position - 12, ggml_id, allowed, f"tensor {shown(name)} has an {error}")
    row = shape[-1] if shape else 1
    if row % fmt.block_size:
        allowed = f"a multiple of {fmt.block_size}, the block size of {fmt.name}"
        reason = f"tensor {shown(name)} has rows of {row} elements; the length of a row must be {allowed}"
        cursor.fail("tensor {!r} dimensions", shape_at, f"rows of {row}", allowed, reason)
    n_elements = math.prod(shape)
    n_bytes = n_elements // fmt.block_size * fmt.type_size
    return _Entry(name, fmt, shape, n_bytes, n_elements, offset, cursor.position - 8)


def _locate(
    cursor: Cursor, entries: list[_Entry], start: int, alignment: int, *, allow_truncated: bool
) -> tuple[dict[str, TensorInfo], int]:
    """Check that the tensors follow one another within the file; returns them, and the end of the last one."""
    expected, end = start, cursor.position
    cut_at: _Entry | None = None
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        name, fmt, shape, n_bytes, n_elements, offset, offset_at = entry
        if start + offset != expected:
            cursor.subject = name
            allowed = str(expected - start)
            reason = (
                f"tensor {shown(name)} has offset {offset}; it must be {allowed}, directly after the previous tensor"
            )
            cursor.fail("tensor {!r} offset", offset_at, offset, allowed, reason)
        source, order = cursor.source, cursor.byte_order
        tensors[name] = TensorInfo(name, fmt, shape, source.name, expected, n_bytes, n_elements, order, source)
        end = expected + n_bytes
        cut_at = entry if cut_at is None and end > cursor.size else cut_at
        expected += _padded(n_bytes, alignment)
    if cut_at is not None and not allow_truncated:
        raise truncated(tensors[cut_at.name], cursor.size, f" and the last tensor at byte {end}")
    return tensors, end


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
