"""A target for the reader that takes the place of gguf-py's: it finds the same, or fails in the same way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import structured
from breaks import broken
from choices import Choices
from common import folder

from numba_dequant.integrations.gguf_reader import GGUFReader


def read(reader: Any, path: Path) -> Any:
    """What a reader finds, or the type of its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sum of sizes that wraps around, in gguf-py's code
        try:
            found = reader(path)
        except Exception as error:  # of any type: the other must have it too
            return type(error).__name__
        return fields(found), [each(tensor) for tensor in found.tensors], found.alignment, found.byte_order


def fields(found: Any) -> list[Any]:
    """Names, places, types and contents of all fields."""
    rows = []
    for name, field in found.fields.items():
        try:
            contents = repr(field.contents())
        except Exception as error:
            contents = type(error).__name__
        parts = [part.tobytes() for part in field.parts]
        rows.append((name, field.offset, field.name, parts, list(field.data), list(field.types), contents))
    return rows


def each(tensor: Any) -> Any:
    data = np.ascontiguousarray(tensor.data)
    return tensor.name, tensor.tensor_type, tensor.shape.tolist(), tensor.n_bytes, tensor.data_offset, data.tobytes()


def readers(data: bytes) -> str:
    """Both readers, one after the other."""
    choices = Choices(data)
    described = structured.valid(choices)
    if choices.one_in(2):
        broken(choices, described)
    path = folder() / "replaced.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(described.content())
    if b"\xff" * 7 in path.read_bytes() or max(count(described)) > 1 << 12:
        return "too long"  # gguf-py makes an array of each item
    expected = read(gguf.GGUFReader, path)
    found = read(GGUFReader, path)
    assert found == expected, f"{found!r:.500} instead of {expected!r:.500}"
    return "refused" if isinstance(found, str) else "opened"


def count(described: structured.File) -> list[int]:
    """All lengths and counts of a file."""
    lengths = [described.n_tensors, described.n_entries]
    for entry in described.entries:
        lengths += [entry.length, entry.key_length]
    for tensor in described.tensors:
        lengths += [tensor.name_length, tensor.n_dimensions]
    return [length or 0 for length in lengths]
