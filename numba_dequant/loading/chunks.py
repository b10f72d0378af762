"""Tensors cut into chunks, each of which is read by one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from numba_dequant.bits import RUN
from numba_dequant.format import Format
from numba_dequant.gguf.file import TensorInfo

MAX_GAP = 1 << 16
"""Bytes between two tensors that are rather read along than left out."""

ALIGNMENT = 32
"""Bytes, counted from where its tensor begins, to which every chunk is aligned."""

PAGE = 4096
"""Bytes of a file that the system reads at once: a cold file is read a tenth faster if no two threads ask for one."""


@dataclass(slots=True)
class TensorSlice:
    """Whole runs of one tensor within a chunk.

    Attributes:
        index: which tensor.
        start: byte of the tensor where the part begins.
        at: byte of the chunk where it begins.
        n_bytes: its length.
    """

    index: int
    start: int
    at: int
    n_bytes: int


@dataclass(slots=True)
class Chunk:
    """Bytes of one file that are read together: part of a large tensor, or of several that are neighbours."""

    path: str
    offset: int
    n_bytes: int = 0
    parts: list[TensorSlice] = field(default_factory=list)

    def index_at(self, offset: int) -> int:
        """Which tensor a byte of the file belongs to."""
        return next(part.index for part in reversed(self.parts) if self.offset + part.at <= offset)


def plan_chunks(
    tensors: Sequence[TensorInfo], order: Sequence[int], largest: int, *, in_turn: bool = False
) -> Iterator[Chunk]:
    """Chunks of at most `largest` bytes that cover tensors in that order; neighbours share one.

    With `in_turn` no large tensor begins in a chunk of the one before it: its memory is not needed before its turn.
    """
    chunk: Chunk | None = None
    for index in order:
        tensor = tensors[index]
        n_bytes, smallest = tensor.n_bytes, largest // 8
        first, step, grain = _ends(tensor, smallest)
        start = 0
        while start < n_bytes:
            offset = tensor.offset + start
            at = offset - chunk.offset if chunk is not None else 0
            end = n_bytes
            if start + largest - at < n_bytes:
                end = first + (start + largest - at - first) // step * step
            is_long_enough = end == n_bytes or (end - start >= smallest and not in_turn)
            if chunk is not None and not (is_long_enough and _follows(chunk, tensor.path, offset)):
                yield chunk
                chunk = None
                continue
            if chunk is None:
                end = max(end, min(start + grain, n_bytes))
                chunk = Chunk(tensor.path, offset)
            chunk.parts.append(TensorSlice(index, start, at, end - start))
            chunk.n_bytes = at + end - start
            start = end
    if chunk is not None:
        yield chunk


def _follows(chunk: Chunk, path: str, offset: int) -> bool:
    return path == chunk.path and 0 <= offset - chunk.offset - chunk.n_bytes <= MAX_GAP


def _ends(tensor: TensorInfo, longest: int) -> tuple[int, int, int]:
    """Where a part of a tensor may end: the first place, the bytes from one to the next; and the shortest part."""
    grain, common, inverse = _grain(tensor.format)
    step = grain * (PAGE // common)
    if step > longest or tensor.offset % common:
        return 0, grain, grain
    # The first multiple of the grain that lies where a page begins.
    return -(tensor.offset // common) * inverse % (PAGE // common) * grain, step, grain


@cache
def _grain(source: Format) -> tuple[int, int, int]:
    """Bytes of whose multiples parts are made, their common divisor with a page, and what solves for the first page.

    A plain array is cut between runs, everything else between blocks, and either where a wide load may begin.
    """
    grain = math.lcm(source.type_size * (RUN if source.block_size == 1 else 1), ALIGNMENT)
    common = math.gcd(grain, PAGE)
    return grain, common, pow(grain // common, -1, PAGE // common)


def round_robin_by_disk(tensors: Sequence[TensorInfo]) -> list[int]:
    """An order in which the tensors of several disks are read in turn: each is kept busy."""
    queues: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        queues.setdefault(tensor.source.stamp.device, []).append(index)
    if len(queues) == 1:
        return list(range(len(tensors)))
    # Where a queue has got to, as a share of its bytes, is when each of its tensors is due.
    due = []
    for queue in queues.values():
        total = sum(tensors[index].n_bytes for index in queue) or 1
        before = 0
        for index in queue:
            due.append((before / total, index))
            before += tensors[index].n_bytes
    return [index for _, index in sorted(due)]
