"""The CUDA kernels: one template over all formats, written once over `Format.decode`.

A thread block copies a tile of consecutive quant blocks to shared memory, 16 bytes a load; then each thread decodes
runs of eight elements and writes each with stores of 16 bytes. `launch_shape.py` says how large a tile is: with a tile
of one it is exactly one thread block per quant block.

`compiler.py` compiles these functions for the library's own launches. To launch one the plain Numba way, from a
notebook say, take `jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config

from numba_dequant.bits import RUN, copy_16_bytes, copy_byte, is_aligned
from numba_dequant.dtypes import OUTPUT_TYPES, dtype_name
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.kernels.launch_shape import LaunchShape, launch_shape
from numba_dequant.kernels.numba_cuda import cuda

IS_SIMULATED = bool(config.ENABLE_CUDASIM)

if not IS_SIMULATED:
    from numba_dequant.kernels import intrinsics_cuda
    from numba_dequant.kernels.intrinsics import register, register_decode

int32: Any = np.int32
int64: Any = np.int64
uint32: Any = np.uint32


def jit(format: str | Format, dtype: Any = "float16", mapping: str = "block") -> Any:
    """A kernel as a `numba.cuda` dispatcher, to launch the plain Numba way.

    Its arguments are the compressed bytes (uint8), the number of elements to write, and the output: a flat array of
    the output type, or of unsigned integers of its size for bfloat16. `launch_shape(mapping, format)` has the
    numbers of a launch:

    >>> shape = launch_shape("block", FORMATS["Q8_0"])                               # doctest: +SKIP
    >>> jit("Q8_0")[shape.thread_blocks(n), shape.threads](data, n, out)              # doctest: +SKIP
    """
    fmt = format_named(format)
    return cuda.jit(make_kernel(fmt, dtype_name(dtype), launch_shape(mapping, fmt)))


def make_kernel(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, int, Any], None]:
    """The kernel, not compiled, that turns blocks of `source` into `dtype`: ``kernel(data, n_elements, out)``."""
    write_tile = _tile_writer(fmt, dtype, mapping)

    def dequantize(data: Any, n_elements: int, out: Any) -> None:
        write_tile(data, int64(0), n_elements, out, int64(0), int64(cuda.blockIdx.x))

    return _named(dequantize, f"dequantize_{fmt.name}")


def make_batch_kernel(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, Any, int, Any], None]:
    """The kernel, not compiled, for many tensors of one format: ``kernel(data, table, n_tensors, out)``.

    `table` is that of `launch_shape.tile_directory`, flat.
    """
    write_tile = _tile_writer(fmt, dtype, mapping)
    threads = mapping.threads

    def dequantize(data: Any, table: Any, n_tensors: int, out: Any) -> None:
        tile = int64(cuda.blockIdx.x)
        # The tensor is among `count` ones from `first` on. As many of them as there are threads are looked at in one
        # step, evenly spread; those that start at or before the tile are counted.
        first, count = int64(0), int64(n_tensors)
        while count > 1:
            step = (count + (threads - 1)) // threads
            candidate = int64(cuda.threadIdx.x) * step
            starts_before = candidate < count and table[first + candidate] <= tile
            passed = (int64(cuda.syncthreads_count(int32(starts_before))) - 1) * step
            first += passed
            count = min(step, count - passed)
        write_tile(
            data, table[n_tensors + first], table[3 * n_tensors + first], out, table[2 * n_tensors + first],
            tile - table[first],
        )  # fmt: skip

    return _named(dequantize, f"dequantize_many_{fmt.name}")


def _tile_writer(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, int, int, Any, int, int], None]:
    """What one thread block does: ``write_tile(data, data_start, n_elements, out, out_start, tile)``."""
    decode, output_type = fmt.decode, OUTPUT_TYPES[dtype]
    has_pairs = fmt.block_size % (2 * RUN) == 0
    store = (has_pairs and output_type.store_in_pairs) or output_type.store
    assert decode is not None
    if IS_SIMULATED:
        decode = _quietly(decode)
    else:
        register_decode(intrinsics_cuda.target, decode)
    block_size, type_size = fmt.block_size, fmt.type_size
    runs_per_block = max(block_size // RUN, 1)
    blocks_per_run = max(RUN // block_size, 1)
    has_partial_runs = block_size % RUN != 0
    threads, runs = mapping.threads, mapping.runs
    tile_blocks = mapping.tile_elements // block_size
    wide_steps = -(-tile_blocks * type_size // (16 * threads))
    # 16 bytes more than the tile takes: a load that need not be aligned reads whole words around it.
    tile_units = (-(-tile_blocks * type_size // 16) + 1) * 16 // fmt.alignment
    unit = np.dtype(f"u{fmt.alignment}")

    def write_tile(data: Any, data_start: int, n_elements: int, out: Any, out_start: int, number: int) -> None:
        # The simulator refuses the alignment that the 16-byte copies need on a GPU; Numba drops the dead branch.
        if IS_SIMULATED:
            tile = cuda.shared.array(tile_units, unit)
        else:
            tile = cuda.shared.array(tile_units, unit, alignment=16)
        thread = int32(cuda.threadIdx.x)
        first_block = number * tile_blocks
        start = data_start + first_block * type_size
        n_bytes = int32(min(tile_blocks, n_elements // block_size - first_block)) * int32(type_size)
        n_wide = n_bytes >> 4
        if not is_aligned(data, start):
            n_wide = int32(0)
        # A fixed number of steps rather than a loop that ends early: the loads are then in flight together.
        for step in range(wide_steps):
            index = thread + int32(step * threads)
            if index < n_wide:
                copy_16_bytes(tile, index << 4, data, start + (index << 4))
        index = (n_wide << 4) + thread
        while index < n_bytes:
            copy_byte(tile, index, data, start + index)
            index += threads
        cuda.syncthreads()

        # Unsigned, so that the compiler may divide by shifting.
        for step in range(runs):
            run = uint32(thread + int32(step * threads))
            element = first_block * block_size + int64(run) * RUN
            if element < n_elements:
                at = int32(run // uint32(runs_per_block)) * int32(blocks_per_run * type_size)
                values = decode(tile, at, int32(run % uint32(runs_per_block)))
                store(out, out_start + element, values, n_elements - element if has_partial_runs else RUN)

    if not IS_SIMULATED:
        register(intrinsics_cuda.target, write_tile)
    return write_tile


def _named(kernel: Callable[..., None], name: str) -> Callable[..., None]:
    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def _quietly(decode: Callable[..., Any]) -> Callable[..., Any]:
    def without_warnings(block: Any, at: int, run: int) -> Any:
        # Infinite and NaN scales have defined results. The simulator runs each thread as a thread of Python's, which
        # does not inherit NumPy's settings.
        with np.errstate(all="ignore"):
            return decode(block, int(at), int(run))

    return without_warnings
