"""Reads and checks the tensor table of a GGUF file."""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

from numba_dequant.errors import UnknownFormatError, shown
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_with_id
from numba_dequant.gguf.header import MAX_KEY, ByteOrder, Cursor, record
from numba_dequant.gguf.tensors import TensorInfo, truncated

MAX_DIMENSIONS = 8
_ENTRY = tuple(f"{n_dimensions}QIQ" for n_dimensions in range(MAX_DIMENSIONS + 1))
"""Format of a tensor entry after the number of dimensions: the dimensions, the type, the offset."""
MAX_ELEMENTS = 1 << 60
"""A tensor must have fewer elements: NumPy counts bytes up to 2**63, and an element may take 8."""


class Kind(NamedTuple):
    """What all tensors of one format and shape have in common."""

    format: Format
    shape: tuple[int, ...]
    n_bytes: int
    n_elements: int


Kinds = dict[tuple[int, ...], Kind]
"""The kinds that a file has so far, by the numbers between the name and the offset of an entry."""

Entries = dict[str, tuple[Kind, int, int]]
"""The entries of a table by name: the kind, the offset, which is not checked yet, and the position of the offset."""


def read_table(cursor: Cursor, n_tensors: int) -> Entries:
    """Read the entries of all tensors, and check all of them but the offset."""
    entries: Entries = {}
    kinds: Kinds = {}
    singly = 1
    while len(entries) < n_tensors:
        before = len(entries)
        _read_usual(cursor, n_tensors - before, entries, kinds)
        # If that makes no progress, it is tried less often.
        singly = 1 if len(entries) > before else min(2 * singly, 64)
        for _ in range(min(singly, n_tensors - len(entries))):
            _read_any(cursor, entries, kinds)
    return entries


@cache
def _unpackers(byte_order: ByteOrder) -> tuple[Any, ...]:
    """What reads the numbers of an entry, by the number of dimensions, which is the first of them."""
    return tuple(record(byte_order, f"I{codes}").unpack_from for codes in _ENTRY)


def _read_usual(cursor: Cursor, most: int, entries: Entries, kinds: Kinds) -> None:
    """Read up to `most` entries, and stop before one that is not as usual, which `_read_any` reads.

    A usual entry is in memory as a whole, has a known kind, and nothing in it is wrong. A model has hundreds of such
    entries of some ten kinds; each is read here in a tenth of the time.
    """
    window, at = cursor.ahead
    before = cursor.position - at
    unpack_length, unpack = record(cursor.byte_order, "Q").unpack_from, _unpackers(cursor.byte_order)
    low = 0 if cursor.byte_order == "little" else 3  # the lowest byte of the number of dimensions
    with suppress(struct.error, LookupError, UnicodeDecodeError):
        for _ in range(most):
            (length,) = unpack_length(window, at)
            name_end = at + 8 + length
            numbers = unpack[window[name_end + low]](window, name_end)
            kind = kinds[numbers[:-1]]
            name = window[at + 8 : name_end].decode()
            if length > MAX_KEY or "\0" in name or name in entries:
                break
            at = name_end + 8 * len(numbers) - 8  # the first and the third last number have four bytes
            entries[name] = kind, numbers[-1], before + at - 8
    cursor.position = before + at


def _read_any(cursor: Cursor, entries: Entries, kinds: Kinds) -> None:
    """Read the next entry."""
    at, cursor.subject = cursor.position, len(entries)
    name = cursor.name("name of tensor {!r}")
    if "\0" in name:
        reason = f"tensor name {shown(name)} contains a NUL; NULs are allowed only at the end"
        cursor.fail("name of tensor {!r}", at, shown(name), "no NUL, except at the end", reason)
    if name in entries:
        reason = f"tensor name {shown(name)} appears twice; a name must be unique"
        cursor.fail("name of tensor {!r}", at, name, "each name once", reason)
    cursor.subject = name
    n_dimensions = cursor.u32("tensor {!r} number of dimensions")
    shape_at = cursor.position
    if n_dimensions > MAX_DIMENSIONS:
        allowed = f"at most {MAX_DIMENSIONS}"
        reason = f"tensor {shown(name)} has {n_dimensions} dimensions; {allowed} are allowed"
        cursor.fail("tensor {!r} number of dimensions", shape_at - 4, n_dimensions, allowed, reason)
    *numbers, offset = cursor.numbers(_ENTRY[n_dimensions], "tensor {!r} dimensions, type and offset")
    key = (n_dimensions, *numbers)
    kind = kinds.get(key)
    if kind is None:
        kind = kinds[key] = _checked_kind(cursor, name, shape_at, tuple(numbers[-2::-1]), numbers[-1])
    entries[name] = kind, offset, cursor.position - 8


def _checked_kind(cursor: Cursor, name: str, shape_at: int, shape: tuple[int, ...], ggml_id: int) -> Kind:
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
    return Kind(fmt, shape, n_bytes, n_elements)


_info = partial(tuple.__new__, TensorInfo)
"""Makes a `TensorInfo` of all its values in a tuple, in half the time of its own constructor."""


def located(
    cursor: Cursor, entries: Entries, start: int, alignment: int, *, allow_truncated: bool
) -> tuple[dict[str, TensorInfo], int]:
    """Check that the tensors follow one another within the file; returns them, and the end of the last one."""
    expected, end = start, cursor.position
    cut_at: str | None = None
    tensors: dict[str, TensorInfo] = {}
    source, path, order = cursor.source, cursor.source.name, cursor.byte_order
    for name, ((fmt, shape, n_bytes, n_elements), offset, offset_at) in entries.items():
        if start + offset != expected:
            cursor.subject = name
            allowed = str(expected - start)
            reason = (
                f"tensor {shown(name)} has offset {offset}; it must be {allowed}, directly after the previous tensor"
            )
            cursor.fail("tensor {!r} offset", offset_at, offset, allowed, reason)
        tensors[name] = _info((name, fmt, shape, path, expected, n_bytes, n_elements, order, source))
        end = expected + n_bytes
        if end > cursor.size and cut_at is None:
            cut_at = name
        expected = end + -n_bytes % alignment
    if cut_at is not None and not allow_truncated:
        raise truncated(tensors[cut_at], cursor.size, f" and the last tensor at byte {end}")
    return tensors, end


def padded(n_bytes: int, alignment: int) -> int:
    """The number of bytes with the padding up to the next multiple of `alignment`."""
    return n_bytes + -n_bytes % alignment
