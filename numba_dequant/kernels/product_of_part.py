"""The inner part of a product: 16 rows times some columns, over 256 elements, in one warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from numba_dequant.format import Factors, Format
from numba_dequant.halves import (
    add_scaled,
    multiply,
    multiply_first_panel,
    multiply_panel,
    multiply_sums,
    rounded_halves,
    wait_for_panels,
)
from numba_dequant.kernels.dequantize import IS_SIMULATED
from numba_dequant.kernels.product_shape import GROUP, PART, sum_bytes

if not IS_SIMULATED:
    from numba_dequant.kernels import intrinsics_cuda, intrinsics_mma  # noqa: F401 registers the primitives
    from numba_dequant.kernels.intrinsics import register_decode


def register_functions(*functions: Callable[..., Any] | None) -> None:
    """Let kernels call these functions. Numba compiles a function at its first call."""
    for function in functions:
        if function is not None and not IS_SIMULATED:
            register_decode(intrinsics_cuda.target, function)


def factors_of(fmt: Format) -> Factors:
    """The factors of a format. If it has none, the quants are its values rounded to float16, and the scale is 1."""
    if fmt.factors is not None:
        return fmt.factors
    decode = fmt.decode
    assert decode is not None

    def quants(block: Any, at: int, run: int) -> Any:
        return rounded_halves(decode(block, at, run))

    def scale(block: Any, at: int) -> Any:
        return np.float32(1)

    register_functions(decode)
    return Factors(quants, scale)


def product_of_panel(fmt: Format, no_sums: Callable[[], Any], columns: int) -> Callable[..., Any]:
    """A function that adds the products of one part and one tile of columns to the results of a thread.

    ``panel_product(sums, tile, upper, lower, quarter, x, at, sums_at, thread)``: as `product_of_part`, but `at` is the
    byte of `x` where the tile of columns starts.
    """
    factors = _functions(fmt)
    quants, scale, type_size = factors.quants, factors.scale, fmt.type_size
    groups_of_block, bytes_of_group, sums_step = fmt.block_size // GROUP, 64 * columns, 8 * sum_bytes(fmt)
    add_minima = _product_of_minima(fmt, factors, no_sums)

    def weights_of(tile: Any, start: int, quarter: int, group: int) -> Any:
        run = group % groups_of_block * 4 + quarter
        return quants(tile, start + group // groups_of_block * type_size, run)

    def next_group(
        state: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, thread: int, group: int
    ) -> Any:
        # The tensor cores multiply one group while this thread computes the weights of the next.
        sums, of_block, above, below = state
        if group % groups_of_block:
            of_block = multiply_panel(of_block, above, below, x, at + group * bytes_of_group, thread)
        else:
            of_block = multiply_first_panel(of_block, above, below, x, at + group * bytes_of_group, thread)
        if group + 1 < PART // GROUP:
            above, below = weights_of(tile, upper, quarter, group + 1), weights_of(tile, lower, quarter, group + 1)
        if group % groups_of_block == groups_of_block - 1:
            block = group // groups_of_block * type_size
            of_block = wait_for_panels(of_block)
            sums = add_scaled(sums, of_block, scale(tile, upper + block), scale(tile, lower + block))
        return sums, of_block, above, below

    def panel_product(
        sums: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, sums_at: int, thread: int
    ) -> Any:
        above, below = weights_of(tile, upper, quarter, 0), weights_of(tile, lower, quarter, 0)
        state = sums, no_sums(), above, below
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 0)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 1)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 2)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 3)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 4)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 5)
        state = next_group(state, tile, upper, lower, quarter, x, at, thread, 6)
        sums = next_group(state, tile, upper, lower, quarter, x, at, thread, 7)[0]
        return add_minima(sums, tile, upper, lower, quarter, x, sums_at, sums_step, thread)

    register_functions(weights_of, next_group, panel_product)
    return panel_product


def product_of_part(fmt: Format, no_sums: Callable[[], Any]) -> Callable[..., Any]:
    """A function that adds the products of one part to the results of a thread, which are four for every 8 columns.

    It is ``part_product(sums, tile, upper, lower, quarter, x, at, sums_at, step, thread)``. In the two rows of this
    thread, the part starts at the bytes `upper` and `lower` of `tile`. In `x`, the elements of this part of the column
    start at byte `at`, and their sums at byte `sums_at`. `step` is the number of bytes to the column that is 8 further.
    """
    factors = _functions(fmt)
    every_group = _product_of_groups(fmt, factors, no_sums)
    add_minima = _product_of_minima(fmt, factors, no_sums)

    def part_product(
        sums: Any,
        tile: Any,
        upper: int,
        lower: int,
        quarter: int,
        x: Any,
        at: int,
        sums_at: int,
        step: int,
        thread: int,
    ) -> Any:
        sums = every_group(sums, tile, upper, lower, quarter, x, at, step, thread)
        return add_minima(sums, tile, upper, lower, quarter, x, sums_at, step, thread)

    register_functions(part_product)
    return part_product


def _functions(fmt: Format) -> Factors:
    """The factors of a format, as kernels call them."""
    factors = factors_of(fmt)
    functions: dict[str, Any] = {name: getattr(factors, name) for name in ("quants", "scale", "minimum", "offset")}
    register_functions(*functions.values())
    if IS_SIMULATED:
        plain: dict[str, Any] = {name: function and _plainly(function) for name, function in functions.items()}
        factors = replace(factors, **plain)
    return factors


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    def with_plain_integers(block: Any, *numbers: Any) -> Any:
        # The simulated kernel passes integers of NumPy, which would overflow. Infinite and NaN scales are allowed.
        with np.errstate(all="ignore"):
            return function(block, *map(int, numbers))

    return with_plain_integers


def _product_of_groups(fmt: Format, factors: Factors, no_sums: Callable[[], Any]) -> Callable[..., Any]:
    """A function that adds the products of the quants of the eight groups of 32 elements of a part.

    Its state is a pair: the results, and the products of the current block before they are scaled.
    """
    quants, scale = factors.quants, factors.scale
    groups_of_block, type_size = fmt.block_size // GROUP, fmt.type_size

    def of_group(
        state: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, step: int, thread: int, group: int
    ) -> Any:
        sums, of_block = state
        upper += group // groups_of_block * type_size
        lower += group // groups_of_block * type_size
        run = group % groups_of_block * 4 + quarter
        column = at + group * (2 * GROUP)
        of_block = multiply(of_block, quants(tile, upper, run), quants(tile, lower, run), x, column, step, thread)
        if group % groups_of_block == groups_of_block - 1:
            return add_scaled(sums, of_block, scale(tile, upper), scale(tile, lower)), no_sums()
        return sums, of_block

    def every_group(
        sums: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, step: int, thread: int
    ) -> Any:
        # Written out, because the compiler does not unroll such a long loop.
        state = (sums, no_sums())
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 0)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 1)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 2)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 3)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 4)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 5)
        state = of_group(state, tile, upper, lower, quarter, x, at, step, thread, 6)
        return of_group(state, tile, upper, lower, quarter, x, at, step, thread, 7)[0]

    register_functions(of_group, every_group)
    return every_group


def _product_of_minima(fmt: Format, factors: Factors, no_sums: Callable[[], Any]) -> Callable[..., Any]:
    """A function that adds the products of the minima of one part."""
    minimum: Any = factors.minimum
    offset: Any = factors.offset
    type_size = fmt.type_size
    has_offset = offset is not None
    n_minima, minima_of_block = PART // factors.minimum_size, fmt.block_size // factors.minimum_size

    def nothing(
        sums: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, step: int, thread: int
    ) -> Any:
        return sums

    def of_minima(
        sums: Any, tile: Any, upper: int, lower: int, quarter: int, x: Any, at: int, step: int, thread: int
    ) -> Any:
        total = no_sums() if has_offset else sums
        for first in range(0, n_minima, 8):
            early, late = first + quarter, first + quarter + 4
            early_block, late_block = early // minima_of_block * type_size, late // minima_of_block * type_size
            early, late = early % minima_of_block, late % minima_of_block
            minima = (
                minimum(tile, upper + early_block, early), minimum(tile, lower + early_block, early),
                minimum(tile, upper + late_block, late), minimum(tile, lower + late_block, late),
            )  # fmt: skip
            total = multiply_sums(total, minima, x, at + 8 * first, step, thread)
        if has_offset:
            total = add_scaled(sums, total, offset(tile, upper), offset(tile, lower))
        return total

    function = nothing if minimum is None else of_minima
    register_functions(function)
    return function
