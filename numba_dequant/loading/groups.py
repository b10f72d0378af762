"""Loads in groups: the next groups are read while the caller uses one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice, pairwise
from typing import Any, Protocol

from numba_dequant.errors import ReadError
from numba_dequant.loading.python_threads import FORKED, POLL_SECONDS
from numba_dequant.loading.requests import Request


class Groups(Protocol):
    """A load in groups. Groups are begun and finished in order, and several may have begun at a time."""

    def begin(self) -> None:
        """Begin to read the next group, without waiting for it."""

    def finish(self) -> list[Any]:
        """Wait for the first group that has not been finished, and return its results."""

    def close(self) -> None:
        """Stop reading."""


LoadGroups = Callable[[Sequence[Request], Callable[[int], None], Sequence[int]], Groups]
"""Loads requests in groups with these ends. `finish` calls a function with the number of bytes that have been read."""


class _StoppedError(Exception):
    """The load has been closed, and nobody waits for this thread."""


class GroupsOfGenerator:
    """The groups of a generator of results.

    Args:
        results: takes a function, which it calls with the number of bytes that it has read, and returns the generator.
        ends: the ends of the groups.
        on_bytes_read: as for `LoadGroups`.
        has_thread: whether a thread of its own reads. Otherwise, `finish` reads.
    """

    def __init__(
        self,
        results: Callable[[Callable[[int], None]], Generator[Any, None, None]],
        ends: Sequence[int],
        on_bytes_read: Callable[[int], None],
        *,
        has_thread: bool,
    ) -> None:
        self._sizes = iter([end - start for start, end in pairwise((0, *ends))])
        self._on_bytes_read, self._n_read = on_bytes_read, 0
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "numba_dequant load") if has_thread else None
        self._process = os.getpid()
        self._begun: list[int | Future[list[Any]]] = []
        self._results = results(self._count)

    def _count(self, n_bytes: int) -> None:
        self._n_read = n_bytes
        if self._stopped.is_set():
            raise _StoppedError
        if self._pool is None:
            self._on_bytes_read(n_bytes)

    def _read(self, size: int) -> list[Any]:
        return list(islice(self._results, size))

    def begin(self) -> None:
        """Begin to read the next group, if there is a thread for it."""
        size = next(self._sizes)
        self._begun.append(self._pool.submit(self._read, size) if self._pool is not None else size)

    def finish(self) -> list[Any]:
        """Wait for the first group that has not been finished, and return its results."""
        if os.getpid() != self._process:  # the thread does not exist in a forked child
            raise ReadError("the model", None, None, FORKED)
        group = self._begun.pop(0)
        if isinstance(group, int):
            return self._read(group)
        while not wait([group], POLL_SECONDS).done:
            self._on_bytes_read(self._n_read)
        self._on_bytes_read(self._n_read)
        return group.result()

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        self._stopped.set()
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(cancel_futures=True)
        self._results.close()


class Load(Protocol):
    """A load whose tensors are planned and finished in order."""

    def start(self) -> None:
        """Begin the load."""

    def plan(self, end: int) -> None:
        """Begin to read all tensors before number `end`."""

    def finish(self, first: int, end: int) -> list[Any]:
        """Wait for some tensors, and return their results."""

    def stop(self) -> None:
        """End the load."""


class GroupsOfLoad:
    """The groups of a `Load`. Its threads start with the first group."""

    def __init__(self, load: Load, ends: Sequence[int]) -> None:
        self._load, self._to_begin, self._to_finish = load, iter(ends), pairwise((0, *ends))
        self._has_started = False

    def begin(self) -> None:
        """Begin to read the next group."""
        if not self._has_started:
            self._load.start()
            self._has_started = True
        self._load.plan(next(self._to_begin))

    def finish(self) -> list[Any]:
        """Wait for the first group that has not been finished, and return its results."""
        return self._load.finish(*next(self._to_finish))

    def close(self) -> None:
        """Stop reading."""
        if self._has_started:
            self._load.stop()
