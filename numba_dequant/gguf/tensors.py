"""What the header of a GGUF model says: its tensors, and all of them together."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import eq
from typing import Any, NamedTuple

from numba_dequant import display
from numba_dequant.errors import GgufError, TensorNotFoundError, shown
from numba_dequant.format import Format
from numba_dequant.gguf.header import ByteOrder
from numba_dequant.gguf.metadata import Metadata
from numba_dequant.gguf.source import Source

MAX_COMPARED, COMPARED_NAMES, COMPARED_CHARACTERS = 50_000, 500, 200
"""Names of a table that are looked at when a name is not in it, those of them that are compared closely, and their
length: all of a hostile file's would take hours."""


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is.

    Attributes:
        name: its name.
        format: its storage format.
        shape: rows first; a file stores dimensions the other way round.
        path: the file that holds it, as it was given; ``<memory>`` for bytes in memory.
        offset: byte position of its data in that file.
        n_bytes: length of its data.
        n_elements: number of elements.
        byte_order: of its data, "little" or "big".
        source: what its bytes are read from, and what tells whether that is still the same.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    path: str
    offset: int
    n_bytes: int
    n_elements: int
    byte_order: ByteOrder
    source: Source

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
        return display.html(("tensor", display.cell(self.name)), rows)


class TensorTable(Mapping[str, TensorInfo]):
    """The tensors of a model by name, in file order."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except (KeyError, TypeError):
            near = self._near(name) if isinstance(name, str) else []
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TensorNotFoundError(f"there is no tensor {shown(name)} among {len(self)}{hint}") from None

    def _near(self, name: str) -> list[str]:
        if len(name) > COMPARED_CHARACTERS:
            return []
        names = [each for each in islice(self._tensors, MAX_COMPARED) if len(each) <= COMPARED_CHARACTERS]
        if len(names) > COMPARED_NAMES:
            # A difference in one place leaves what is before it, or what is behind it, where it was.
            backward = name[::-1]
            names = heapq.nlargest(
                COMPARED_NAMES, names, lambda each: sum(map(eq, each, name)) + sum(map(eq, each[::-1], backward))
            )
        return difflib.get_close_matches(name, names, n=3)

    def get(self, name: object, default: Any = None) -> Any:
        """The tensor of that name, or else `default`."""
        return self._tensors[name] if name in self else default  # type: ignore[index]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _repr_html_(self) -> str:
        return display.html(display.TENSOR_HEAD, display.tensor_rows(self.values()))

    def __repr__(self) -> str:
        if not self:
            return "no tensors"
        rows = display.tensor_rows(self.values())
        return display.text(display.TENSOR_HEAD, rows, display.TENSOR_SIDES, display.MAX_LINES)


@dataclass(frozen=True)
class GgufFile:
    """What the header of a model says; for a split model, `metadata` is that of the first shard.

    Attributes:
        path: the file, or the first shard, as it was given.
        version: of the format, 2 or 3.
        byte_order: "little" or "big".
        alignment: of tensor data, in bytes.
        metadata: keys and values; arrays and long strings are read when they are looked at.
        tensors: the tensors of all shards.
        shards: all files.
        n_bytes: bytes of those files up to the end of the last tensor.
        n_bytes_here: how many of them the files have.
        missing_shards: files that are not there, where that was allowed.
    """

    path: str
    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Metadata
    tensors: TensorTable
    shards: tuple[str, ...]
    n_bytes: int
    n_bytes_here: int
    missing_shards: tuple[str, ...] = ()


def truncated(tensor: TensorInfo, size: int, more: str = "") -> GgufError:
    """The error for a file of `size` bytes, which ends before a tensor does."""
    allowed = (
        f"at least {tensor.offset + tensor.n_bytes}{more}; its download looks incomplete, or it has been cut short"
    )
    field = f"tensor {tensor.name!r} data"
    return GgufError(tensor.path, field, tensor.offset, f"a file of {size} bytes", allowed)
