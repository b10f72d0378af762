"""The memory roofline: kernels that copy or read as many bytes as others, 16 per access, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_dequant.bits import copy_16_bytes
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.numba_cuda import cuda

if not IS_SIMULATED:
    from numba_dequant.kernels import intrinsics_cuda  # noqa: F401 registers copy_16_bytes with Numba

int32: Any = np.int32
int64: Any = np.int64


def make_copy_kernel(stores: int, threads: int, stage: int = 0) -> Callable[[Any, int, Any], None]:
    """A copy kernel as a Python function: ``kernel(data, n_loads, out)``.

    Each of the `threads` threads of a thread block writes `stores` times 16 bytes. The block reads `n_loads` times 16
    bytes: directly if `stage` is 0, otherwise through `stage` times 16 bytes of shared memory, like other kernels.
    """
    n_stores = stores * threads
    n_units = 2 * stage

    def move(data: Any, n_loads: int, out: Any) -> None:
        tile, thread = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        for step in range(stores):
            unit = thread + int32(step * threads)
            load = tile * n_loads + unit * n_loads // n_stores
            copy_16_bytes(out, (tile * n_stores + unit) * 16, data, load * 16)

    def move_staged(data: Any, n_loads: int, out: Any) -> None:
        tile, thread = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        tile_bytes = cuda.shared.array(n_units, np.uint64, alignment=16)
        unit = thread
        while unit < n_loads:
            copy_16_bytes(tile_bytes, unit * 16, data, (tile * n_loads + unit) * 16)
            unit += threads
        cuda.syncthreads()
        for step in range(stores):
            unit = thread + int32(step * threads)
            copy_16_bytes(out, (tile * n_stores + unit) * 16, tile_bytes, unit * n_loads // n_stores * 16)

    return move_staged if stage else move


READS = 4
"""Independent loads of a thread in each step of the read kernel."""


def make_read_kernel(threads: int) -> Callable[[Any, int, int, Any], None]:
    """A read kernel as a Python function: ``kernel(data, n_loads, value, out)``.

    All thread blocks, of `threads` threads each, read `n_loads` times 16 bytes together. A thread combines what it
    reads by exclusive or. If the result is `value`, it sets the first byte of `out`. Otherwise it writes nothing. The
    caller chooses a `value` that does not occur. The compiler does not know that, and keeps the loads.
    """
    n_words = 2 * READS

    def read(data: Any, n_loads: int, value: int, out: Any) -> None:
        step = int64(cuda.gridDim.x) * threads
        load = int64(cuda.blockIdx.x) * threads + int64(cuda.threadIdx.x)
        words = cuda.local.array(n_words, np.int64, alignment=16)
        found = int64(0)
        while load + (READS - 1) * step < n_loads:
            for number in range(READS):
                copy_16_bytes(words, number * 16, data, (load + number * step) * 16)
            for word in range(n_words):
                found ^= words[word]
            load += READS * step
        for _ in range(READS - 1):
            if load < n_loads:
                copy_16_bytes(words, 0, data, load * 16)
                found ^= words[0] ^ words[1]
            load += step
        if found == value:
            out[0] = 1

    return read
