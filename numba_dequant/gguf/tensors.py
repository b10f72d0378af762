"""The result of reading a GGUF header: tensors, the table of all tensors, the file."""

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

CUT_SHORT = "its download is incomplete, or it was truncated"

MAX_COMPARED, COMPARED_NAMES, COMPARED_CHARACTERS = 50_000, 100, 200
"""Limits of the search for similar names, against hostile files: names considered, names compared, characters."""


class TensorInfo(NamedTuple):
    """A tensor of a GGUF file: its type, its shape and where its data is.

    Attributes:
        name: the tensor name.
        format: the storage format.
        shape: rows first; the file stores the dimensions in reverse order.
        path: the file with the tensor, as the caller gave it; ``<memory>`` for bytes in memory.
        offset: byte position of the data in that file.
        n_bytes: bytes of data.
        n_elements: number of elements.
        byte_order: of the data, "little" or "big".
        source: the source of the bytes, which detects changes of the file.
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
        pairs = zip(self._fields[:-1], self, strict=False)
        texts = (f"{name}={shown(value) if isinstance(value, str) else repr(value)}" for name, value in pairs)
        return f"TensorInfo({', '.join(texts)})"

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
            hint = f"; did you mean {' or '.join(map(shown, near))}?" if near else ""
            raise TensorNotFoundError(f"there is no tensor {shown(name)} among the {len(self)} tensors{hint}") from None

    def _near(self, name: str) -> list[str]:
        if len(name) > COMPARED_CHARACTERS:
            return []
        names = [each for each in islice(self._tensors, MAX_COMPARED) if len(each) <= COMPARED_CHARACTERS]
        if len(names) > COMPARED_NAMES:
            # Those with the most characters in the same places, counted from the start and from the end.
            backward = name[::-1]
            names = heapq.nlargest(
                COMPARED_NAMES, names, lambda each: sum(map(eq, each, name)) + sum(map(eq, each[::-1], backward))
            )
        return difflib.get_close_matches(name, names, n=3)

    def get(self, name: object, default: Any = None) -> Any:
        """The tensor called `name`, or `default`."""
        return self._tensors[name] if name in self else default  # type: ignore[index]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _repr_html_(self) -> str:
        rows = display.tensor_rows(islice(self.values(), display.MAX_ROWS))
        return display.html(display.TENSOR_HEAD, rows, len(self))

    def __repr__(self) -> str:
        if not self:
            return "no tensors"
        rows = display.tensor_rows(islice(self.values(), display.MAX_LINES))
        return display.text(display.TENSOR_HEAD, rows, display.TENSOR_SIDES, len(self))


@dataclass(frozen=True)
class GgufFile:
    """The header of a model. For a split model, `metadata` is that of the first shard.

    Attributes:
        path: the file or the first shard, as the caller gave it.
        version: the GGUF version, 2 or 3.
        byte_order: "little" or "big".
        alignment: of tensor data, in bytes.
        metadata: keys and values; arrays and long strings are read on access.
        tensors: the tensors of all shards.
        shards: the paths of all files.
        n_bytes: bytes of these files up to the end of the last tensor.
        n_bytes_here: how many of these bytes exist.
        missing_shards: paths of missing shards, if `allow_truncated` was given.
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
    """The error for a file of `size` bytes that ends before the end of a tensor."""
    end = tensor.offset + tensor.n_bytes
    reason = f"the file has {size} bytes, but tensor {shown(tensor.name)} ends at byte {end}{more}: {CUT_SHORT}"
    field = f"tensor {shown(tensor.name)} data"
    return GgufError(tensor.path, field, tensor.offset, f"a file of {size} bytes", f"at least {end} bytes", reason)
