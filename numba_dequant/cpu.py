"""The CPU path: `Format.decode`, compiled by Numba for this processor, on every core that the process may use.

The compiled code does not hold the interpreter lock, so plain threads share the work; it is kept on disk.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import njit, types
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numpy.typing import NDArray

from numba_dequant import bits, lowering_cpu, store
from numba_dequant.bits import RUN
from numba_dequant.device import n_threads
from numba_dequant.format import Format
from numba_dequant.lowering import register_decode

Span = Callable[[Any, int, int, Any], None]

MINIMUM_SHARE = 1 << 17
"""Fewest elements worth handing to another thread, which takes 20 us."""

LARGE_SHARE = 1 << 21
"""Elements beyond which a thread gets several shares, up to four, so that one that is held up does not delay all."""

STORES = {"float16": bits.store_float16, "bfloat16": bits.store_bfloat16, "float32": bits.store_float32}

_lock = threading.Lock()


def dequantize_into(
    data: NDArray[np.uint8], source: Format, dtype: str, out: NDArray[Any], n_shares: int | None = None
) -> None:
    """Write the values of `data` (whole blocks) to the flat array `out`, rounded once to `dtype`.

    The work is cut in `n_shares`, as many as is quickest without it; one share is computed in this thread.
    """
    if n_shares is None:
        n_shares = max(1, min(n_threads(), out.size // MINIMUM_SHARE), min(4 * n_threads(), out.size // LARGE_SHARE))
    span = compiled(source, dtype)
    stored = out.view(f"u{out.itemsize}")
    step = max(source.block_size, RUN)
    n_steps, rest = divmod(out.size, step)
    bounds = [n_steps * share // n_shares for share in range(n_shares + 1)]
    if n_shares == 1:
        span(data, 0, n_steps, stored)
    else:
        list(
            _threads(os.getpid()).map(
                lambda share: span(data, bounds[share], bounds[share + 1], stored), range(n_shares)
            )
        )
    if rest:
        # A plain array need not end on a whole run: its last elements get one of their own.
        padded = np.zeros(RUN * source.type_size, np.uint8)
        padded[: rest * source.type_size] = data[-rest * source.type_size :]
        last = np.empty(RUN, stored.dtype)
        span(padded, 0, 1, last)
        stored[-rest:] = last[:rest]


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(n_threads(), "numba_dequant")


def compiled(source: Format, dtype: str) -> Span:
    """The compiled function that writes a span of blocks, from disk if it has been compiled before."""
    with _lock:
        return _compile(source, dtype)


@cache
def _compile(source: Format, dtype: str) -> Span:
    assert source.decode is not None
    register_decode(lowering_cpu.target, source.decode)
    stored = types.uint32 if dtype == "float32" else types.uint16
    signature = types.void(types.Array(types.uint8, 1, "C", readonly=True), types.int64, types.int64, stored[::1])
    dispatcher = njit(nogil=True)(_span_function(source, STORES[dtype]))
    if source.decode.__module__.startswith("numba_dequant."):
        dispatcher._cache = _DiskCache(source, dtype)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


def _span_function(source: Format, store_run: Callable[..., None]) -> Span:
    decode = source.decode
    assert decode is not None
    step = max(source.block_size, RUN)
    step_bytes = source.type_size * step // source.block_size
    # Four runs at a time, so that the compiler works out only once what neighbouring runs share, above all scales.
    together = min(4, step // RUN)
    groups = step // RUN // together

    def dequantize_span(data: Any, first: int, last: int, out: Any) -> None:
        for index in range(first, last):
            for group in range(groups):
                for member in range(together):
                    run = group * together + member
                    store_run(out, index * step + run * RUN, decode(data, index * step_bytes, run), RUN)

    # Code from disk is linked by name with code compiled here: no two functions may share one.
    dequantize_span.__name__ = dequantize_span.__qualname__ = f"dequantize_{source.name}_by_{store_run.__name__}"
    return dequantize_span


class _DiskCache(_Cache):  # type: ignore[misc]
    """What Numba asks of a function's cache, over `store`.

    Numba's own file cache watches the one source file that a function stands in; ours is made from several.
    """

    def __init__(self, source: Format, dtype: str) -> None:
        self._label = f"cpu-{source.name}-{dtype}"

    def _entry(self, context: Any, signature: Any) -> str:
        versions = (numba.__version__, llvmlite.__version__, np.__version__)
        return store.entry_name(self._label, *versions, context.codegen().magic_tuple(), signature)

    @property
    def cache_path(self) -> str:
        return str(store.directory())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        payload = store.read(self._entry(target_context, sig))
        if payload is None:
            return None
        target_context.refresh()
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(payload))  # noqa: S301 the user's own cache directory
        except Exception:
            return None  # Whatever is wrong with an entry, compiling anew mends it.

    def save_overload(self, sig: Any, data: Any) -> None:
        store.write(self._entry(data.target_context, data.signature), dumps(data._reduce()))

    def enable(self) -> None:
        pass

    def disable(self) -> None:
        pass

    def flush(self) -> None:
        pass
