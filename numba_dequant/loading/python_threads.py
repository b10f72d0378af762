"""Reads tensors with several Python threads. Memory for reading does not grow with the model."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import ReadError
from numba_dequant.gguf.file import TensorInfo
from numba_dequant.loading.chunks import Chunk, plan_chunks, round_robin_by_disk
from numba_dequant.loading.files import OpenFiles

FORKED = "this process was forked in the middle of the load; start a new load in it"

POLL_SECONDS = 0.1
"""Seconds between progress reports while the caller waits for a tensor."""


@dataclass(frozen=True)
class Work:
    """The work on the bytes of tensors.

    Attributes:
        prepare: called once per tensor with its index, before the first `consume` for it, by one thread at a time.
        consume: called with a chunk and its bytes in the byte order of this machine, by the thread that read them.
        max_bytes: maximum size of a chunk in bytes.
    """

    prepare: Callable[[int], None]
    consume: Callable[[Chunk, NDArray[np.uint8]], None]
    max_bytes: int


class Pipeline:
    """Tensors that several threads read and that are returned in order.

    Iterating starts the threads and yields the index of each tensor when all its bytes are consumed. The threads have
    stopped when the iteration ends, also after an error or when the iterator is dropped.
    """

    def __init__(
        self,
        tensors: Sequence[TensorInfo],
        work: Work,
        n_threads: int,
        prefetch: int | None,
        on_bytes_read: Callable[[int], None],
    ) -> None:
        """Plan to read `tensors`.

        Args:
            tensors: the tensors in the order in which they are returned.
            work: the work on their bytes.
            n_threads: maximum number of threads; with 1, the thread that iterates does all the work.
            prefetch: maximum number of tensors to read ahead; None for all tensors.
            on_bytes_read: called regularly, in the thread that iterates, with the number of consumed bytes.
        """
        self._tensors, self._work = tensors, work
        # With `prefetch`, tensors are read in the order in which they are returned.
        order = range(len(tensors)) if prefetch is not None else round_robin_by_disk(tensors)
        self._chunks = plan_chunks(tensors, order, work.max_bytes, in_turn=prefetch is not None)
        self._next: Chunk | None = next(self._chunks, None)
        n_chunks = sum(tensor.n_bytes for tensor in tensors) // work.max_bytes + 1
        self._n_threads = max(1, min(n_threads, n_chunks))
        self._prefetch, self._on_bytes_read = prefetch, on_bytes_read
        self._left = [tensor.n_bytes for tensor in tensors]
        self._prepared = [False] * len(tensors)
        self._taken = self._wanted = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_over = False

    def __iter__(self) -> Generator[int, None, None]:
        self._process = os.getpid()
        if self._n_threads == 1:
            yield from self._here()
            return
        names = [f"numba_dequant reader {number}" for number in range(self._n_threads)]
        # Daemon threads, so that a program may end before the iteration does.
        threads = [threading.Thread(target=self._read, name=name, daemon=True) for name in names]
        try:
            if not self._start(threads):
                yield from self._here()
                return
            for index in range(len(self._tensors)):
                self._wait_for(index)
                self._on_bytes_read(self._taken)
                yield index
        finally:
            # At the end of Python and in a forked child the threads are gone, and one may have held the lock.
            if not sys.is_finalizing() and os.getpid() == self._process:
                with self._changed:
                    self._is_over = True
                    self._changed.notify_all()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()

    @staticmethod
    def _start(threads: list[threading.Thread]) -> bool:
        """Start as many threads as the system allows; return whether there is any."""
        for number, thread in enumerate(threads):
            try:
                thread.start()
            except RuntimeError:
                return number > 0
        return True

    def _here(self) -> Iterator[int]:
        buffer = np.empty(self._work.max_bytes, np.uint8)
        with OpenFiles() as files:
            for index in range(len(self._tensors)):
                self._check_process(index)
                self._wanted = index
                while self._left[index] and (chunk := self._claim()):
                    self._handle(chunk, buffer, files)
                    self._on_bytes_read(self._taken)
                self._ready(index)
                yield index

    def _check_process(self, index: int) -> None:
        """Raise ReadError in a forked child. It has no threads that read, and its files share their positions."""
        if os.getpid() != self._process:
            tensor = self._tensors[index]
            raise ReadError(tensor.path, tensor.name, None, FORKED)

    def _wait_for(self, index: int) -> None:
        self._check_process(index)
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
                self._changed.wait(POLL_SECONDS)
                taken = self._taken
            self._on_bytes_read(taken)

    def _read(self) -> None:
        try:
            buffer = np.empty(self._work.max_bytes, np.uint8)
            with OpenFiles() as files:
                while chunk := self._claim_in_turn():
                    self._handle(chunk, buffer, files)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._is_over = True
                self._changed.notify_all()

    def _claim_in_turn(self) -> Chunk | None:
        with self._changed:
            while not self._is_over and self._next is not None and self._is_early(self._next):
                self._changed.wait()
            return None if self._is_over else self._claim()

    def _is_early(self, chunk: Chunk) -> bool:
        return self._prefetch is not None and chunk.parts[0].index > self._wanted + self._prefetch

    def _claim(self) -> Chunk | None:
        chunk = self._next
        if chunk is not None:
            for part in chunk.parts:
                self._ready(part.index)
            self._next = next(self._chunks, None)
        return chunk

    def _ready(self, index: int) -> None:
        if not self._prepared[index]:
            self._work.prepare(index)
            self._prepared[index] = True

    def _handle(self, chunk: Chunk, buffer: NDArray[np.uint8], files: OpenFiles) -> None:
        self._work.consume(chunk, files.read(chunk, self._tensors, buffer))
        with self._changed:
            for part in chunk.parts:
                self._left[part.index] -= part.n_bytes
                self._taken += part.n_bytes
            if any(not self._left[part.index] for part in chunk.parts):
                self._changed.notify_all()
