"""Products of compressed weights and more than 32 columns, on the tensor cores.

``out[c, r] = sum over k of weight[r, k] * x[c, k]``. A thread block multiplies 64 rows and 64 columns. Each of its four
warps has its own tile of 16 rows, and multiplies all elements of these rows. The warps share the columns: they copy the
next 256 elements of each column to shared memory while they multiply the ones before. So a column is read from the L2
cache once for 64 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant.bits import load_u32, single
from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.format import Format
from numba_dequant.halves import (
    address_of,
    copy_pieces,
    copy_to_tile,
    end_group,
    item,
    let_next_kernel_start,
    no_sums_64,
    repeated,
    wait_for_earlier_kernels,
    wait_for_groups,
)
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.numba_cuda import cuda
from numba_dequant.kernels.product import bias_adder, chunk_fetcher
from numba_dequant.kernels.product_of_part import factors_of, product_of_part, register_functions
from numba_dequant.kernels.product_shape import (
    GROUP,
    PART,
    RESULT_PADDING,
    ROWS,
    WideShape,
    column_bytes,
    column_stride,
    part_bytes,
    row_stride,
    sum_bytes,
    table_bytes,
)

int32: Any = np.int32
int64: Any = np.int64


def make_wide_kernel(fmt: Format, dtype: str, bias: str | None, shape: WideShape) -> Callable[..., None]:
    """The kernel ``product(data, n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out)``.

    Its parameters are those of `make_product_kernel`. The second dimension of the grid counts groups of 64 columns.

    Args:
        fmt: the format of the weights.
        dtype: the output type.
        bias: the type of the bias, if there is one.
        shape: whether the rows are aligned, and whether kernels may overlap.
    """
    overlaps, rows, width, stages, threads = shape.overlaps, shape.rows, shape.columns, shape.stages, shape.threads
    is_always_aligned = shape.is_aligned and part_bytes(fmt) % 16 == 0
    n_bytes_of_part, n_bytes_of_sums, pieces_of_sums = part_bytes(fmt), sum_bytes(fmt), sum_bytes(fmt) // 16
    n_bytes_of_column_part = column_bytes(fmt, PART)
    stride, step = row_stride(fmt, shape), column_stride(fmt)
    # Places in shared memory are counted in units of 16 bytes, so that the compiler knows what they are multiples of.
    row_units, tile_units, x_units = stride // 16, ROWS * stride // 16, width * step // 16
    stage_units = x_units + rows * stride // 16
    x_start = table_bytes(fmt) // 16
    unit, result_type = np.dtype(f"u{fmt.alignment}"), np.dtype(np.float32)
    table: Any = factors_of(fmt).table
    n_table_items = 0 if table is None else len(table.items)
    fetch = chunk_fetcher(fmt, shape)
    part_product = product_of_part(fmt, no_sums_64)
    put_results, write_results = results_writers(dtype, bias, rows, width)

    def fetch_columns(
        shared: Any, at: int, x: Any, address: int, sums_address: int, quarter: int, n_bytes: int
    ) -> None:
        # Four threads copy a column.
        for _ in range(0, width, threads // 4):
            copy_pieces(shared, at, x, address, quarter, 2 * PART // 16)
            if pieces_of_sums:
                copy_pieces(shared, at + 2 * PART, x, sums_address, quarter, pieces_of_sums)
            at += threads // 4 * step
            address += threads // 4 * n_bytes
            sums_address += threads // 4 * n_bytes

    register_functions(fetch_columns)

    def product(
        data: Any, n_rows: int, row_bytes: int, n_groups: int, x: Any, n_columns: int, powers: Any, bias: Any, out: Any
    ) -> None:
        if IS_SIMULATED:
            shared, partial = cuda.shared.array(0, unit), cuda.shared.array(0, result_type)
        else:
            shared, partial = cuda.shared.array(0, unit, alignment=16), cuda.shared.array(0, result_type, alignment=16)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        row, quarter = int32(lane >> 2), int32(lane & 3)
        n_parts = int32((n_groups + (PART // GROUP - 1)) // (PART // GROUP))
        tile = int32(cuda.blockIdx.x * (rows // ROWS) + warp)
        base = address_of(data) + (int64(tile) * ROWS + row) * row_bytes
        mine = int32(x_start + x_units + warp * tile_units + row * row_units)
        first_column = int64(cuda.blockIdx.y) * width
        n_bytes = int64(n_parts) * n_bytes_of_column_part
        column_base = address_of(x) + (first_column + (thread >> 2)) * n_bytes + 16 * quarter
        sums_base = column_base + int64(n_parts) * (2 * PART)
        my_column = int64(int32(thread >> 2) * step + 16 * quarter)

        for stage in range(stages):
            if stage < n_parts:
                at = (int64(mine) + stage * stage_units + quarter) << 4
                ahead = base + stage * n_bytes_of_part
                fetch(shared, at, data, ahead, tile, stage, n_parts, n_rows, row_bytes, lane)
            end_group()
        if n_table_items:
            for entry in range(thread, n_table_items, threads):
                copy_to_tile(shared, table, entry)
        if overlaps:
            # Until here, only weights were read: everything else may be a result of an earlier kernel.
            let_next_kernel_start()
            wait_for_earlier_kernels()
        for stage in range(stages):
            if stage < n_parts:
                at = (int64(x_start + stage * stage_units) << 4) + my_column
                sums_at = sums_base + stage * n_bytes_of_sums
                fetch_columns(shared, at, x, column_base + stage * (2 * PART), sums_at, quarter, n_bytes)
            end_group()

        sums, stage = no_sums_64(), int32(0)
        for part in range(n_parts):
            wait_for_groups(stages - 1)
            cuda.syncthreads()
            upper = int64(int32(mine + stage * stage_units)) << 4
            lower = upper + 8 * stride
            if not is_always_aligned:
                source = int32(base + part * n_bytes_of_part)
                upper += source & 15
                lower += (source + 8 * row_bytes) & 15
            at = (int64(x_start + stage * stage_units) << 4) + row * step + 16 * quarter
            sums = part_product(sums, shared, upper, lower, quarter, shared, at, at + 2 * PART, int64(8 * step), thread)
            cuda.syncthreads()
            ahead_part = int32(part + stages)
            if ahead_part < n_parts:
                at = (int64(x_start + stage * stage_units) << 4) + my_column
                sums_at = sums_base + ahead_part * n_bytes_of_sums
                fetch_columns(shared, at, x, column_base + ahead_part * (2 * PART), sums_at, quarter, n_bytes)
                at = (int64(mine) + stage * stage_units + quarter) << 4
                ahead = base + ahead_part * n_bytes_of_part
                fetch(shared, at, data, ahead, tile, ahead_part, n_parts, n_rows, row_bytes, lane)
            end_group()
            stage = int32(stage + 1) if stage + 1 < stages else int32(0)

        # All copies have arrived and all warps have read them, so the results can take their place.
        results = 4 * x_start
        put_results(partial, int32(results + warp * ROWS + row), sums, quarter)
        cuda.syncthreads()
        first_row = int64(cuda.blockIdx.x) * rows
        write_results(partial, results, first_row, first_column, thread, n_rows, n_columns, powers, bias, out)

    product.__name__ = product.__qualname__ = f"product_{fmt.name}"
    return product


@lru_cache  # kernels of several formats share the compiled functions
def results_writers(dtype: str, bias: str | None, rows: int, columns: int) -> tuple[Callable[..., None], ...]:
    """Two functions: one puts the results of a thread into shared memory, the other writes those of all threads.

    Args:
        dtype: the output type.
        bias: the type of the bias, if there is one.
        rows: rows of a thread block, which has two threads for each.
        columns: its columns.
    """
    store, add_bias, stride = OUTPUT_TYPES[dtype].store, bias_adder(bias), rows + RESULT_PADDING

    def putter(index: int) -> Callable[..., None]:
        place, next_columns = (index >> 2) * 8 * stride, 8 * stride
        i1, i2, i3, i4, i5, i6, i7 = range(index + 1, index + 8)

        def put_eight(partial: Any, start: int, sums: Any) -> None:
            first = start + place
            second = first + next_columns
            partial[first] = item(sums, index)
            partial[first + stride] = item(sums, i1)
            partial[first + 8] = item(sums, i2)
            partial[first + stride + 8] = item(sums, i3)
            partial[second] = item(sums, i4)
            partial[second + stride] = item(sums, i5)
            partial[second + 8] = item(sums, i6)
            partial[second + stride + 8] = item(sums, i7)

        register_functions(put_eight)
        return put_eight

    def one_after_the_other(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
        def both(partial: Any, start: int, sums: Any) -> None:
            first(partial, start, sums)
            second(partial, start, sums)

        register_functions(both)
        return both

    # Written out for all results: with a computed index, the compiler would keep them in local memory.
    putters = [putter(index) for index in range(0, columns // 2, 8)]
    while len(putters) > 1:
        putters = [one_after_the_other(*putters[k : k + 2]) for k in range(0, len(putters), 2)]
    put_all = putters[0]

    def put_results(partial: Any, start: int, sums: Any, quarter: int) -> None:
        put_all(partial, int32(start + 2 * quarter * stride), sums)

    def scaled(partial: Any, place: int, powers: Any, powers_at: int) -> Any:
        return partial[place] * single(load_u32(powers, powers_at))

    def put_result(out: Any, place: int, result: Any, is_there: bool) -> None:
        if is_there:
            store(out, place, repeated(result), int64(1))

    def write_results(
        partial: Any, results: int, first_row: int, first_column: int, thread: int, n_rows: int, n_columns: int,
        powers: Any, bias: Any, out: Any,
    ) -> None:  # fmt: skip
        row = first_row + thread % rows
        if row < n_rows:
            for column in range(thread // rows, columns, 16):
                # Eight loads are in flight at a time. There is a power for each column of a thread block.
                place, powers_at = results + column * stride + thread % rows, 4 * (first_column + column)
                first = add_bias(scaled(partial, place, powers, powers_at), bias, row)
                second = add_bias(scaled(partial, place + 2 * stride, powers, powers_at + 8), bias, row)
                third = add_bias(scaled(partial, place + 4 * stride, powers, powers_at + 16), bias, row)
                fourth = add_bias(scaled(partial, place + 6 * stride, powers, powers_at + 24), bias, row)
                fifth = add_bias(scaled(partial, place + 8 * stride, powers, powers_at + 32), bias, row)
                sixth = add_bias(scaled(partial, place + 10 * stride, powers, powers_at + 40), bias, row)
                seventh = add_bias(scaled(partial, place + 12 * stride, powers, powers_at + 48), bias, row)
                eighth = add_bias(scaled(partial, place + 14 * stride, powers, powers_at + 56), bias, row)
                number, n_left = first_column + column, n_columns - (first_column + column)
                put_result(out, number * n_rows + row, first, n_left > 0)
                put_result(out, (number + 2) * n_rows + row, second, n_left > 2)
                put_result(out, (number + 4) * n_rows + row, third, n_left > 4)
                put_result(out, (number + 6) * n_rows + row, fourth, n_left > 6)
                put_result(out, (number + 8) * n_rows + row, fifth, n_left > 8)
                put_result(out, (number + 10) * n_rows + row, sixth, n_left > 10)
                put_result(out, (number + 12) * n_rows + row, seventh, n_left > 12)
                put_result(out, (number + 14) * n_rows + row, eighth, n_left > 14)

    register_functions(scaled, put_result)
    register_functions(put_results, write_results)
    return put_results, write_results
