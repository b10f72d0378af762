"""The CUDA kernels: one template over all formats, written once over `Format.decode`.

A thread block copies a tile of consecutive quant blocks to shared memory, 16 bytes a load; then each thread decodes
runs of eight elements and writes each with stores of 16 bytes. The tile is the mapping's choice:

* ``"tile"``: 4096 elements, two runs a thread. This is the fast one.
* ``"block"``: one quant block, one run a thread: exactly one thread block per quant block. This is the one to read.

Nothing here compiles or launches: `runtime.py` does, and so can anyone with ``cuda.jit(function)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numba import cuda
from numba.core import config

from numba_dequant import bits
from numba_dequant.bits import copy_16_bytes, copy_byte, is_aligned
from numba_dequant.format import RUN, Format

Mapping: TypeAlias = Literal["tile", "block"]

MAPPINGS: tuple[Mapping, ...] = ("tile", "block")
TILE_THREADS = 256
TILE_RUNS = 2
"""Runs per thread of the tile mapping, a tile's stride apart so that neighbouring threads store side by side."""

SIMULATED = bool(config.ENABLE_CUDASIM)

STORES: dict[str, Callable[..., None]] = {
    "float16": bits.store_float16,
    "bfloat16": bits.store_bfloat16,
    "float32": bits.store_float32,
}


@dataclass(frozen=True)
class Kernel:
    """A kernel function, not compiled, and how to launch it.

    Attributes:
        function: ``function(data, n_elements, out)``: compressed bytes, elements to write, output.
        tile_elements: elements that one thread block writes.
        threads: threads per thread block.
    """

    function: Callable[[Any, int, Any], None]
    tile_elements: int
    threads: int

    def n_thread_blocks(self, n_elements: int) -> int:
        """Thread blocks that cover `n_elements`."""
        return -(-n_elements // self.tile_elements)


def make_kernel(source: Format, dtype: str, mapping: Mapping = "tile") -> Kernel:
    """The kernel that turns blocks of `source` into `dtype` ("float16", "bfloat16", "float32")."""
    if mapping == "block":
        runs_per_thread = 1
        tile_elements = max(source.block_size, RUN)
    else:
        runs_per_thread = TILE_RUNS
        tile_elements = -(-TILE_THREADS * TILE_RUNS * RUN // source.block_size) * source.block_size
    threads = -(-tile_elements // (RUN * runs_per_thread))
    function = _tile_function(source, STORES[dtype], tile_elements, threads, runs_per_thread)
    function.__name__ = f"dequantize_{source.name}_to_{dtype}_by_{mapping}"
    return Kernel(function, tile_elements, threads)


def _tile_function(
    source: Format, store: Callable[..., None], tile_elements: int, threads: int, runs_per_thread: int
) -> Callable[[Any, int, Any], None]:
    decode = source.decode
    assert decode is not None
    block_size = source.block_size
    type_size = source.type_size
    runs_per_block = max(block_size // RUN, 1)
    blocks_per_run = max(RUN // block_size, 1)
    has_partial_runs = block_size % RUN != 0
    tile_blocks = tile_elements // block_size
    unit = np.dtype(f"u{source.alignment}")
    wide_steps = -(-tile_blocks * type_size // (16 * threads))
    tile_units = -(-tile_blocks * type_size // 16) * 16 // source.alignment
    is_simulated = SIMULATED

    def dequantize_tile(data: Any, n_elements: int, out: Any) -> None:
        if is_simulated:
            tile = cuda.shared.array(tile_units, unit)
        else:
            tile = cuda.shared.array(tile_units, unit, alignment=16)
        thread = np.int32(cuda.threadIdx.x)
        first_block = np.int64(cuda.blockIdx.x) * tile_blocks
        start = first_block * type_size
        n_bytes = np.int32(min(tile_blocks, n_elements // block_size - first_block)) * np.int32(type_size)
        n_wide = n_bytes >> 4
        if not is_aligned(data, start):
            n_wide = np.int32(0)
        for step in range(wide_steps):
            index = thread + np.int32(step * threads)
            if index < n_wide:
                copy_16_bytes(tile, index << 4, data, start + (index << 4))
        index = (n_wide << 4) + thread
        while index < n_bytes:
            copy_byte(tile, index, data, start + index)
            index += threads
        cuda.syncthreads()

        first_element = first_block * block_size
        for step in range(runs_per_thread):
            run = np.uint32(thread + np.int32(step * threads))
            element = first_element + np.int64(run) * RUN
            if element < n_elements:
                block = np.int32(run // np.uint32(runs_per_block)) * np.int32(blocks_per_run)
                values = decode(tile, block * np.int32(type_size), np.int32(run % np.uint32(runs_per_block)))
                store(out, element, values, n_elements - element if has_partial_runs else RUN)

    return dequantize_tile
