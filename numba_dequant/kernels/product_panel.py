"""Products of compressed weights and more than 16 columns, by the tensor cores of compute capability 9.0.

``out[c, r] = sum over k of weight[r, k] * x[c, k]``. A thread block has four or eight warps, and each has 16 rows. The
threads turn the bytes into float16 in registers. The tensor cores read the columns from shared memory themselves, and
multiply while the threads compute the next weights. A kernel multiplies 32, 64 or 128 columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_dequant.format import Format
from numba_dequant.halves import (
    add_stored_sums,
    address_of,
    begin_copy,
    copy_to_tile,
    end_group,
    let_copies_overwrite,
    let_next_kernel_start,
    make_barrier,
    no_sums_32,
    no_sums_64,
    no_sums_128,
    raise_flag,
    store_sums,
    wait_for_copy,
    wait_for_earlier_kernels,
    wait_for_flag,
    wait_for_groups,
)
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.numba_cuda import cuda
from numba_dequant.kernels.product import chunk_fetcher
from numba_dequant.kernels.product_of_part import factors_of, product_of_panel, register_functions
from numba_dequant.kernels.product_shape import (
    GROUP,
    PART,
    ROWS,
    PanelShape,
    panel_bytes,
    part_bytes,
    row_stride,
    stage_bytes,
    sum_bytes,
    table_bytes,
)
from numba_dequant.kernels.product_wide import results_writers

int32: Any = np.int32
uint32: Any = np.uint32
int64: Any = np.int64

NO_SUMS: dict[int, Callable[[], Any]] = {32: no_sums_32, 64: no_sums_64, 128: no_sums_128}


def make_panel_kernel(fmt: Format, dtype: str, bias: str | None, shape: PanelShape) -> Callable[..., None]:
    """The kernel ``product(data, n_rows, row_bytes, n_groups, x, n_columns, powers, bias, out, stored, flags)``.

    Its first parameters are those of `make_product_kernel`, but the columns are prepared as panels. The others:

    * stored: memory for the results of each thread block, `shape.rows` times `shape.columns` float32.
    * flags: a uint32 for each thread block, which is 0.

    The work is a series of parts: all parts of the first rows and the first panel of columns, then of the same rows and
    the next panel, and so on. Each thread block takes an equal share of the series. If several thread blocks have parts
    of the same rows and the same panel, the one with the first part adds the results of the others, always in the same
    order. It waits for thread blocks with smaller numbers, which a GPU starts earlier.

    Args:
        fmt: the format of the weights.
        dtype: the output type.
        bias: the type of the bias, if there is one.
        shape: the work of a thread block.
    """
    rows, width, stages, threads = shape.rows, shape.columns, shape.stages, shape.threads
    no_sums = NO_SUMS[width]
    is_always_aligned = shape.is_aligned and part_bytes(fmt) % 16 == 0
    n_bytes_of_part, n_bytes_of_panel, n_bytes_of_sums = part_bytes(fmt), panel_bytes(fmt, width), sum_bytes(fmt)
    stride = row_stride(fmt, shape)
    # Places in shared memory are counted in units of 128 bytes, as the tensor cores want the columns.
    stage_units = stage_bytes(fmt, shape) // 128
    barriers = -(-table_bytes(fmt) // 128) * 128
    x_start = barriers // 128 + 1
    unit, result_type = np.dtype(f"u{fmt.alignment}"), np.dtype(np.float32)
    table: Any = factors_of(fmt).table
    n_table_items = 0 if table is None else len(table.items)
    fetch = chunk_fetcher(fmt, shape)
    panel_product = product_of_panel(fmt, no_sums, width)
    put_results, write_results = results_writers(dtype, bias, rows, width)

    def quotient(number: int, divisor: int) -> Any:
        # A division of 64 bits, or of signed numbers, would take as long as a part.
        return int32(uint32(number) // uint32(divisor))

    def start_of_share(share: int, n_all: int, n_shares: int) -> Any:
        size = quotient(n_all, n_shares)
        return int32(share * size + min(share, n_all - size * n_shares))

    def row_address(data: Any, first_row: int, row_bytes: int, thread: int) -> Any:
        """The address of the upper row of a thread."""
        return address_of(data) + (first_row + (thread >> 5) * ROWS + ((thread & 31) >> 2)) * row_bytes

    def begin_weights(
        shared: Any, stage: int, data: Any, state: tuple[Any, Any, Any, Any], n_parts: int, n_rows: int,
        row_bytes: int, thread: int,
    ) -> None:  # fmt: skip
        address, part, _, first_row = state
        warp, lane = int32(thread >> 5), int32(thread & 31)
        of_warp = int32(quotient(first_row, ROWS) + warp)
        at = (int64(x_start + stage * stage_units) << 7) + n_bytes_of_panel
        at += (warp * ROWS + (lane >> 2)) * stride + 16 * (lane & 3)
        fetch(shared, at, data, address, of_warp, part, n_parts, n_rows, row_bytes, lane)

    def begin_columns(shared: Any, stage: int, x: Any, address: int) -> None:
        at = int64(x_start + stage * stage_units) << 7
        begin_copy(shared, at, x, address, int32(n_bytes_of_panel), int64(barriers + 8 * stage))

    def next_weights(
        state: tuple[Any, Any, Any, Any], data: Any, n_parts: int, n_panels: int, row_bytes: int, thread: int
    ) -> Any:
        address, part, panel, first_row = state
        part, address = int32(part + 1), address + n_bytes_of_part
        if part == n_parts:
            part, panel = int32(0), int32(panel + 1)
            if panel == n_panels:
                panel, first_row = int32(0), int32(first_row + rows)
            address = row_address(data, first_row, row_bytes, thread)
        return address, part, panel, first_row

    def next_columns(address: int, x: Any, n_bytes: int) -> Any:
        address += n_bytes_of_panel
        return address if address < address_of(x) + n_bytes else address_of(x)

    register_functions(quotient, start_of_share, row_address, begin_weights, begin_columns, next_weights, next_columns)

    def product(
        data: Any, n_rows: int, row_bytes: int, n_groups: int, x: Any, n_columns: int, powers: Any, bias: Any, out: Any,
        stored: Any, flags: Any,
    ) -> None:  # fmt: skip
        if IS_SIMULATED:
            shared, partial = cuda.shared.array(0, unit), cuda.shared.array(0, result_type)
        else:
            shared = cuda.shared.array(0, unit, alignment=128)
            partial = cuda.shared.array(0, result_type, alignment=128)
        thread = int32(cuda.threadIdx.x)
        warp, lane = int32(thread >> 5), int32(thread & 31)
        row, quarter = int32(lane >> 2), int32(lane & 3)
        mine = n_bytes_of_panel + (warp * ROWS + row) * stride
        n_parts = int32((n_groups + (PART // GROUP - 1)) // (PART // GROUP))
        n_panels = int32((n_columns + (width - 1)) // width)
        n_bytes_of_columns = int64(n_panels) * n_parts * n_bytes_of_panel
        n_all, n_shares = int32((n_rows + (rows - 1)) // rows * n_panels * n_parts), int32(cuda.gridDim.x)
        share = int32(n_shares - 1 - int32(cuda.blockIdx.x))
        first = start_of_share(share, n_all, n_shares)
        n_mine = int32(start_of_share(int32(share + 1), n_all, n_shares) - first)

        # The share starts at a part of some rows and a panel of columns.
        number = quotient(first, n_parts)
        of_rows, part = quotient(number, n_panels), int32(first - number * n_parts)
        panel = int32(number - of_rows * n_panels)
        weights = row_address(data, int32(of_rows * rows), row_bytes, thread) + part * n_bytes_of_part
        current = ahead = weights, part, panel, int32(of_rows * rows)
        columns = address_of(x) + (int64(panel) * n_parts + part) * n_bytes_of_panel
        for stage in range(stages - 1):
            if stage < n_mine:
                begin_weights(shared, stage, data, ahead, n_parts, n_rows, row_bytes, thread)
                ahead = next_weights(ahead, data, n_parts, n_panels, row_bytes, thread)
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
        for stage in range(min(stages - 1, n_mine)):
            if thread == 0:
                begin_columns(shared, stage, x, columns)
            columns = next_columns(columns, x, n_bytes_of_columns)
        cuda.syncthreads()

        sums, stage, stage_ahead, parity = no_sums(), int32(0), int32(stages - 1), int32(0)
        for index in range(n_mine):
            wait_for_groups(stages - 2)
            wait_for_copy(shared, int64(barriers + 8 * stage), parity)
            cuda.syncthreads()
            # All warps have read the stage before this one, which is the next to be filled.
            if int32(index + (stages - 1)) < n_mine:
                if thread == 0:
                    begin_columns(shared, stage_ahead, x, columns)
                begin_weights(shared, stage_ahead, data, ahead, n_parts, n_rows, row_bytes, thread)
            end_group()
            weights, part, panel, first_row = current
            at = int64(x_start + stage * stage_units) << 7
            upper = at + mine
            lower = upper + 8 * stride
            if not is_always_aligned:
                upper += int32(weights) & 15
                lower += int32(weights + 8 * row_bytes) & 15
            sums_at = at + width * (2 * PART) + row * n_bytes_of_sums + 16 * quarter
            sums = panel_product(sums, shared, upper, lower, quarter, shared, at, sums_at, thread)

            columns = next_columns(columns, x, n_bytes_of_columns)
            ahead = next_weights(ahead, data, n_parts, n_panels, row_bytes, thread)
            current = next_weights(current, data, n_parts, n_panels, row_bytes, thread)
            if part == n_parts - 1 or index == n_mine - 1:
                if index < part:
                    # The thread block that has the first part adds these results.
                    store_sums(stored, (int64(share) * (rows * width) + thread) * 4, sums, int64(4 * threads))
                    cuda.syncthreads()
                    if thread == 0:
                        raise_flag(flags, int64(share))
                else:
                    end, other = int32(first + index + (n_parts - part)), int32(share + 1)
                    while other < n_shares and start_of_share(other, n_all, n_shares) < end:
                        if thread == 0:
                            wait_for_flag(flags, int64(other))
                        cuda.syncthreads()
                        stored_at = (int64(other) * (rows * width) + thread) * 4
                        sums = add_stored_sums(sums, stored, stored_at, int64(4 * threads))
                        other = int32(other + 1)
                    # All warps have read this stage. The results take its place.
                    cuda.syncthreads()
                    results = 32 * int32(x_start + stage * stage_units)
                    put_results(partial, int32(results + warp * ROWS + row), sums, quarter)
                    cuda.syncthreads()
                    first_column = int64(panel) * width
                    write_results(
                        partial, results, int64(first_row), first_column, thread, n_rows, n_columns, powers, bias, out
                    )
                    let_copies_overwrite()
                sums = no_sums()
            stage = int32(stage + 1) if stage + 1 < stages else int32(0)
            if stage == 0:
                parity ^= int32(1)
            stage_ahead = int32(stage_ahead + 1) if stage_ahead + 1 < stages else int32(0)

    product.__name__ = product.__qualname__ = f"product_{fmt.name}"
    return product
