"""Reading the bytes of tensors in pieces, on several threads, in memory that does not grow with the model.

What becomes of the bytes is the business of a `Worker`, one a thread: it has the memory to read to, and takes each
piece when it has been read. Files are read, not mapped: a file cut short under a map would end the process.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from io import RawIOBase
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import RUN
from numba_dequant.errors import ReadError
from numba_dequant.format import Format
from numba_dequant.gguf_file import TensorInfo, truncated
from numba_dequant.gguf_header import stamp_of

LARGEST_GAP = 1 << 16
"""Bytes between two tensors that are rather read along than left out."""

ALIGNMENT = 32
"""Bytes, counted from where its tensor begins, to which every piece is aligned."""

PAGE = 4096
"""Bytes of a file that the system reads at once: a cold file is read a tenth faster if no two threads ask for one."""

PATIENCE = 0.1
"""Seconds after which who waits for a tensor looks how far it has got."""


@dataclass(slots=True)
class Part:
    """Whole runs of one tensor within a piece.

    Attributes:
        index: which tensor.
        start: byte of the tensor where the part begins.
        at: byte of the piece where it begins.
        n_bytes: its length.
    """

    index: int
    start: int
    at: int
    n_bytes: int


@dataclass(slots=True)
class Piece:
    """Bytes of one file that are read together: part of a large tensor, or several small ones."""

    path: str
    offset: int
    n_bytes: int = 0
    parts: list[Part] = field(default_factory=list)


class Worker(Protocol):
    """What a thread does with pieces."""

    def room(self) -> NDArray[np.uint8]:
        """Memory that the next piece may be read to."""

    def take(self, piece: Piece, data: NDArray[np.uint8]) -> None:
        """A piece that has been read to the start of that memory, in this machine's byte order."""


class Sink(Protocol):
    """Where the bytes of tensors go."""

    def prepare(self, index: int) -> None:
        """Get ready for a tensor: called before any of its bytes are taken, once, and never twice at a time."""

    def worker(self) -> Worker:
        """What one more thread does with pieces: called in that thread."""


def cut(tensors: Sequence[TensorInfo], order: Sequence[int], largest: int) -> Iterator[Piece]:
    """Pieces of at most `largest` bytes that cover tensors in that order; neighbours share one."""
    piece: Piece | None = None
    for index in order:
        tensor = tensors[index]
        n_bytes, smallest = tensor.n_bytes, largest // 8
        first, step, grain = _ends(tensor, smallest)
        start = 0
        while start < n_bytes:
            offset = tensor.offset + start
            at = offset - piece.offset if piece is not None else 0
            end = n_bytes
            if start + largest - at < n_bytes:
                end = first + (start + largest - at - first) // step * step
            is_long_enough = end == n_bytes or end - start >= smallest
            if piece is not None and not (is_long_enough and _follows(piece, tensor.path, offset)):
                yield piece
                piece = None
                continue
            if piece is None:
                end = max(end, min(start + grain, n_bytes))
                piece = Piece(tensor.path, offset)
            piece.parts.append(Part(index, start, at, end - start))
            piece.n_bytes = at + end - start
            start = end
    if piece is not None:
        yield piece


def _follows(piece: Piece, path: str, offset: int) -> bool:
    return path == piece.path and 0 <= offset - piece.offset - piece.n_bytes <= LARGEST_GAP


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


class Files:
    """The files that one thread has open, each as it was when its header was read."""

    def __init__(self) -> None:
        self._open: dict[str, RawIOBase] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, piece: Piece, tensors: Sequence[TensorInfo], room: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Read a piece to the start of `room`.

        Raises:
            ReadError: the file cannot be read, or has changed since it was opened.
            GgufError: the file ends before the tensor does.
        """
        first = tensors[piece.parts[0].index]
        data = room[: piece.n_bytes]
        try:
            file = self._open.get(piece.path)
            if file is None:
                file = self._open[piece.path] = self._stack.enter_context(open_unchanged(first))
            count = read_into(file, data, piece.offset)
        except ReadError:
            raise
        except OSError as error:
            raise read_error(first, piece.offset, error) from error
        if count < piece.n_bytes:
            raise truncated(next(tensors[p.index] for p in piece.parts if p.at + p.n_bytes > count))
        check_unchanged(first, file)
        for part in piece.parts:
            if tensors[part.index].byte_order == "big":
                swap_bytes(data[part.at : part.at + part.n_bytes], tensors[part.index])
        return data


def open_unchanged(tensor: TensorInfo) -> RawIOBase:
    """The file of a tensor, to be read.

    Raises:
        ReadError: it has changed since its header was read.
        OSError: it cannot be opened.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(tensor.path, "rb", buffering=0))
        check_unchanged(tensor, file)
        stack.pop_all()
    return file


def check_unchanged(tensor: TensorInfo, file: RawIOBase) -> None:
    """Check that a file is the one whose header was read, and has not been written to.

    Raises:
        GgufError: it is shorter than it was, and ends before the tensor does.
        ReadError: it is another, or has changed.
    """
    stamp = stamp_of(file.fileno())
    if not stamp.is_unchanged(tensor.stamp):
        if stamp.is_same_file(tensor.stamp) and stamp.size < tensor.offset + tensor.n_bytes:
            raise truncated(tensor)
        raise ReadError(tensor.path, tensor.name, tensor.offset, "it has changed since it was opened; open it anew")


def read_into(file: RawIOBase, data: NDArray[np.uint8], offset: int) -> int:
    """Fill `data` with the bytes from `offset` on; the result is how many there were."""
    file.seek(offset)
    done = 0
    while done < len(data):
        count = file.readinto(data[done:].data)
        if not count:
            break
        done += count
    return done


def read_error(tensor: TensorInfo, offset: int, error: OSError) -> ReadError:
    """The error for a file that cannot be read."""
    reason = f"{error.strerror or error}; check the disk, or copy the file anew"
    return ReadError(tensor.path, tensor.name, offset, reason)


def swap_bytes(data: NDArray[np.uint8], tensor: TensorInfo) -> None:
    """Turn blocks of the other byte order into blocks of this machine's, where they are."""
    layout = tensor.format.layout
    data.view(layout)[:] = data.view(layout.newbyteorder(">")).astype(layout)


class Pipeline:
    """Tensors read by several workers at once, and handed out in order.

    Iterating yields the index of each tensor once all its bytes have been taken. It starts the threads, and whichever
    way it ends (also when the iterator is dropped), they have stopped by then.
    """

    def __init__(
        self,
        tensors: Sequence[TensorInfo],
        sink: Sink,
        largest: int,
        n_threads: int,
        prefetch: int | None,
        watch: Callable[[int], None],
    ) -> None:
        """Plan to read `tensors`.

        Args:
            tensors: in the order in which they are handed out.
            sink: where their bytes go.
            largest: bytes of a piece at most.
            n_threads: how many at most; with one, all is done in the thread that iterates.
            prefetch: tensors that may be read ahead of the one that was handed out last; None for all.
            watch: is called now and then, in the thread that iterates, with the number of bytes taken so far.
        """
        self._tensors, self._sink = tensors, sink
        # An order other than that of handing out would have the first tensor wait for one that is not due.
        order = range(len(tensors)) if prefetch is not None else interleaved(tensors)
        self._pieces = cut(tensors, order, largest)
        self._next: Piece | None = next(self._pieces, None)
        n_pieces = sum(tensor.n_bytes for tensor in tensors) // largest + 1
        self._n_threads = max(1, min(n_threads, n_pieces))
        self._prefetch, self._watch = prefetch, watch
        self._left = [tensor.n_bytes for tensor in tensors]
        self._prepared = [False] * len(tensors)
        self._taken = self._wanted = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_over = False

    def __iter__(self) -> Generator[int, None, None]:
        if self._n_threads == 1:
            yield from self._here()
            return
        names = [f"numba_dequant reader {number}" for number in range(self._n_threads)]
        # Daemons, so that a program may end with an iterator that it has not finished.
        threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        try:
            for thread in threads:
                thread.start()
            for index in range(len(self._tensors)):
                self._wait_for(index)
                self._watch(self._taken)
                yield index
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()

    def _here(self) -> Iterator[int]:
        worker = self._sink.worker()
        with Files() as files:
            for index in range(len(self._tensors)):
                self._wanted = index
                while self._left[index] and (piece := self._claim()):
                    self._handle(piece, worker, files)
                    self._watch(self._taken)
                self._ready(index)
                yield index

    def _wait_for(self, index: int) -> None:
        with self._changed:
            self._wanted = index
            self._ready(index)
            self._changed.notify_all()
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if not self._left[index]:
                    return
                self._changed.wait(PATIENCE)
                taken = self._taken
            self._watch(taken)

    def _work(self) -> None:
        try:
            worker = self._sink.worker()
            with Files() as files:
                while piece := self._claim_in_turn():
                    self._handle(piece, worker, files)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._is_over = True
                self._changed.notify_all()

    def _claim_in_turn(self) -> Piece | None:
        with self._changed:
            while not self._is_over and self._next is not None and self._is_early(self._next):
                self._changed.wait()
            return None if self._is_over else self._claim()

    def _is_early(self, piece: Piece) -> bool:
        return self._prefetch is not None and piece.parts[0].index > self._wanted + self._prefetch

    def _claim(self) -> Piece | None:
        piece = self._next
        if piece is not None:
            for part in piece.parts:
                self._ready(part.index)
            self._next = next(self._pieces, None)
        return piece

    def _ready(self, index: int) -> None:
        if not self._prepared[index]:
            self._sink.prepare(index)
            self._prepared[index] = True

    def _handle(self, piece: Piece, worker: Worker, files: Files) -> None:
        worker.take(piece, files.read(piece, self._tensors, worker.room()))
        with self._changed:
            for part in piece.parts:
                self._left[part.index] -= part.n_bytes
                self._taken += part.n_bytes
            if any(not self._left[part.index] for part in piece.parts):
                self._changed.notify_all()


def interleaved(tensors: Sequence[TensorInfo]) -> list[int]:
    """An order in which the tensors of several disks are read in turn: each is kept busy."""
    queues: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        queues.setdefault(tensor.stamp.disk, []).append(index)
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
