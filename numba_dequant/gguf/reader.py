"""Reads and checks the header and the tensor table of one GGUF file, which may be a shard.

The module `file` lists the rules.
"""

from __future__ import annotations

from typing import Any

from numba_dequant.errors import GgufError, NumbaDequantError, shown
from numba_dequant.gguf.header import INCOMPLETE, INTEGERS, UINT32, Cursor
from numba_dequant.gguf.limits import Allowance
from numba_dequant.gguf.metadata import Metadata, read_value
from numba_dequant.gguf.not_gguf import LOOKED_AT, guess
from numba_dequant.gguf.source import NotRegularFileError, Source, read_error
from numba_dequant.gguf.table import located, padded, read_table
from numba_dequant.gguf.tensors import GgufFile, TensorTable

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
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
    entries = read_table(cursor, n_tensors)
    data_start = start + padded(cursor.position - start, alignment)
    tensors, end = located(cursor, entries, data_start, alignment, allow_truncated=allow_truncated)
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
