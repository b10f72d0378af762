"""One lock for what happens once in a process, made for processes that fork: compiling, and importing what is slow."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

Result = TypeVar("Result")


class CompileLock:
    """A lock that the same thread may take again. A child that is forked finds it free.

    Numba, LLVM and Python's import have locks and half-built state of their own, so a fork waits until nobody compiles
    or imports under this lock: what the child inherits is then whole. If that takes more than `PATIENCE`, `is_lost` is
    true in the child, and nothing can be compiled there any more.
    """

    PATIENCE = 5.0
    """Seconds; a format takes one."""

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
        """Whether somebody compiles."""
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
    """As `functools.cache` has it."""

    misses: int
    currsize: int


class compiled_once(Generic[Result]):
    """A decorator like `functools.cache`. Threads make each value once; one that is there is found without a lock."""

    def __init__(self, make: Callable[..., Result]) -> None:
        self._make = make
        self._made: dict[Any, Result] = {}
        self._misses = 0

    def __call__(self, *arguments: Any) -> Result:
        """The value, made if it is not there."""
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
        """How many values have been made, and how many are kept."""
        return CacheInfo(self._misses, len(self._made))

    def cache_clear(self) -> None:
        """Forget all values."""
        self._made.clear()
