"""Compiles ahead of time in several processes, because Numba compiles one function at a time per process."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any

import numba_dequant as nd
from numba_dequant import disk_cache, display
from numba_dequant.backends import cpu, devices
from numba_dequant.backends.devices import available_cores
from numba_dequant.cli.common import add_command, fail, named_formats
from numba_dequant.dtypes import NAMES
from numba_dequant.errors import DeviceError
from numba_dequant.format import Format
from numba_dequant.kernels import compiler, native

MAX_POOL = 8
"""Maximum number of processes; each needs a second to start, and 0.3 GB."""


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "warm",
        run,
        help="compile ahead of time",
        description="Compile the code of dequantize and dequantize_many ahead of time: for the first GPU, for other "
        "GPU architectures, or for the CPU. All other kernels are compiled at their first use.",
        examples=(
            "warm --cpu --formats Q4_K,Q6_K",
            "warm --arch sm_80 --arch sm_90 --dtype bfloat16",
        ),
    )
    parser.add_argument(
        "--arch", action="append", default=[], metavar="sm_90", help="a GPU architecture; may be repeated"
    )
    parser.add_argument("--cpu", action="store_true", help="compile for the CPU")
    parser.add_argument("--formats", metavar="A,B", help="formats; default: all")
    parser.add_argument("--dtype", choices=NAMES, action="append", help="output type; may be repeated (float16)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    formats = named_formats(options.formats, [fmt for fmt in nd.FORMATS.values() if fmt.decode])
    if options.cpu and cpu.is_jit_disabled():
        return fail("NUMBA_DISABLE_JIT is set, so nothing is compiled for the CPU; unset it")
    if problem := disk_cache.problem():
        return fail(f"compiled code cannot be cached: {problem}")
    dtypes = options.dtype or ["float16"]
    capabilities = [_capability(arch) for arch in options.arch]
    if not capabilities and not options.cpu:
        problem = "the CUDA simulator does not compile" if devices.is_simulated() else devices.why_no_cuda()
        if problem:
            return fail(f"{problem}; pass --arch or --cpu")
        from numba_dequant.backends.gpu import gpu_at

        capabilities = [gpu_at(0).capability]
    from tqdm import tqdm  # every command would wait for the import

    all_tasks = tasks(formats, dtypes, capabilities, on_cpu=options.cpu)
    with tqdm(total=len(all_tasks), unit="kernel", disable=None, leave=False) as bar:
        n_kept = 0
        for is_kept in compile_all(all_tasks):
            n_kept += is_kept
            bar.update()
    if n_kept < len(all_tasks):
        return fail(
            f"{len(all_tasks) - n_kept} of {len(all_tasks)} functions were compiled, but could not be written to "
            f"{disk_cache.directory()}; check whether the disk is full"
        )
    targets = ["the CPU"] * options.cpu + [f"sm_{major}{minor}" for major, minor in capabilities]
    folder = display.printable(str(disk_cache.directory()))
    how_many = "1 format" if len(formats) == 1 else f"{len(formats)} formats"
    print(f"{how_many} to {', '.join(dtypes)} compiled for {', '.join(targets)}, in {folder}")
    return 0


def _capability(arch: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:sm_)?([0-9]{1,3})([0-9])", arch)
    if match is None:
        raise nd.DeviceError(f"unknown architecture {arch!r}; pass a name such as sm_90")
    return int(match[1]), int(match[2])


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
