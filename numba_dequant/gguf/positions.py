"""Where the metadata entries of a file begin, for readers that parse the entries themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import shown
from numba_dequant.gguf.header import ByteOrder, Cursor
from numba_dequant.gguf.metadata import read_value
from numba_dequant.gguf.source import Source


def entry_positions(
    data: NDArray[np.uint8], position: int, count: int, byte_order: ByteOrder
) -> tuple[dict[str, int], int]:
    """Find the metadata entries of a GGUF file in memory. Array items are passed over, not decoded.

    Args:
        data: the bytes of the file, or of its beginning.
        position: byte position of the first entry.
        count: number of entries.
        byte_order: of the file.

    Returns:
        key -> byte position of its entry, in file order, and the position after the last entry. Keys keep their NULs.

    Raises:
        GgufError: an entry violates the format, as for `open`, or a key appears twice.
    """
    source = Source("<memory>", data=data)
    positions: dict[str, int] = {}
    with source.open() as file:
        cursor = Cursor(source, file, position, is_first=False)
        cursor.byte_order = byte_order
        for number in range(count):
            at, cursor.subject = cursor.position, number
            key = _key(cursor)
            if key in positions:
                reason = f"metadata key {shown(key)} appears twice; a key must be unique"
                cursor.fail("metadata key {!r}", at, key, "each key once", reason)
            positions[key] = at
            read_value(cursor, key)
        return positions, cursor.position


def _key(cursor: Cursor) -> str:
    field = "metadata key {!r}"
    raw = cursor.take(cursor.name_length(field), field)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        cursor.fail(
            field, cursor.position - len(raw), shown(raw), "UTF-8", f"metadata key {shown(raw)} is not valid UTF-8"
        )
