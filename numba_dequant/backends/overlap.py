"""Checks that outputs do not overlap other memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numba_dequant.errors import OutputError, shown


class Memory(NamedTuple):
    """A range of addresses that belongs to a tensor.

    Attributes:
        start: the first address.
        end: the address after the last byte.
        name: the name of the tensor.
        is_out: whether it is an output; otherwise it is data.
    """

    start: int
    end: int
    name: Any
    is_out: bool


def memory_of_array(array: NDArray[Any], name: Any, *, is_out: bool) -> Memory:
    """The range from the first byte of an array to its last byte."""
    start = int(array.__array_interface__["data"][0])
    if not array.size:
        return Memory(start, start, name, is_out)
    reach = [(extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True)]
    end = start + sum(max(step, 0) for step in reach) + array.itemsize
    return Memory(start + sum(min(step, 0) for step in reach), end, name, is_out)


def check_apart(memories: Iterable[Memory]) -> None:
    """Raise OutputError if an output overlaps another output or data. Data may overlap data."""
    read = written = Memory(0, 0, None, is_out=False)  # the earlier data and output with the highest end
    for memory in sorted((memory for memory in memories if memory.start < memory.end), key=lambda memory: memory.start):
        for earlier in (written, read) if memory.is_out else (written,):
            if memory.start < earlier.end:
                _refuse_overlap(earlier, memory)
        if memory.is_out:
            written = max(written, memory, key=lambda memory: memory.end)
        else:
            read = max(read, memory, key=lambda memory: memory.end)


def _refuse_overlap(first: Memory, second: Memory) -> None:
    out, other = (first, second) if first.is_out else (second, first)
    if out.name == other.name:
        raise OutputError(f"tensor {shown(out.name)}: out shares memory with the data; pass another array")
    role = "out" if other.is_out else "the data"
    raise OutputError(
        f"out of tensor {shown(out.name)} shares memory with {role} of tensor {shown(other.name)}; pass another array"
    )
