"""The CUDA kernels: one template for all formats, built on `Format.decode`.

A thread block copies a tile of consecutive quant blocks to shared memory with 16-byte loads. Then each thread decodes
runs of eight elements and writes each run with 16-byte stores. `launch_shape.py` sets the size of a tile; the mapping
"block" uses one quant block per thread block.

`compiler.py` compiles these functions for the library. To launch a kernel with plain Numba, use `jit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config

from numba_dequant.bits import RUN, copy_16_bytes, copy_byte, is_aligned, stop_unless
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
    """A kernel as a `numba.cuda` dispatcher, to launch with plain Numba.

    Its arguments are the compressed bytes (uint8), the number of elements to write, and the output: a flat array of
    the output type, or uint16 for bfloat16. `launch_shape(mapping, format)` gives the launch configuration:

    >>> shape = launch_shape("block", FORMATS["Q8_0"])                               # doctest: +SKIP
    >>> jit("Q8_0")[shape.thread_blocks(n), shape.threads](data, n, out)              # doctest: +SKIP
    """
    fmt = format_named(format)
    return cuda.jit(make_kernel(fmt, dtype_name(dtype), launch_shape(mapping, fmt)))


def make_kernel(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, int, Any], None]:
    """The kernel for one tensor, as a Python function: ``kernel(data, n_elements, out)``."""
    write_tile = _tile_writer(fmt, dtype, mapping)

    def dequantize(data: Any, n_elements: int, out: Any) -> None:
        write_tile(data, int64(0), n_elements, out, int64(0), int64(cuda.blockIdx.x))

    return _named(dequantize, f"dequantize_{fmt.name}")


def make_batch_kernel(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, Any, int, Any], None]:
    """The kernel for many tensors of one format, as a Python function: ``kernel(data, table, n_tensors, out)``.

    `table` is the flattened result of `launch_shape.tile_directory`.
    """
    write_tile = _tile_writer(fmt, dtype, mapping)
    threads = mapping.threads

    def dequantize(data: Any, table: Any, n_tensors: int, out: Any) -> None:
        tile = int64(cuda.blockIdx.x)
        # Search the tensor of this tile among `count` tensors from `first`. In each step, every thread checks one of
        # `threads` evenly spaced candidates, and those that start at or before the tile are counted.
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


def make_rows_kernel(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[..., None]:
    """The kernel for some rows, as a Python function: ``kernel(data, n_rows, indices, n_elements, out)``.

    The grid has two dimensions: the indices, and the thread blocks for a row of `n_elements`, which must be a multiple
    of 8. An index that is not from 0 to ``n_rows - 1`` ends the kernel with an error.
    """
    write_tile = _tile_writer(fmt, dtype, mapping)
    block_size, type_size = fmt.block_size, fmt.type_size

    def dequantize(data: Any, n_rows: int, indices: Any, n_elements: int, out: Any) -> None:
        number = int64(cuda.blockIdx.x)
        index = int64(indices[number])
        stop_unless(0 <= index < n_rows)
        start = index * (n_elements // block_size * type_size)
        write_tile(data, start, n_elements, out, number * n_elements, int64(cuda.blockIdx.y))

    return _named(dequantize, f"dequantize_rows_{fmt.name}")


def _tile_writer(fmt: Format, dtype: str, mapping: LaunchShape) -> Callable[[Any, int, int, Any, int, int], None]:
    """The work of one thread block: ``write_tile(data, data_start, n_elements, out, out_start, number)``."""
    decode, output_type = fmt.decode, OUTPUT_TYPES[dtype]
    # The last of an odd number of threads would have no partner.
    has_pairs = fmt.block_size % (2 * RUN) == 0 and mapping.threads % 2 == 0
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
    # The runs of the last threads may belong to the next tile.
    has_rest = threads * runs * RUN > mapping.tile_elements
    wide_steps = -(-tile_blocks * type_size // (16 * threads))
    # 16 extra bytes, because unaligned loads read the whole words around their bytes.
    tile_units = (-(-tile_blocks * type_size // 16) + 1) * 16 // fmt.alignment
    unit = np.dtype(f"u{fmt.alignment}")

    def write_tile(data: Any, data_start: int, n_elements: int, out: Any, out_start: int, number: int) -> None:
        # The 16-byte copies need this alignment on a GPU. The simulator refuses it; Numba prunes the dead branch.
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
        # A fixed number of steps, without an early exit, so that the loads are in flight together.
        for step in range(wide_steps):
            load = thread + int32(step * threads)
            if load < n_wide:
                copy_16_bytes(tile, load << 4, data, start + (load << 4))
        byte = (n_wide << 4) + thread
        while byte < n_bytes:
            copy_byte(tile, byte, data, start + byte)
            byte += threads
        cuda.syncthreads()

        end = n_elements
        if has_rest:
            end = min(end, (first_block + tile_blocks) * block_size)
        # Unsigned, so that the compiler can divide by shifts.
        for step in range(runs):
            run = uint32(thread + int32(step * threads))
            element = first_block * block_size + int64(run) * RUN
            if element < end:
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
        # Infinite and NaN scales have defined results. The simulator runs each CUDA thread as a Python thread, which
        # does not inherit NumPy's error settings.
        with np.errstate(all="ignore"):
            return decode(block, int(at), int(run))

    return without_warnings
