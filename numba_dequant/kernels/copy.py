"""The roof: kernels that move as many bytes as a format does, 16 at a time, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_dequant.bits import copy_16_bytes
from numba_dequant.kernels import intrinsics_cuda  # noqa: F401 teaches Numba copy_16_bytes
from numba_dequant.kernels.numba_cuda import cuda

int32: Any = np.int32
int64: Any = np.int64


def make_copy_kernel(stores: int, threads: int, stage: int = 0) -> Callable[[Any, int, Any], None]:
    """A kernel, not compiled: ``kernel(data, n_loads, out)``.

    A thread block of so many threads writes `stores` times 16 bytes a thread, for which it reads `n_loads` times 16
    bytes: straight, or by way of shared memory as the real kernels do, `stage` times 16 bytes of it.
    """
    n_stores = stores * threads
    n_units = 2 * stage

    def move(data: Any, n_loads: int, out: Any) -> None:
        tile, thread = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        for step in range(stores):
            index = thread + int32(step * threads)
            source = tile * n_loads + index * n_loads // n_stores
            copy_16_bytes(out, (tile * n_stores + index) * 16, data, source * 16)

    def move_staged(data: Any, n_loads: int, out: Any) -> None:
        tile, thread = int64(cuda.blockIdx.x), int32(cuda.threadIdx.x)
        tile_bytes = cuda.shared.array(n_units, np.uint64, alignment=16)
        index = thread
        while index < n_loads:
            copy_16_bytes(tile_bytes, index * 16, data, (tile * n_loads + index) * 16)
            index += threads
        cuda.syncthreads()
        for step in range(stores):
            index = thread + int32(step * threads)
            copy_16_bytes(out, (tile * n_stores + index) * 16, tile_bytes, index * n_loads // n_stores * 16)

    return move_staged if stage else move
