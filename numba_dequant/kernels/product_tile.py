"""Products of compressed weights and 64 or 128 columns, by the tensor cores of compute capability 9.0.

``out[c, r] = sum over k of weight[r, k] * x[c, k]``. Each of eight warps has 16 rows. The threads turn the bytes into
float16 in registers. The tensor cores read the columns from shared memory themselves, and multiply while the threads
compute the next weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_dequant.format import Format
from numba_dequant.halves import (
    address_of,
    begin_copy,
    copy_to_tile,
    end_group,
    let_next_kernel_start,
    make_barrier,
    no_sums_64,
    no_sums_128,
    wait_for_copy,
    wait_for_earlier_kernels,
    wait_for_groups,
)
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.numba_cuda import cuda
from numba_dequant.kernels.product import chunk_fetcher
from numba_dequant.kernels.product_of_part import factors_of, product_of_tile
from numba_dequant.kernels.product_shape import (
    GROUP,
    PART,
    ROWS,
    TileShape,
    part_bytes,
    row_stride,
    sum_bytes,
    table_bytes,
    tile_bytes,
)
from numba_dequant.kernels.product_wide import results_writers

int32: Any = np.int32
int64: Any = np.int64

NO_SUMS: dict[int, Callable[[], Any]] = {64: no_sums_64, 128: no_sums_128}


def make_tile_kernel(fmt: Format, dtype: str, bias: str | None, shape: TileShape) -> Callable[..., None]:
    """The kernel ``product(data, n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out)``.

    Its parameters are those of `make_product_kernel`, but the columns are prepared as tiles. The second dimension of
    the grid counts tiles.

    Args:
        fmt: the format of the weights.
        dtype: the output type.
        bias: the type of the bias, if there is one.
        shape: the work of a thread block.
    """
    rows, width, stages, threads = shape.rows, shape.columns, shape.stages, shape.threads
    no_sums = NO_SUMS[width]
    is_always_aligned = shape.is_aligned and part_bytes(fmt) % 16 == 0
    n_bytes_of_part, n_bytes_of_tile, n_bytes_of_sums = part_bytes(fmt), tile_bytes(fmt, width), sum_bytes(fmt)
    stride = row_stride(fmt, shape)
    # Places in shared memory are counted in units of 128 bytes, as the tensor cores want the columns.
    stage_units = n_bytes_of_tile // 128 + -(-rows * stride // 128)
    barriers = -(-table_bytes(fmt) // 128) * 128
    x_start = barriers // 128 + 1
    unit, result_type = np.dtype(f"u{fmt.alignment}"), np.dtype(np.float32)
    table: Any = factors_of(fmt).table
    n_table_items = 0 if table is None else len(table.items)
    fetch = chunk_fetcher(fmt, shape)
    tile_product = product_of_tile(fmt, no_sums, width)
    put_results, write_results = results_writers(dtype, bias, rows, width)

    def product(
        data: Any, n_rows: int, row_bytes: int, n_groups: int, x: Any, n_columns: int, powers: Any, bias: Any, out: Any
    ) -> None:
        if IS_SIMULATED:
            shared, partial = cuda.shared.array(0, unit), cuda.shared.array(0, result_type)
        else:
            shared = cuda.shared.array(0, unit, alignment=128)
            partial = cuda.shared.array(0, result_type, alignment=128)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        row, quarter = int32(lane >> 2), int32(lane & 3)
        n_parts = int32((n_groups + (PART // GROUP - 1)) // (PART // GROUP))
        tile = int32(cuda.blockIdx.x * (rows // ROWS) + warp)
        base = address_of(data) + (int64(tile) * ROWS + row) * row_bytes
        mine = n_bytes_of_tile + (warp * ROWS + row) * stride
        columns = address_of(x) + int64(cuda.blockIdx.y) * n_parts * n_bytes_of_tile

        for stage in range(stages - 1):
            if stage < n_parts:
                at = (int64(x_start + stage * stage_units) << 7) + mine + 16 * quarter
                fetch(shared, at, data, base + stage * n_bytes_of_part, tile, stage, n_parts, n_rows, row_bytes, lane)
            end_group()
        if n_table_items:
            for entry in range(thread, n_table_items, threads):
                copy_to_tile(shared, table, entry)
        if thread == 0:
            for stage in range(stages):
                make_barrier(shared, int64(barriers + 8 * stage))
        # Until here, only weights were read: everything else may be a result of an earlier kernel.
        let_next_kernel_start()
        wait_for_earlier_kernels()
        if thread == 0:
            for stage in range(min(stages - 1, n_parts)):
                at = int64(x_start + stage * stage_units) << 7
                start = columns + stage * n_bytes_of_tile
                begin_copy(shared, at, x, start, int32(n_bytes_of_tile), int64(barriers + 8 * stage))
        cuda.syncthreads()

        sums, stage, stage_ahead, parity = no_sums(), int32(0), int32(stages - 1), int32(0)
        for part in range(n_parts):
            wait_for_groups(stages - 2)
            wait_for_copy(shared, int64(barriers + 8 * stage), parity)
            cuda.syncthreads()
            # All warps have read the stage before this one, which is the next to be filled.
            ahead = int32(part + (stages - 1))
            if ahead < n_parts:
                at = int64(x_start + stage_ahead * stage_units) << 7
                if thread == 0:
                    start = columns + ahead * n_bytes_of_tile
                    begin_copy(shared, at, x, start, int32(n_bytes_of_tile), int64(barriers + 8 * stage_ahead))
                at += mine + 16 * quarter
                fetch(shared, at, data, base + ahead * n_bytes_of_part, tile, ahead, n_parts, n_rows, row_bytes, lane)
            end_group()
            at = int64(x_start + stage * stage_units) << 7
            upper = at + mine
            lower = upper + 8 * stride
            if not is_always_aligned:
                source = int32(base + part * n_bytes_of_part)
                upper += source & 15
                lower += (source + 8 * row_bytes) & 15
            sums_at = at + width * (2 * PART) + row * n_bytes_of_sums + 16 * quarter
            sums = tile_product(sums, shared, upper, lower, quarter, shared, at, sums_at, thread)
            stage = int32(stage + 1) if stage + 1 < stages else int32(0)
            if stage == 0:
                parity ^= int32(1)
            stage_ahead = int32(stage_ahead + 1) if stage_ahead + 1 < stages else int32(0)

        # All copies have arrived. When all warps have read them, the results can take their place.
        cuda.syncthreads()
        results = 32 * x_start
        put_results(partial, int32(results + warp * ROWS + row), sums, quarter)
        cuda.syncthreads()
        first_row, first_column = int64(cuda.blockIdx.x) * rows, int64(cuda.blockIdx.y) * width
        write_results(partial, results, first_row, first_column, thread, n_rows, n_columns, powers, bias, out)

    product.__name__ = product.__qualname__ = f"product_{fmt.name}"
    return product
