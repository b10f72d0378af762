"""JSON of anything that a file or a machine holds, for `--json` and for safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numba_dequant.errors import NumbaDequantError
from numba_dequant.gguf.metadata import LongString, Metadata, MetadataArray

SHOWN_ITEMS = 100
"""Maximum number of items of an array in the output of `--json`."""

SHOWN_CHARACTERS = 20_000
"""Maximum number of characters of a string in the output of `--json`; the longest chat templates have fewer."""

LONGEST_ITEM = 1000
"""Maximum bytes of a string in an array in the output of `--json`."""

ITEMS_AT_ONCE = 1 << 16
"""Number of array items in memory while an array is written."""

LONGEST_STRING = 4 << 20
"""Maximum bytes of a string of its own that `value_text` returns. No published model has one of 1 MiB."""


def text(thing: Any, indent: int | None = None) -> str:
    """Valid JSON in ASCII, so that it controls no terminal. Infinities and NaN become strings, as `finite` says."""
    return json.dumps(finite(thing), indent=indent, allow_nan=False)


def finite(thing: Any) -> Any:
    """The same, with the strings "Infinity", "-Infinity" and "NaN" in place of the numbers that JSON lacks."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return "NaN" if math.isnan(thing) else "Infinity" if thing > 0 else "-Infinity"
    if isinstance(thing, Mapping):
        return {key: finite(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [finite(item) for item in thing]
    return thing


def shortened(metadata: Metadata) -> Iterator[tuple[str, str]]:
    """Each key of the metadata, and its value as JSON. A value that is cut is an object: its beginning, and its length.

    A value that cannot be read is an object with the error.
    """
    for key, value in metadata.unread():
        try:
            shown = _shortened(value)
        except NumbaDequantError as error:
            shown = {"error": str(error)}
        yield key, text(shown)


def _shortened(value: Any) -> Any:
    if isinstance(value, MetadataArray):
        items = value.first(SHOWN_ITEMS, LONGEST_ITEM)
        return (
            items
            if len(items) == len(value) and not any(map(_may_be_cut, items))
            else {"first": items, "items": len(value)}
        )
    if isinstance(value, LongString):
        return {"first": value.read(SHOWN_CHARACTERS), "bytes": value.n_bytes}
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return {"first": value[:SHOWN_CHARACTERS], "characters": len(value)}
    return value


def _may_be_cut(item: Any) -> bool:
    return isinstance(item, str) and len(item.encode()) >= LONGEST_ITEM


def value_text(value: Any, most: int) -> str | None:
    """A whole metadata value as compact JSON, or None if that has more than `most` characters.

    Raises:
        NumbaDequantError: the file cannot be read.
    """
    if isinstance(value, MetadataArray):
        return _joined((_compact(items)[1:-1] for items in value.pieces(ITEMS_AT_ONCE)), most)
    if isinstance(value, LongString):
        if value.n_bytes > min(LONGEST_STRING, most):
            return None
        value = value.read()
    found = _compact(value)
    return found if len(found) <= most else None


def _joined(pieces: Iterable[str], most: int) -> str | None:
    parts, total = [], 2
    for piece in pieces:
        parts.append(piece)
        total += len(piece) + 1
        if total > most:
            return None
    return f"[{','.join(parts)}]"


def _compact(thing: Any) -> str:
    encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return encoder.encode(thing)
    except ValueError:  # infinities are rare, and looking for them takes longer than encoding
        return encoder.encode(finite(thing))
