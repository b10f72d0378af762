"""Kernels and functions that write the columns of a product in the order in which the tensor cores take them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant.bits import single, stop_unless, store_float32
from numba_dequant.format import Format
from numba_dequant.halves import (
    Order,
    equal_halves,
    largest_bfloat16,
    let_next_kernel_start,
    plus_lane,
    repeated,
    scaled_bfloat16,
    store_halves,
    store_in_panel,
    store_sum,
    sum_of_halves,
    wait_for_earlier_kernels,
)
from numba_dequant.kernels.numba_cuda import cuda
from numba_dequant.kernels.product_of_part import factors_of, register_functions
from numba_dequant.kernels.product_shape import GROUP, PART, PREPARE_THREADS, column_bytes, sum_bytes

int32: Any = np.int32
int64: Any = np.int64
float32: Any = np.float32


def make_prepare_kernel(fmt: Format, dtype: str, overlaps: bool = False, panel: int = 0) -> Callable[..., None]:
    """The kernel ``prepare(x, n_columns, n_groups, out, powers, n_flags)``.

    A column has a thread block for each 256 runs of eight elements. The kernel's parameters:

    * x: columns of type `dtype`, one after the other.
    * n_columns, n_groups: number of columns, and of groups of 32 elements in a column.
    * out: the prepared columns. If the grid has more columns than `x`, the others become 0.
    * powers: a float32 for each column, which must multiply the results of its products. Flags of 4 bytes follow.
    * n_flags: number of flags, which become 0.

    A float16 is copied unchanged. A column of bfloat16 is multiplied by a power of two, so that its largest element is
    near 2**14, and then converted to float16. This is exact, except for elements that are more than 2**31 times smaller
    than the largest. Each thread block of a column looks for the largest element.

    Args:
        fmt: the format of the weights.
        dtype: the type of the columns.
        overlaps: whether the kernel may start before the preceding kernel has ended.
        panel: the columns of a panel, as `make_panel_kernel` takes them; 0 means one column after the other.
    """
    is_bfloat16 = dtype == "bfloat16"
    factors = factors_of(fmt)
    load = factors.order.load
    prepare_column = column_preparer(factors.order, factors.minimum_size if factors.minimum else None, dtype, panel)
    n_bytes_of_part, n_bytes_of_sums = column_bytes(fmt, PART), sum_bytes(fmt)
    largest_type = np.dtype(np.int32)

    def prepare(x: Any, n_columns: int, n_groups: int, out: Any, powers: Any, n_flags: int) -> None:
        largest = cuda.shared.array(1, largest_type)
        thread, column = int32(cuda.threadIdx.x), int64(cuda.blockIdx.x)
        first = int32(cuda.blockIdx.y * PREPARE_THREADS + thread)
        if overlaps:
            let_next_kernel_start()
            wait_for_earlier_kernels()
        start, n_given = column * n_groups * (2 * GROUP), n_groups if column < n_columns else int64(0)
        factor = inverse = float32(1)
        if is_bfloat16:
            if thread == 0:
                largest[0] = 0
            cuda.syncthreads()
            run, mine = thread, int64(0)
            while run < n_given * 4:
                mine = max(mine, largest_bfloat16(load(x, start + (run >> 2) * (2 * GROUP), run & 3)))
                run = int32(run + PREPARE_THREADS)
            cuda.atomic.max(largest, 0, int32(mine))
            cuda.syncthreads()
            exponent = int64(largest[0]) >> 7
            if exponent < 255:  # otherwise an element is infinite or NaN
                power = min(int64(127 + 14) - exponent, int64(126))
                factor, inverse = single((power + 127) << 23), single((127 - power) << 23)
        n_parts = (n_groups + (PART // GROUP - 1)) // (PART // GROUP)
        if panel:
            # A panel is a part of several columns: their elements, then their sums.
            number = column % panel
            at = (column - number) * n_parts * n_bytes_of_part
            sums_at = at + panel * (2 * PART) + number * n_bytes_of_sums
            at += number * 16
        else:
            at = column * n_parts * n_bytes_of_part
            sums_at = at + n_parts * (2 * PART)
        step = int32(cuda.gridDim.y * PREPARE_THREADS)
        prepare_column(x, start, n_groups, n_given, factor, out, at, sums_at, first, step)
        if first == 0:
            store_float32(powers, column, repeated(inverse), int64(1))
        if column == 0:
            flag = first
            while flag < n_flags:
                store_float32(powers, int64(cuda.gridDim.x) + flag, repeated(float32(0)), int64(1))
                flag = int32(flag + step)

    prepare.__name__ = prepare.__qualname__ = f"prepare_{dtype}"
    return prepare


def make_routes_kernel(overlaps: bool = False) -> Callable[..., None]:
    """The kernel ``find(ids, n_pairs, n_experts, routes)`` for one thread block: it finds the pairs of each expert.

    Pair number k has the expert ``ids[k]``. `routes` begins with ``n_experts + 1`` numbers: entry e is the number of
    pairs whose expert is less than e. Then come the numbers of the pairs, sorted by expert.
    """

    def find(ids: Any, n_pairs: int, n_experts: int, routes: Any) -> None:
        if overlaps:
            let_next_kernel_start()
            wait_for_earlier_kernels()
        thread = int64(cuda.threadIdx.x)
        for expert in range(thread, n_experts + 1, PREPARE_THREADS):
            earlier = int64(0)
            for pair in range(n_pairs):
                stop_unless(0 <= ids[pair] < n_experts)
                if ids[pair] < expert:
                    earlier += 1
            routes[expert] = earlier
            for pair in range(n_pairs):
                if ids[pair] == expert:
                    routes[n_experts + 1 + earlier] = pair
                    earlier += 1

    return find


@lru_cache  # kernels of several formats share the compiled function
def column_preparer(order: Order, minimum_size: int | None, dtype: str, panel: int) -> Callable[..., None]:
    """A function that writes a column in the order of the tensor cores, and the sums of its elements.

    It multiplies the elements of `n_given` groups from byte `start` of `x` by `factor`, and writes them from byte `at`
    of `out`, and the sums from byte `sums_start`. Zeros fill the column to a whole number of parts.
    """
    load_run_or_zeros, put = _run_preparer(order, minimum_size, dtype, panel)

    def prepare(
        x: Any, start: int, n_groups: int, n_given: int, factor: Any, out: Any, at: int, sums_start: int, thread: int,
        threads: int,
    ) -> None:  # fmt: skip
        n_runs = (n_groups + (PART // GROUP - 1)) // (PART // GROUP) * (PART // 8)
        run = thread
        while run < n_runs:
            # Four loads are in flight at a time. All threads of a warp must take part in the sums of `put`.
            first = load_run_or_zeros(x, start, n_given, run)
            second = load_run_or_zeros(x, start, n_given, run + threads)
            third = load_run_or_zeros(x, start, n_given, run + 2 * threads)
            fourth = load_run_or_zeros(x, start, n_given, run + 3 * threads)
            put(first, factor, out, at, sums_start, run, thread)
            if run + threads < n_runs:
                put(second, factor, out, at, sums_start, run + threads, thread)
            if run + 2 * threads < n_runs:
                put(third, factor, out, at, sums_start, run + 2 * threads, thread)
            if run + 3 * threads < n_runs:
                put(fourth, factor, out, at, sums_start, run + 3 * threads, thread)
            run = int32(run + 4 * threads)

    register_functions(prepare)
    return prepare


@lru_cache
def chunk_preparer(order: Order, minimum_size: int | None, parts: int) -> tuple[Callable[..., Any], ...]:
    """Two functions with which a warp prepares a chunk of a column of float16: one loads it, the other writes it.

    A thread loads one run of each of the one or two parts, and can wait for something else before it writes them.
    """
    load_run_or_zeros, put = _run_preparer(order, minimum_size, "float16", 0)
    runs_of_part = PART // 8

    def load(x: Any, chunk: int, n_groups: int, lane: int) -> Any:
        run = int64(chunk) * (parts * runs_of_part) + lane
        first = load_run_or_zeros(x, 0, n_groups, run)
        if parts == 2:
            return first, load_run_or_zeros(x, 0, n_groups, run + runs_of_part)
        return first, first

    def put_chunk(elements: Any, out: Any, at: int, lane: int, thread: int) -> None:
        sums_start = at + parts * (2 * PART)
        put(elements[0], float32(1), out, at, sums_start, lane, thread)
        if parts == 2:
            put(elements[1], float32(1), out, at, sums_start, lane + runs_of_part, thread)

    register_functions(load, put_chunk)
    return load, put_chunk


@lru_cache
def _run_preparer(
    order: Order, minimum_size: int | None, dtype: str, panel: int
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Two functions: one loads a run of a column, the other writes it, and the sums of its elements."""
    load = order.load
    has_minima, elements_of_sum = minimum_size is not None, minimum_size or GROUP
    sums_of_part = PART // elements_of_sum
    n_bytes_of_panel = panel * (2 * PART + (8 * sums_of_part if has_minima else 0))
    is_bfloat16 = dtype == "bfloat16"

    def load_run_or_zeros(x: Any, start: int, n_given: int, run: int) -> Any:
        elements = equal_halves(0)
        if run >> 2 < n_given:
            elements = load(x, start + (run >> 2) * (2 * GROUP), run & 3)
        return elements

    def put(elements: Any, factor: Any, out: Any, at: int, sums_start: int, run: int, thread: int) -> None:
        if is_bfloat16:
            elements = scaled_bfloat16(elements, factor)
        if panel:
            part, group = run // (PART // 8), (run >> 2) % (PART // GROUP)
            store_in_panel(
                out, at + part * n_bytes_of_panel + group * (64 * panel) + (run & 3) * 4, elements, int64(16 * panel)
            )
        else:
            store_halves(out, at + 16 * run, elements)
        if has_minima:
            total = plus_lane(sum_of_halves(elements), int32(1), thread)
            number = run >> 1
            if elements_of_sum == GROUP:
                total = plus_lane(total, int32(2), thread)
                number = run >> 2
            # Eight sums take 64 bytes: 16 for the numbers k and k + 4, as `multiply_sums` loads them.
            if run & (elements_of_sum // 8 - 1) == 0:
                if panel:
                    sums_start += number // sums_of_part * n_bytes_of_panel
                    number = number % sums_of_part
                place = (number >> 3) * 64 + (number & 3) * 16 + ((number >> 2) & 1) * 4
                store_sum(out, sums_start + place, total)

    register_functions(load, load_run_or_zeros, put)
    return load_run_or_zeros, put
