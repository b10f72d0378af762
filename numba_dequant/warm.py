"""Compiling ahead, on all cores: Numba compiles one function at a time in a process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from numba_dequant import native, pump
from numba_dequant.device import n_threads
from numba_dequant.formats import format_named

LARGEST_POOL = 8
"""Processes, of which each takes a second and 0.3 GB to start."""


@dataclass(frozen=True)
class NativeTask:
    """The functions of `native`: the loop that loads models to GPUs is one."""

    def run(self) -> None:
        """Compile it and keep it."""
        native.keep()


@dataclass(frozen=True)
class Task:
    """One function to compile: a kernel for GPUs of a compute capability, or else that of the CPU path."""

    format: str
    dtype: str
    capability: tuple[int, int] | None = None
    mapping: str = ""

    def run(self) -> None:
        """Compile it and keep it.

        Raises:
            DeviceError: the CUDA toolkit is missing, or does not know such GPUs.
        """
        source = format_named(self.format)
        if self.capability is None:
            from numba_dequant import cpu

            cpu.compiled(source, self.dtype)
        else:
            from numba_dequant import compiler

            compiler.cubin(source, self.dtype, self.mapping, self.capability)


def tasks(
    formats: list[str], dtypes: list[str], capabilities: list[tuple[int, int]], *, on_cpu: bool
) -> list[Task | NativeTask]:
    """What is needed for these formats and output types, for one tensor and for many."""
    found: list[Task | NativeTask] = [NativeTask()] if capabilities and pump.IS_POSSIBLE else []
    for name in formats:
        for dtype in dtypes:
            if on_cpu:
                found.append(Task(name, dtype))
            found += [Task(name, dtype, gpu, mapping) for gpu in capabilities for mapping in ("tile", "table")]
    return found


def compile_all(tasks: Sequence[Task | NativeTask]) -> Iterator[Task | NativeTask]:
    """Run the tasks, and yield each when it is done.

    Raises:
        DeviceError: as `Task.run` does; the other tasks are then given up.
    """
    n_processes = min(n_threads(), LARGEST_POOL, len(tasks))
    if n_processes < 2:
        for task in tasks:
            task.run()
            yield task
        return
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as pool:
        running = {pool.submit(task.run): task for task in tasks}
        try:
            for future in as_completed(running):
                future.result()
                yield running[future]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
