"""A fork-safe lock for compiling and for slow imports."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

Result = TypeVar("Result")


class CompileLock:
    """A reentrant lock that is free in a forked child.

    Numba, LLVM and Python's import system have locks and partial state of their own. A fork therefore waits until no
    thread compiles or imports under this lock. If it waits longer than `PATIENCE`, `is_lost` is True in the child, and
    the child cannot compile.
    """

    PATIENCE = 5.0
    """Maximum number of seconds that a fork waits. Compiling one format takes about one second."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._is_held_by_fork = False
        self.is_lost = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
            )

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        self._lock.release()

    def locked(self) -> bool:
        """Whether a thread holds the lock."""
        return self._depth > 0

    def _before_fork(self) -> None:
        self._is_held_by_fork = self._lock.acquire(timeout=self.PATIENCE)

    def _after_fork(self) -> None:
        if self._is_held_by_fork:
            self._lock.release()

    def _after_fork_in_child(self) -> None:
        if self._is_held_by_fork:
            self._lock.release()
        else:
            self._lock, self._depth, self.is_lost = threading.RLock(), 0, True


compile_lock = CompileLock()


class CacheInfo(NamedTuple):
    """The statistics of `compiled_once`."""

    misses: int
    currsize: int


class compiled_once(Generic[Result]):
    """A decorator like `functools.cache`. Each value is made once, under `compile_lock`; lookups take no lock."""

    def __init__(self, make: Callable[..., Result]) -> None:
        self._make = make
        self._made: dict[Any, Result] = {}
        self._misses = 0

    def __call__(self, *arguments: Any) -> Result:
        """The value for these arguments, made on the first call."""
        try:
            return self._made[arguments]
        except KeyError:
            pass
        with compile_lock:
            if arguments not in self._made:
                self._misses += 1
                self._made[arguments] = self._make(*arguments)
            return self._made[arguments]

    def has(self, *arguments: Any) -> bool:
        """Whether the value has been made."""
        return arguments in self._made

    def cache_info(self) -> CacheInfo:
        """How many values were made, and how many are cached."""
        return CacheInfo(self._misses, len(self._made))

    def cache_clear(self) -> None:
        """Forget all values."""
        self._made.clear()
