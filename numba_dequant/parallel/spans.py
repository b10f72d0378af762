"""Consecutive tensors of a file that all ranks gather: each rank reads an equal piece of their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from numba_dequant.gguf.tensors import TensorInfo

ALIGNMENT = 256
"""Each rank reads a multiple of so many bytes, but for what is left at the end."""

MOST_PADDING = 4096
"""Tensors with more bytes between them are not read together."""

LEAST_ALIGNMENT = 32
"""Tensors are only read together if their distances are multiples of this, so that their blocks stay aligned."""


class Place(NamedTuple):
    """Where the bytes of a tensor are: the number of its file, and the first of them."""

    file: int
    offset: int
    n_bytes: int


class Span(NamedTuple):
    """Consecutive tensors of a file, which all ranks gather.

    Attributes:
        numbers: the places of the tensors in the file.
        starts: where each of them starts, counted from the first one.
        n_bytes: the bytes of all of them, and of what is between them.
        piece: the bytes that each rank reads, but for the last ones.
    """

    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    n_bytes: int
    piece: int

    def range_of(self, rank: int) -> tuple[int, int]:
        """The first byte that a rank reads, and the number of its bytes."""
        first = min(rank * self.piece, self.n_bytes)
        return first, min(self.piece, self.n_bytes - first)


def places_of(tensors: Iterable[TensorInfo]) -> list[Place | None]:
    """The places of tensors. Those of big-endian files have none, because their bytes must be swapped by format."""
    files: dict[str, int] = {}
    return [
        Place(files.setdefault(tensor.path, len(files)), tensor.offset, tensor.n_bytes)
        if tensor.byte_order == "little"
        else None
        for tensor in tensors
    ]


def runs(places: Sequence[Place | None], numbers: Iterable[int], least_bytes: int) -> list[list[int]]:
    """The tensors with these numbers, in runs of consecutive ones that have at least so many bytes together."""
    found: list[list[int]] = []
    end: Place | None = None
    for number in numbers:
        place = places[number]
        if place is None:
            continue
        if end is None or not _follows(place, end):
            found.append([])
        found[-1].append(number)
        end = place
    return [run for run in found if sum(_known(places[number]).n_bytes for number in run) >= least_bytes]


def _follows(place: Place, before: Place) -> bool:
    gap = place.offset - before.offset - before.n_bytes
    distance = place.offset - before.offset
    return place.file == before.file and 0 <= gap <= MOST_PADDING and distance % LEAST_ALIGNMENT == 0


def _known(place: Place | None) -> Place:
    assert place is not None
    return place


def span_of(places: Sequence[Place | None], numbers: Sequence[int], count: int) -> Span:
    """The span of some tensors of a run, for so many ranks."""
    own = [_known(places[number]) for number in numbers]
    starts = tuple(place.offset - own[0].offset for place in own)
    n_bytes = starts[-1] + own[-1].n_bytes
    return Span(tuple(numbers), starts, n_bytes, -(-n_bytes // count // ALIGNMENT) * ALIGNMENT)
