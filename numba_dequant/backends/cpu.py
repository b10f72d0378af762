"""The CPU path: `Format.decode`, compiled by Numba for this processor, on all cores that the process may use.

The compiled code runs without the interpreter lock, so Python threads share the work. It is cached on disk; Numba is
imported only to compile.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends import reference
from numba_dequant.backends.devices import available_cores
from numba_dequant.bits import RUN
from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.errors import warn_once
from numba_dequant.format import Format
from numba_dequant.formats import is_built_in, is_passed_on
from numba_dequant.kernels import native
from numba_dequant.locks import compile_lock as _lock
from numba_dequant.locks import compiled_once

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Span = Callable[[int, int, int, int], None]
"""A compiled function: address of the blocks, first step, last step (exclusive), address of the output."""

MINIMUM_SHARE = 1 << 17
"""Minimum number of elements per thread. Giving work to a thread takes 20 us."""

LARGE_SHARE = 1 << 21
"""Elements per share of large work. Up to four shares per core, so that one slow core delays less."""


def dequantize_into(
    data: NDArray[np.uint8], fmt: Format, dtype: str, out: NDArray[Any], n_shares: int | None = None
) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to `dtype`.

    The work is divided into `n_shares`; None means the fastest number. A single share is computed in this thread.
    """
    if n_shares is None and out.size < 2 * MINIMUM_SHARE:
        n_shares = 1  # asking for the number of cores takes as long as a few blocks
    elif n_shares is None:
        n_shares = max(
            1, min(available_cores(), out.size // MINIMUM_SHARE), min(4 * available_cores(), out.size // LARGE_SHARE)
        )
    if is_passed_on(fmt, dtype):
        _share(lambda first, last: pass_on(data, out, first, last), out.size, n_shares)
        return
    span = compiled(fmt, dtype)
    if span is None:
        reference.dequantize_into(data, fmt, out)
        return
    assert data.flags.c_contiguous
    assert out.flags.c_contiguous
    assert data.nbytes * fmt.block_size >= out.size * fmt.type_size
    step = max(fmt.block_size, RUN)
    n_steps, rest = divmod(out.size, step)
    data_at, out_at = data.ctypes.data, out.ctypes.data
    _share(lambda first, last: span(data_at, first, last, out_at), n_steps, n_shares)
    if rest:
        # A plain array may end within a run: its last elements are computed as a padded run.
        padded = np.zeros(RUN * fmt.type_size, np.uint8)
        padded[: rest * fmt.type_size] = data[-rest * fmt.type_size :]
        last = np.empty(RUN, out.dtype)
        span(padded.ctypes.data, 0, 1, last.ctypes.data)
        out[-rest:] = last[:rest]


def pass_on(data: NDArray[np.uint8], out: NDArray[Any], first: int, last: int) -> None:
    """Copy elements bit for bit, so that a NaN keeps its payload."""
    size = out.itemsize
    out.view(f"u{size}")[first:last] = data[first * size : last * size].view(f"<u{size}")


def _share(work: Callable[[int, int], object], n_steps: int, n_shares: int) -> None:
    """Call `work` with the first and last step of each share, on one thread per core."""
    pool = None
    if n_shares > 1:
        with suppress(RuntimeError):  # no thread can be started
            pool = _threads(os.getpid())
    if pool is None:
        work(0, n_steps)
        return
    from concurrent.futures import wait

    bounds = [n_steps * share // n_shares for share in range(n_shares + 1)]
    futures: list[Future[object]] = []
    try:
        with suppress(RuntimeError):  # Python ends the threads of pools before other threads, and before atexit
            for first, last in pairwise(bounds):
                futures.append(pool.submit(work, first, last))
        if len(futures) < n_shares:
            work(bounds[len(futures)], n_steps)
    finally:
        wait(futures)
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a fork does not copy them.

    Raises:
        RuntimeError: a thread cannot be started.
    """
    from concurrent.futures import ThreadPoolExecutor  # takes as long as a tenth of `import numba_dequant`

    n_workers = available_cores()
    pool = ThreadPoolExecutor(n_workers, "numba_dequant")
    # All threads are started now: if the pool failed to start one later, the work would stay queued.
    started = threading.Barrier(n_workers + 1)
    try:
        for _ in range(n_workers):
            pool.submit(started.wait)
        started.wait()
    except BaseException:
        started.abort()
        pool.shutdown(wait=False)
        raise
    return pool


def compiled(fmt: Format, dtype: str) -> Span | None:
    """The compiled function for a format, or None if it cannot be compiled; the reference computes the same values.

    It cannot be compiled if the user disabled Numba's JIT, if Numba cannot be imported (because NumPy is too new, for
    example), or if this process was forked during a compilation.
    """
    if not _compile.has(fmt, dtype) and (_lock.is_lost or is_jit_disabled()):
        return None
    return _compile(fmt, dtype)


def is_jit_disabled() -> bool:
    """Whether the user disabled Numba's JIT: in `numba.config` if it is imported, otherwise by NUMBA_DISABLE_JIT."""
    config = getattr(sys.modules.get("numba"), "config", None)
    if config is not None:
        return bool(getattr(config, "DISABLE_JIT", False))
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


@compiled_once
def _compile(fmt: Format, dtype: str) -> Span | None:
    store = OUTPUT_TYPES[dtype].store
    name = f"dequantize_{fmt.name}_by_{store.__name__}"
    label, is_kept = f"cpu-{fmt.name}-{dtype}", is_built_in(fmt)
    try:
        functions = native.load_functions(label, [name], lambda: [_span_function(fmt, store, name)], is_kept=is_kept)
    except ImportError as error:
        warn_once(f"numba_dequant uses the slow reference, because Numba cannot be imported ({error})")
        return None
    types = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return ctypes.CFUNCTYPE(None, *types)(functions[name])


def _span_function(fmt: Format, store_run: Callable[..., None], name: str) -> Callable[[int, int, int, int], int]:
    from numba_dequant.kernels import intrinsics_cpu
    from numba_dequant.kernels.intrinsics import register_decode
    from numba_dequant.kernels.native.intrinsics import bytes_at

    decode = fmt.decode
    assert decode is not None
    register_decode(intrinsics_cpu.target, decode)
    step = max(fmt.block_size, RUN)
    step_bytes = fmt.type_size * step // fmt.block_size
    # Up to four runs at a time: the compiler then computes only once what neighbouring runs share, above all scales.
    together = math.gcd(4, step // RUN)
    groups = step // RUN // together

    def dequantize_span(data_at: int, first: int, last: int, out_at: int) -> int:
        data, out = bytes_at(data_at), bytes_at(out_at)
        for number in range(first, last):
            for group in range(groups):
                for member in range(together):
                    run = group * together + member
                    store_run(out, number * step + run * RUN, decode(data, number * step_bytes, run), RUN)
        return 0

    dequantize_span.__name__ = dequantize_span.__qualname__ = name
    return dequantize_span
