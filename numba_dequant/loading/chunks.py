"""Chunks: ranges of a file, each of which is read by one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from numba_dequant.bits import RUN
from numba_dequant.format import Format
from numba_dequant.gguf.file import TensorInfo

MAX_GAP = 1 << 16
"""Maximum gap in bytes between two tensors of a chunk. The gap is read too."""

ALIGNMENT = 32
"""Alignment in bytes of every chunk, relative to the start of its tensor."""

PAGE = 4096
"""Page size of the file cache. Reading a cold file is 10 % faster if two threads never need the same page."""


@dataclass(slots=True)
class TensorSlice:
    """Part of a tensor within a chunk.

    Attributes:
        index: the index of the tensor.
        start: byte position of the part in the tensor.
        at: byte position of the part in the chunk.
        n_bytes: the size of the part.
    """

    index: int
    start: int
    at: int
    n_bytes: int


@dataclass(slots=True)
class Chunk:
    """A range of a file that is read at once: part of a large tensor, or several neighbouring tensors."""

    path: str
    offset: int
    n_bytes: int = 0
    parts: list[TensorSlice] = field(default_factory=list)

    def index_at(self, offset: int) -> int:
        """The index of the tensor that contains a byte of the file."""
        return next(part.index for part in reversed(self.parts) if self.offset + part.at <= offset)


def plan_chunks(
    tensors: Sequence[TensorInfo], order: Sequence[int], largest: int, *, in_turn: bool = False
) -> Iterator[Chunk]:
    """Chunks of at most `largest` bytes for tensors in `order`; neighbouring tensors share a chunk.

    With `in_turn`, a tensor that does not fit in the rest of a chunk begins a new chunk, so that its memory is needed
    later.
    """
    chunk: Chunk | None = None
    for index in order:
        tensor = tensors[index]
        n_bytes, smallest = tensor.n_bytes, largest // 8
        first, step, grain = _ends(tensor, largest)
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
    at = offset - chunk.offset
    # Rows of a tensor may start anywhere, but kernels read aligned data faster.
    return path == chunk.path and 0 <= at - chunk.n_bytes <= MAX_GAP and at % 16 == 0


def _ends(tensor: TensorInfo, largest: int) -> tuple[int, int, int]:
    """Where a part of a tensor may end (first position, distance to the next), and the size of the shortest part."""
    grain, common, inverse = _grain(tensor.format)
    if grain > largest:  # large blocks of an odd size are not aligned
        grain = tensor.format.type_size
        return 0, grain, grain
    step = grain * (PAGE // common)
    if step > largest // 8 or tensor.offset % common:
        return 0, grain, grain
    # The first multiple of the grain at the start of a page.
    return -(tensor.offset // common) * inverse % (PAGE // common) * grain, step, grain


@cache
def _grain(fmt: Format) -> tuple[int, int, int]:
    """The grain, its greatest common divisor with `PAGE`, and an inverse.

    Parts of a tensor end at multiples of the grain. A plain array is divided between runs, other formats between
    blocks; both at a multiple of `ALIGNMENT`. The inverse is that of ``grain // divisor`` modulo ``PAGE // divisor``.
    """
    grain = math.lcm(fmt.type_size * (RUN if fmt.block_size == 1 else 1), ALIGNMENT)
    common = math.gcd(grain, PAGE)
    return grain, common, pow(grain // common, -1, PAGE // common)


def round_robin_by_disk(tensors: Sequence[TensorInfo]) -> list[int]:
    """An order of tensors that keeps all disks busy, if the files are on several disks."""
    queues: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        queues.setdefault(tensor.source.stamp.device, []).append(index)
    if len(queues) == 1:
        return list(range(len(tensors)))
    # Each tensor is due at its position within the bytes of its queue, as a fraction.
    due = []
    for queue in queues.values():
        total = sum(tensors[index].n_bytes for index in queue) or 1
        before = 0
        for index in queue:
            due.append((before / total, index))
            before += tensors[index].n_bytes
    return [index for _, index in sorted(due)]
