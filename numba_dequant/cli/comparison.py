"""Compares two models: metadata, tensors, and values in slices."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

import numba_dequant as nd
from numba_dequant.cli.slices import stream_slices
from numba_dequant.gguf.metadata import LongString, MetadataArray
from numba_dequant.gguf.tensors import TensorInfo, TensorTable
from numba_dequant.loading.requests import cut, select_tensors

SLICE_ELEMENTS = 1 << 20
"""Number of elements that are compared at once."""

ITEMS_AT_ONCE = 1 << 16
"""Number of items of an array in the metadata that are compared at once."""


@dataclass(frozen=True)
class Entry:
    """A metadata entry that differs.

    Attributes:
        key: its key.
        a: its value in the first file, shortened for tables; None if there is none.
        b: its value in the second file.
        first_item: the index of the first item that differs, if both are arrays.
    """

    key: str
    a: str | None
    b: str | None
    first_item: int | None = None


@dataclass(frozen=True)
class Difference:
    """A tensor that differs.

    Attributes:
        name: its name.
        a: the tensor in the first file, or None if it has none.
        b: the tensor in the second file.
        what: what differs.
        error: the relative error of the values, if they were compared.
        largest: the largest difference of two values.
    """

    name: str
    a: TensorInfo | None
    b: TensorInfo | None
    what: str
    error: float | None = None
    largest: float | None = None


def selected_names(a: nd.Model, b: nd.Model, select: list[str] | None) -> list[str]:
    """The names of the tensors to compare: those of the first file, then those that only the second one has.

    Raises:
        TensorNotFoundError: a name or a glob matches no tensor of either file.
    """
    both = TensorTable({**a.tensors, **{name: b.tensors[name] for name in b.tensors if name not in a.tensors}})
    return [tensor.name for tensor in select_tensors(both, select)]


def metadata(a: nd.Model, b: nd.Model) -> list[Entry]:
    """The metadata entries that differ.

    Raises:
        NumbaDequantError: a file cannot be read.
    """
    values_a, values_b = dict(a.metadata.unread()), dict(b.metadata.unread())
    different: dict[str, int | None] = {}
    for key in dict.fromkeys((*values_a, *values_b)):
        if key not in values_a or key not in values_b:
            different[key] = None
            continue
        value_a, value_b = values_a[key], values_b[key]
        if isinstance(value_a, MetadataArray) and isinstance(value_b, MetadataArray):
            first = _first_difference(value_a, value_b)
            if first is not None:
                different[key] = first
        elif not _is_same(value_a, value_b):
            different[key] = None
    if not different:
        return []
    shown_a, shown_b = dict(a.metadata.shown()), dict(b.metadata.shown())
    return [Entry(key, shown_a.get(key), shown_b.get(key), first) for key, first in different.items()]


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal, and of one type; two NaNs are equal."""
    if isinstance(a, LongString) and isinstance(b, LongString):
        return a.n_bytes == b.n_bytes and a.read() == b.read()
    return type(a) is type(b) and (a == b or (a != a and b != b))  # noqa: PLR0124 a NaN differs from itself


def _first_difference(a: MetadataArray, b: MetadataArray) -> int | None:
    at = 0
    nothing: list[Any] = []
    for items_a, items_b in zip_longest(a.pieces(ITEMS_AT_ONCE), b.pieces(ITEMS_AT_ONCE), fillvalue=nothing):
        for index, pair in enumerate(zip_longest(items_a, items_b)):
            if not _is_same(*pair):
                return at + index
        at += len(items_a)
    return None


def tensors(a: nd.Model, b: nd.Model, names: list[str], device: str) -> Generator[Difference, None, None]:
    """The tensors that differ, in the order of `names`.

    Raises:
        NumbaDequantError: a file cannot be read, or the device cannot be used.
    """
    pairs = {name: (a.tensors.get(name), b.tensors.get(name)) for name in names}
    same_format = [
        (left, right)
        for left, right in pairs.values()
        if left is not None and right is not None and left.shape == right.shape and left.format is right.format
    ]
    same_bytes = set()
    for (left, _), slices in _slices(a, b, same_format, None, device):
        n_different = sum(not np.array_equal(x, y) for x, y in slices)
        if not n_different:
            same_bytes.add(left.name)
    to_compare = []
    for name, (left, right) in pairs.items():
        if left is not None and right is not None and left.shape == right.shape and name not in same_bytes:
            to_compare.append((left, right))
    errors = {left.name: _error(slices) for (left, _), slices in _slices(a, b, to_compare, "float32", device)}
    for name, (left, right) in pairs.items():
        if name in same_bytes:
            continue
        if left is None or right is None:
            yield Difference(name, left, right, "only in A" if right is None else "only in B")
        elif left.shape != right.shape:
            yield Difference(name, left, right, "shape" if left.format is right.format else "shape and format")
        else:
            yield Difference(name, left, right, "bytes" if left.format is right.format else "format", *errors[name])


Pair = tuple[TensorInfo, TensorInfo]
Slices = Iterator[tuple[NDArray[Any], NDArray[Any]]]


def _slices(
    a: nd.Model, b: nd.Model, pairs: list[Pair], dtype: str | None, device: str
) -> Iterator[tuple[Pair, Slices]]:
    """Each pair, and the slices of both tensors, all of which the caller must take."""
    left, right, counts = [], [], []
    for pair in pairs:
        block = math.lcm(*(tensor.format.block_size for tensor in pair))
        n_elements = max(SLICE_ELEMENTS // block, 1) * block
        parts = [cut(tensor, n_elements) for tensor in pair]
        counts.append(len(parts[0]))
        left += parts[0]
        right += parts[1]
    values = zip(stream_slices(a, left, dtype, device), stream_slices(b, right, dtype, device), strict=True)
    for pair, count in zip(pairs, counts, strict=True):
        yield pair, (next(values) for _ in range(count))


def _error(slices: Slices) -> tuple[float, float]:
    """The relative error, and the largest difference, of the second values of each slice from the first."""
    squares = difference_squares = largest = 0.0
    for left, right in slices:
        x, y = left.astype(np.float64), right.astype(np.float64)
        with np.errstate(all="ignore"):
            # Equal infinities differ by nothing, and so do two NaNs.
            difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
            difference[np.isnan(difference)] = math.inf
            squares += float(np.sum(np.square(x, where=np.isfinite(x), out=np.zeros_like(x))))
            difference_squares += float(np.sum(np.square(difference)))
        largest = max(largest, float(difference.max(initial=0.0)))
    if not difference_squares:
        return 0.0, largest
    return (math.sqrt(difference_squares / squares) if squares else math.inf), largest
