"""Products of compressed weights and up to 32 columns, on the tensor cores.

``out[c, r] = sum over k of weight[r, k] * x[c, k]``. The weights are read once, and dequantized weights are not stored.

A tile is 16 rows of weights. The warps of a thread block share it: each takes every n-th chunk of 256 or 512 elements.
A warp copies a chunk to shared memory while it computes an earlier one. Its 32 threads convert the bytes to small
float16 numbers, which is exact for most formats, and the tensor cores multiply these with the columns. The scale of a
block multiplies the float32 results. At the end of a tile, the results of the warps are added in a fixed order, so that
they are the same in each run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant.bits import bf16, half, load_u16, load_u32, single
from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.format import Format
from numba_dequant.halves import (
    address_of,
    copy_pieces,
    copy_pieces_or_zeros,
    copy_to_tile,
    end_group,
    item,
    let_next_kernel_start,
    no_sums_8,
    no_sums_16,
    no_sums_32,
    repeated,
    synchronize_warp,
    wait_for_earlier_kernels,
    wait_for_groups,
)
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.numba_cuda import cuda
from numba_dequant.kernels.product_columns import chunk_preparer, column_preparer
from numba_dequant.kernels.product_of_part import factors_of, product_of_part, register_functions
from numba_dequant.kernels.product_shape import (
    GROUP,
    PART,
    ROWS,
    PanelShape,
    ProductShape,
    WideShape,
    column_bytes,
    part_bytes,
    result_bytes,
    row_stride,
    sum_bytes,
    table_bytes,
)

int32: Any = np.int32
int64: Any = np.int64
float32: Any = np.float32

NO_SUMS: dict[int, Callable[[], Any]] = {1: no_sums_8, 8: no_sums_8, 16: no_sums_16, 32: no_sums_32}


def make_product_kernel(fmt: Format, dtype: str, bias: str | None, shape: ProductShape) -> Callable[..., None]:
    """The kernel ``product(data, n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out, routes, chosen)``.

    Its parameters:

    * data: the blocks, row after row.
    * n_rows: number of rows.
    * row_bytes, n_groups: bytes of a row, and its number of groups of 32 elements.
    * x: the columns as `make_prepare_kernel` writes them, or one column of float16.
    * n_columns: number of columns.
    * powers: a float32 for each column, which multiplies its results.
    * bias: a number for each row, which is added to its results.
    * out: the results, one column after the other.
    * routes, chosen: only used with experts.

    With experts, the second dimension of the grid counts matrices of `n_rows` rows. `routes`, which the kernel of
    `make_routes_kernel` writes, contains the pairs (column, choice) that each matrix multiplies. A column has `chosen`
    choices. Each pair has its own results.

    Args:
        fmt: the format of the weights.
        dtype: the output type.
        bias: the type of the bias, if there is one.
        shape: how the work is divided.
    """
    warps, stages, parts = shape.warps, shape.stages, shape.parts
    one_column, overlaps, threads = shape.columns == 1, shape.overlaps, shape.threads
    streams = one_column and shape.streams
    experts, n_width = shape.experts, shape.columns
    n_results, no_sums = ROWS * shape.columns, NO_SUMS[shape.columns]
    n_bytes_of_part = part_bytes(fmt)
    n_bytes_of_chunk = parts * n_bytes_of_part
    is_always_aligned = shape.is_aligned and n_bytes_of_chunk % 16 == 0
    stride = row_stride(fmt, shape)
    # Places in shared memory are counted in units of 16 bytes, so that the compiler knows what they are multiples of.
    results_start = table_bytes(fmt) // 4
    tile_start, stage_units, row_units = (
        (table_bytes(fmt) + result_bytes(shape)) // 16,
        ROWS * stride // 16,
        stride // 16,
    )
    column_start = 16 * (tile_start + warps * stages * stage_units)
    n_bytes_of_sums = sum_bytes(fmt)
    n_bytes_of_column_part = column_bytes(fmt, PART)
    n_bytes_of_column_chunk = column_bytes(fmt, parts * PART)
    unit, result_type = np.dtype(f"u{fmt.alignment}"), np.dtype(np.float32)
    put_results, write_results = _results_writers(dtype, bias, shape)
    fetch = chunk_fetcher(fmt, shape)
    factors = factors_of(fmt)
    minimum_size = factors.minimum_size if factors.minimum else None
    prepare = column_preparer(factors.order, minimum_size, "float16", panel=0)
    load_elements, put_elements = chunk_preparer(factors.order, minimum_size, parts)
    part_product = product_of_part(fmt, no_sums)
    table: Any = factors.table
    n_table_items = 0 if table is None else len(table.items)

    def multiply_tiles(
        shared: Any, partial: Any, data: Any, base: int, n_rows: int, row_bytes: int, n_groups: int, x: Any,
        n_columns: int, powers: Any, bias: Any, out: Any, routes: Any, first_pair: int, chosen: int,
    ) -> None:  # fmt: skip
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        row, quarter = int32(lane >> 2), int32(lane & 3)
        n_parts = int32((n_groups + (PART // GROUP - 1)) // (PART // GROUP))
        chunks = int32((n_parts + (parts - 1)) // parts)
        tile, tile_step = int32(cuda.blockIdx.x), int32(cuda.gridDim.x)
        n_tiles = int32((n_rows + (ROWS - 1)) // ROWS)
        mine = int32(tile_start + warp * (stages * stage_units) + row * row_units)

        # This warp copies and computes a series of chunks: those of its first tile, those of its next tile, and so on.
        # `ahead` is the address of the next chunk to copy.
        ahead_tile, ahead_chunk = tile, warp
        ahead = base + (int64(tile) * ROWS + row) * row_bytes + warp * n_bytes_of_chunk
        to_next_tile = int64(tile_step) * ROWS * row_bytes - chunks * n_bytes_of_chunk
        for stage in range(stages):
            while ahead_chunk >= chunks:
                ahead_chunk, ahead_tile = int32(ahead_chunk - chunks), int32(ahead_tile + tile_step)
                ahead += to_next_tile
            at = (int64(mine) + stage * stage_units + quarter) << 4
            fetch(shared, at, data, ahead, ahead_tile, ahead_chunk, chunks, n_rows, row_bytes, lane)
            end_group()
            ahead_chunk = int32(ahead_chunk + warps)
            ahead += warps * n_bytes_of_chunk
        if n_table_items:
            for entry in range(thread, n_table_items, threads):
                copy_to_tile(shared, table, entry)
            cuda.syncthreads()
        if overlaps and not experts:
            # Until here, only weights were read: everything else may be a result of an earlier kernel.
            let_next_kernel_start()
            wait_for_earlier_kernels()
        if one_column and not streams:
            sums_start = column_start + n_parts * (2 * PART)
            prepare(x, 0, n_groups, n_groups, float32(1), shared, column_start, sums_start, thread, threads)
            cuda.syncthreads()
        n_bytes_of_column = n_parts * n_bytes_of_column_part
        column, step = row * n_bytes_of_column + 16 * quarter, 8 * n_bytes_of_column
        if one_column:
            column = int64(column_start + 16 * quarter)
        if experts:
            pair = routes[first_pair + min(int64(row), n_columns - 1)]
            column = pair // chosen * n_bytes_of_column + 16 * quarter
        column_sums = column + n_parts * (2 * PART)
        mine_of_column = column_start + warp * n_bytes_of_column_chunk

        chunk, stage, results = warp, int32(0), int32(results_start)
        while tile < n_tiles:
            sums = no_sums()
            while chunk < chunks:
                if streams:
                    elements = load_elements(x, chunk, n_groups, lane)
                wait_for_groups(stages - 1)
                if streams:
                    put_elements(elements, shared, mine_of_column, lane, thread)
                synchronize_warp(thread)
                upper = int64(int32(mine + stage * stage_units)) << 4
                lower = upper + 8 * stride
                if not is_always_aligned:
                    source = int32(base + (tile * ROWS + row) * row_bytes + chunk * n_bytes_of_chunk)
                    upper += source & 15
                    lower += (source + 8 * row_bytes) & 15
                if streams:
                    at = int64(mine_of_column + 16 * quarter)
                    sums_at = at + 2 * PART * parts
                else:
                    at = column + chunk * (2 * PART * parts)
                    sums_at = column_sums + chunk * (n_bytes_of_sums * parts)
                for _ in range(min(parts, n_parts - chunk * parts)):
                    if one_column:
                        sums = part_product(sums, shared, upper, lower, quarter, shared, at, sums_at, step, thread)
                    else:
                        sums = part_product(sums, shared, upper, lower, quarter, x, at, sums_at, step, thread)
                    upper += n_bytes_of_part
                    lower += n_bytes_of_part
                    at += 2 * PART
                    sums_at += n_bytes_of_sums
                synchronize_warp(thread)
                while ahead_chunk >= chunks:
                    ahead_chunk, ahead_tile = int32(ahead_chunk - chunks), int32(ahead_tile + tile_step)
                    ahead += to_next_tile
                at = (int64(mine) + stage * stage_units + quarter) << 4
                fetch(shared, at, data, ahead, ahead_tile, ahead_chunk, chunks, n_rows, row_bytes, lane)
                end_group()
                ahead_chunk = int32(ahead_chunk + warps)
                ahead += warps * n_bytes_of_chunk
                chunk = int32(chunk + warps)
                stage = int32(stage + 1) if stage + 1 < stages else int32(0)
            chunk = int32(chunk - chunks)

            put_results(partial, results, sums, warp, row, quarter)
            cuda.syncthreads()
            write_results(
                partial, results, tile, thread, n_rows, n_columns, powers, bias, out, routes, first_pair, chosen
            )
            results = int32(2 * results_start + warps * n_results - results)
            tile = int32(tile + tile_step)

    register_functions(multiply_tiles)

    def product(
        data: Any, n_rows: int, row_bytes: int, n_groups: int, x: Any, n_columns: int, powers: Any, bias: Any,
        out: Any, routes: Any, chosen: int,
    ) -> None:  # fmt: skip
        if IS_SIMULATED:
            shared, partial = cuda.shared.array(0, unit), cuda.shared.array(0, result_type)
        else:
            shared, partial = cuda.shared.array(0, unit, alignment=16), cuda.shared.array(0, result_type, alignment=16)
        if experts:
            if overlaps:
                # No weight can be read before this: the routes, which select it, are results of an earlier kernel.
                let_next_kernel_start()
                wait_for_earlier_kernels()
            expert = int64(cuda.blockIdx.y)
            pair, end = routes[expert], routes[expert + 1]
            base = address_of(data) + expert * n_rows * row_bytes
            first_place = int64(cuda.gridDim.y) + 1
            while pair < end:
                count = min(end - pair, int64(n_width))
                multiply_tiles(
                    shared, partial, data, base, n_rows, row_bytes, n_groups, x, count, powers, bias, out, routes,
                    first_place + pair, chosen,
                )  # fmt: skip
                cuda.syncthreads()
                pair += n_width
        else:
            multiply_tiles(
                shared, partial, data, address_of(data), n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out,
                routes, int64(0), int64(1),
            )  # fmt: skip

    product.__name__ = product.__qualname__ = f"product_{fmt.name}"
    return product


@lru_cache  # kernels of several formats share the compiled functions
def _results_writers(dtype: str, bias: str | None, shape: ProductShape) -> tuple[Callable[..., None], ...]:
    """Two functions: one puts the results of a thread into shared memory, the other adds those of all warps."""
    warps, threads, one_column, experts = shape.warps, shape.threads, shape.columns == 1, shape.experts
    n_results, n_items = ROWS * shape.columns, shape.columns // 2
    store, add_bias = OUTPUT_TYPES[dtype].store, bias_adder(bias)

    def put_results(partial: Any, results: int, sums: Any, warp: int, row: int, quarter: int) -> None:
        first = int32(results + warp * n_results + row)
        if one_column:  # all eight columns of the tensor core are equal
            partial[first] = item(sums, 0)
            partial[first + 8] = item(sums, 2)
        else:
            for index in range(n_items):
                column = (index >> 2) * 8 + 2 * quarter + (index & 1)
                partial[first + column * ROWS + (index & 2) * 4] = item(sums, index)

    def write_results(
        partial: Any, results: int, tile: int, thread: int, n_rows: int, n_columns: int, powers: Any, bias: Any,
        out: Any, routes: Any, first_pair: int, chosen: int,
    ) -> None:  # fmt: skip
        number = thread
        while number < n_results:
            column, row = int32(number // ROWS), int32(tile * ROWS + number % ROWS)
            if column < n_columns and row < n_rows:
                total = partial[results + number]
                for warp in range(1, warps):
                    total += partial[results + number + warp * n_results]
                place, given = int64(column), int64(column)
                if experts:
                    place = routes[first_pair + column]
                    given = place // chosen
                if not one_column:
                    total *= single(load_u32(powers, 4 * given))
                store(out, place * n_rows + row, repeated(add_bias(total, bias, row)), int64(1))
            number = int32(number + threads)

    register_functions(put_results, write_results)
    return put_results, write_results


def chunk_fetcher(fmt: Format, shape: ProductShape | WideShape | PanelShape) -> Callable[..., None]:
    """A function with which a warp begins to copy a chunk of each of its 16 rows; each thread copies parts of two rows.

    Bytes after the end of a row, and rows that do not exist, become 0.
    """
    n_bytes_of_chunk = shape.parts * part_bytes(fmt)
    return _fetcher_of_bytes(n_bytes_of_chunk, shape.is_aligned and n_bytes_of_chunk % 16 == 0, row_stride(fmt, shape))


@lru_cache  # kernels of formats of the same size share the compiled function
def _fetcher_of_bytes(n_bytes_of_chunk: int, is_always_aligned: bool, stride: int) -> Callable[..., None]:
    pieces = -(-(n_bytes_of_chunk + (0 if is_always_aligned else 15)) // 16)

    def fetch(
        shared: Any, at: int, data: Any, address: int, tile: int, chunk: int, chunks: int, n_rows: int, row_bytes: int,
        lane: int,
    ) -> None:  # fmt: skip
        quarter = lane & 3
        below = address + 8 * row_bytes
        # The last chunk of a row may be short, and the bytes around an unaligned one may not exist.
        whole_chunks = chunks
        if not is_always_aligned or row_bytes != chunks * n_bytes_of_chunk:
            whole_chunks = chunks - 1
        if chunk < whole_chunks and (tile + 1) * ROWS <= n_rows:
            if not is_always_aligned:
                address &= -16
                below &= -16
            copy_pieces(shared, at, data, address + 16 * quarter, quarter, pieces)
            copy_pieces(shared, at + 8 * stride, data, below + 16 * quarter, quarter, pieces)
        elif tile * ROWS < n_rows:
            for lower in range(2):
                phase = address & 15
                left = int32(row_bytes - chunk * n_bytes_of_chunk + phase - 16 * quarter)
                if tile * ROWS + (lane >> 2) + 8 * lower >= n_rows:
                    left = int32(0)
                start = address - phase + 16 * quarter
                copy_pieces_or_zeros(shared, at + 8 * lower * stride, data, start, left, quarter, pieces)
                address = below

    register_functions(fetch)
    return fetch


@lru_cache
def bias_adder(dtype: str | None) -> Callable[[Any, Any, int], Any]:
    """A function that adds number `row` of a bias of this type to a result."""

    def nothing(total: Any, bias: Any, row: int) -> Any:
        return total

    def float16(total: Any, bias: Any, row: int) -> Any:
        return total + half(load_u16(bias, 2 * row))

    def bfloat16(total: Any, bias: Any, row: int) -> Any:
        return total + bf16(load_u16(bias, 2 * row))

    def of_float32(total: Any, bias: Any, row: int) -> Any:
        return total + single(load_u32(bias, 4 * row))

    function = {None: nothing, "float16": float16, "bfloat16": bfloat16, "float32": of_float32}[dtype]
    register_functions(function)
    return function
