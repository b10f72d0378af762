"""Compiles ahead of time in several processes, because Numba compiles one function at a time per process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any

from numba_dequant import disk_cache
from numba_dequant.backends import cpu
from numba_dequant.backends.devices import available_cores
from numba_dequant.errors import DeviceError
from numba_dequant.format import Format
from numba_dequant.kernels import compiler, native

MAX_POOL = 8
"""Maximum number of processes; each needs a second to start, and 0.3 GB."""


@dataclass(frozen=True)
class Task:
    """A function to compile: `work` compiles it and writes it to the cache if possible."""

    work: Callable[..., object]
    arguments: tuple[Any, ...] = ()

    def run(self) -> bool:
        """Compile; returns whether the code was cached.

        Raises:
            DeviceError: the CUDA toolkit is missing, or does not support the GPU.
        """
        n_failed = len(disk_cache.not_kept)
        self.work(*self.arguments)
        return len(disk_cache.not_kept) == n_failed


def tasks(
    formats: Sequence[Format], dtypes: list[str], capabilities: list[tuple[int, int]], *, on_cpu: bool
) -> list[Task]:
    """All functions for these formats and output types, for single tensors and for batches."""
    tasks = [Task(native.ensure_compiled)] if capabilities and sys.platform == "linux" else []
    for fmt in formats:
        for dtype in dtypes:
            if on_cpu:
                tasks.append(Task(cpu.compiled, (fmt, dtype)))
            kernels = compiler.dequantize_kernel(fmt, dtype), compiler.batch_kernel(fmt, dtype)
            tasks += [Task(compiler.cubin, (kernel, gpu)) for gpu in capabilities for kernel in kernels]
    return tasks


def compile_all(tasks: Sequence[Task]) -> Iterator[bool]:
    """Run the tasks. Yields, as each finishes, whether its code was cached.

    Raises:
        DeviceError: as for `Task.run`, or a process was killed; the remaining tasks are then cancelled.
    """
    n_processes = min(available_cores(), MAX_POOL, len(tasks))
    if n_processes < 2:
        for task in tasks:
            yield task.run()
        return
    others = set(active_children())
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        with _interrupts_blocked():
            running = [pool.submit(task.run) for task in tasks]
        try:
            for future in as_completed(running):
                yield future.result()
        except BrokenExecutor as error:
            raise DeviceError(
                "a compiling process was killed, perhaps because memory ran out; compile fewer formats at a time"
            ) from error
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A context in which new processes ignore Ctrl-C; `compile_all` terminates them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
