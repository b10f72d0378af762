"""Whether memory that is written overlaps memory that is read or written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numba_dequant.errors import OutputError, shown


class Memory(NamedTuple):
    """A piece of memory that belongs to a tensor.

    Attributes:
        start: its first address.
        end: the address behind it.
        name: of the tensor.
        is_out: whether it is written to.
    """

    start: int
    end: int
    name: Any
    is_out: bool


def memory_of_array(array: NDArray[Any], name: Any, *, is_out: bool) -> Memory:
    """From the first byte of an array to its last."""
    start = int(array.__array_interface__["data"][0])
    if not array.size:
        return Memory(start, start, name, is_out)
    reach = [(extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True)]
    end = start + sum(max(step, 0) for step in reach) + array.itemsize
    return Memory(start + sum(min(step, 0) for step in reach), end, name, is_out)


def check_apart(pieces: Iterable[Memory]) -> None:
    """Check that nothing is written where something else is read or written; data may share memory with data.

    Raises:
        OutputError: it is.
    """
    read = written = Memory(0, 0, None, is_out=False)  # of what has been seen, that which reaches furthest
    for piece in sorted((piece for piece in pieces if piece.start < piece.end), key=lambda piece: piece.start):
        for earlier in (written, read) if piece.is_out else (written,):
            if piece.start < earlier.end:
                _refuse_overlap(earlier, piece)
        if piece.is_out:
            written = max(written, piece, key=lambda piece: piece.end)
        else:
            read = max(read, piece, key=lambda piece: piece.end)


def _refuse_overlap(first: Memory, second: Memory) -> None:
    out, other = (first, second) if first.is_out else (second, first)
    what = "out" if other.is_out else "the data"
    if out.name == other.name:
        raise OutputError(f"tensor {shown(out.name)}: out shares memory with the data")
    raise OutputError(f"out of tensor {shown(out.name)} shares memory with {what} of tensor {shown(other.name)}")
