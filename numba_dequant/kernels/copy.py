"""The memory roofline: kernels that copy as many bytes as a format moves, 16 per access, and compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_dequant.bits import copy_16_bytes
from numba_dequant.kernels import intrinsics_cuda  # noqa: F401 registers copy_16_bytes with Numba
from numba_dequant.kernels.numba_cuda import cuda

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
