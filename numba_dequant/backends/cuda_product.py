"""Products with compressed weights on a GPU: which kernels, how they are launched, and their temporary memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba_dequant.backends.gpu import Gpu
from numba_dequant.backends.product_choice import RESERVED, launch_size, product_shape
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.format import Format
from numba_dequant.kernels.compiler import prepare_kernel, product_kernel, routes_kernel, wide_kernel
from numba_dequant.kernels.product_shape import (
    GROUP,
    PANEL_WIDTHS,
    PART,
    PREPARE_THREADS,
    ROWS,
    WIDTHS,
    PanelShape,
    ProductShape,
    WideShape,
    column_bytes,
    has_products,
    wide_shared_bytes,
)

INPUT_TYPES = ("float16", "bfloat16")
"""The types of columns that the tensor cores take."""

EXPERT_COLUMNS = 8
"""Columns that a kernel multiplies at a time if there are experts."""

MOST_COLUMNS = 128
"""With more columns, it is faster to dequantize the weight first and to multiply with cuBLAS."""

FEW_COLUMNS = 16
"""With more columns, the tensor cores of compute capability 9.0 read the columns from shared memory."""

ROWS_OF_PROCESSOR = 48
"""With more than 32 columns and fewer rows per multiprocessor, cuBLAS is faster too, except on compute capability 9.0.

On other GPUs, thread blocks do not share the work of a row.
"""

LEAST_PARTS = 2
"""Minimum parts of 256 elements for each thread block, if thread blocks share the work of a row."""


@dataclass(frozen=True)
class Operands:
    """What a product reads and writes, as addresses in the memory of one GPU.

    Attributes:
        fmt: format of the weights.
        weight: address of the blocks.
        n_rows: rows of weights.
        n_elements: elements of a row.
        x: address of the columns, a multiple of 16; one column after the other.
        x_dtype: the type of their elements, one of `INPUT_TYPES`.
        n_columns: number of columns.
        out: address of the results, one column after the other.
        dtype: the output type.
        bias: address of a number for each row, or 0.
        bias_dtype: the type of the bias.
    """

    fmt: Format
    weight: int
    n_rows: int
    n_elements: int
    x: int
    x_dtype: str
    n_columns: int
    out: int
    dtype: str
    bias: int = 0
    bias_dtype: str | None = None


class Experts(NamedTuple):
    """Which expert (matrix) each column is multiplied with.

    Attributes:
        number: number of experts.
        ids: address of the chosen experts, int64 of shape (columns, `chosen`).
        chosen: number of experts that each column has.
    """

    number: int
    ids: int
    chosen: int


class _Plan(NamedTuple):
    kernel: Any
    shape: ProductShape
    thread_blocks: int
    shared_bytes: int


def why_not(gpu: Gpu, fmt: Format, x_dtype: str, weight: int = 0) -> str | None:
    """Why the tensor cores of a GPU cannot multiply such weights and columns; None if they can. Part of an error."""
    if gpu.capability < (8, 0):
        return f"it needs compute capability 8.0, but the GPU has {gpu.capability[0]}.{gpu.capability[1]}"
    if not has_products(fmt):
        return f"{fmt.name} has no blocks of 32 to 256 elements"
    if x_dtype not in INPUT_TYPES:
        return f"the columns hold {x_dtype}, not {' or '.join(INPUT_TYPES)}"
    if weight % fmt.alignment:
        return f"the address of the weights is not a multiple of {fmt.alignment}"
    return None


def is_slower(gpu: Gpu, n_rows: int, n_columns: int) -> bool:
    """Whether the kernels for blocks are slower than dequantizing the weight and multiplying with cuBLAS.

    The limits were measured on an H100 (`benchmarks/test_products.py`).
    """
    if n_columns <= WIDTHS[-1]:
        return False
    return n_columns > MOST_COLUMNS or (not has_panels(gpu) and n_rows < ROWS_OF_PROCESSOR * gpu.processors)


def multiply(
    gpu: Gpu, given: Operands, allocate: Callable[[int], int], stream: int, *, weight_is_constant: bool = False
) -> None:
    """Queue the kernels of a product on the current GPU.

    Args:
        gpu: the current GPU, for which `why_not` is None.
        given: what to read and write.
        allocate: takes a number of bytes, and returns the address of temporary memory.
        stream: the handle of the stream.
        weight_is_constant: whether the preceding kernel on the stream does not write the weights. This kernel may then
            read them before the preceding one has ended.
    """
    fmt, n_columns = given.fmt, given.n_columns
    if not given.n_rows or not n_columns:
        return
    row_bytes, n_groups = given.n_elements // fmt.block_size * fmt.type_size, given.n_elements // GROUP
    is_aligned = given.weight % 16 == 0 and row_bytes % 16 == 0
    if n_columns > (FEW_COLUMNS if has_panels(gpu) else WIDTHS[-1]) and _multiply_wide(
        gpu, given, row_bytes, is_aligned, allocate, stream, weight_is_constant
    ):
        return
    plan = _plan(gpu, given, width_of(n_columns, given.x_dtype), is_aligned)
    width, n_bytes = plan.shape.columns, column_bytes(fmt, given.n_elements)
    x, powers = given.x, 0
    if width > 1:
        x, powers = _prepare(gpu, given, -(-n_columns // width) * width, allocate, stream, plan.shape.overlaps)
    size = numpy_dtype(given.dtype).itemsize
    for first in range(0, n_columns, width):
        count = min(width, n_columns - first)
        arguments = (
            given.weight, given.n_rows, row_bytes, n_groups, x + first * n_bytes, count, powers + 4 * first, given.bias,
            given.out + first * given.n_rows * size, 0, 1,
        )  # fmt: skip
        overlaps = plan.shape.overlaps and weight_is_constant
        gpu.launch(plan.kernel, plan.thread_blocks, plan.shape.threads, arguments, stream, plan.shared_bytes, overlaps)


def _multiply_wide(
    gpu: Gpu, given: Operands, row_bytes: int, is_aligned: bool, allocate: Callable[[int], int], stream: int,
    weight_is_constant: bool,
) -> bool:  # fmt: skip
    """Queue the kernel for many columns. Returns whether the GPU has enough shared memory for it."""
    fmt, bias = given.fmt, given.bias_dtype if given.bias else None
    shape = wide_shape(gpu, fmt, given.n_columns, is_aligned)
    n_shared = wide_shared_bytes(fmt, shape)
    if n_shared > gpu.shared_memory:
        return False
    key = fmt, given.dtype, bias, shape
    kernel = gpu.kernels.get(key)
    if kernel is None:
        kernel = gpu.kernels[key] = gpu.load_kernel(wide_kernel(fmt, given.dtype, bias, shape), gpu.shared_memory)
    more: tuple[int, ...] = ()
    times = -(-given.n_columns // shape.columns)
    thread_blocks: int | tuple[int, int] = (-(-given.n_rows // shape.rows), times)
    if isinstance(shape, PanelShape):
        n_parts = -(-given.n_rows // shape.rows) * times * -(-given.n_elements // PART)
        resident = min(shape.resident, (gpu.shared_memory + RESERVED) // (n_shared + RESERVED))
        thread_blocks = min(gpu.processors * resident, -(-n_parts // LEAST_PARTS))
    n_flags = thread_blocks if isinstance(thread_blocks, int) else 0
    n_prepared = times * shape.columns
    x, powers = _prepare(gpu, given, n_prepared, allocate, stream, shape.overlaps, shape.panel, n_flags)
    if n_flags:
        more = allocate(n_flags * shape.rows * shape.columns * 4), powers + 4 * n_prepared
    arguments = (
        given.weight, given.n_rows, row_bytes, given.n_elements // GROUP, x, given.n_columns, powers, given.bias,
        given.out, *more,
    )  # fmt: skip
    overlaps = shape.overlaps and weight_is_constant
    gpu.launch(kernel, thread_blocks, shape.threads, arguments, stream, n_shared, overlaps)
    return True


def has_panels(gpu: Gpu) -> bool:
    """Whether the tensor cores can read the columns from shared memory. Later GPUs have other instructions for it."""
    return gpu.capability == (9, 0)


def wide_shape(gpu: Gpu, fmt: Format, n_columns: int, is_aligned: bool) -> WideShape | PanelShape:
    """The fastest way to divide a product of many columns."""
    if not has_panels(gpu):
        return WideShape(is_aligned, overlaps=gpu.capability >= (9, 0))
    width = next((width for width in PANEL_WIDTHS if width >= n_columns), PANEL_WIDTHS[-1])
    # Two thread blocks of a multiprocessor hide each other's waits, if there are enough registers.
    return PanelShape(width, is_aligned, 128, 1) if width == PANEL_WIDTHS[-1] else PanelShape(width, is_aligned, 64, 2)


def _prepare(
    gpu: Gpu,
    given: Operands,
    n_prepared: int,
    allocate: Callable[[int], int],
    stream: int,
    overlaps: bool,
    panel: int = 0,
    n_flags: int = 0,
) -> tuple[int, int]:
    """Queue the kernel that prepares the columns.

    Returns:
        The addresses of the prepared columns, and of their powers, which are followed by the flags.
    """
    n_bytes, n_groups = column_bytes(given.fmt, given.n_elements), given.n_elements // GROUP
    x = allocate(n_prepared * (n_bytes + 4) + 4 * n_flags)
    powers = x + n_prepared * n_bytes
    key = given.fmt, given.x_dtype, "columns", panel
    kernel = gpu.kernels.get(key)
    if kernel is None:
        kernel = gpu.kernels[key] = gpu.load_kernel(prepare_kernel(given.fmt, given.x_dtype, overlaps, panel))
    slices = -(-n_groups * 4 // PREPARE_THREADS)
    arguments = given.x, given.n_columns, n_groups, x, powers, n_flags
    # It reads nothing before earlier kernels have ended.
    gpu.launch(kernel, (n_prepared, slices), PREPARE_THREADS, arguments, stream, overlaps=overlaps)
    return x, powers


def multiply_experts(gpu: Gpu, given: Operands, experts: Experts, allocate: Callable[[int], int], stream: int) -> None:
    """Queue the kernels that multiply each column with the matrices of its experts, on the current GPU.

    `given.weight` holds the matrices of all experts, each of `given.n_rows` rows. The results are in this order: column
    0 with its first expert, column 0 with its second expert, and so on.
    """
    fmt, n_pairs = given.fmt, given.n_columns * experts.chosen
    if not given.n_rows or not n_pairs:
        return
    row_bytes, n_groups = given.n_elements // fmt.block_size * fmt.type_size, given.n_elements // GROUP
    is_aligned = given.weight % 16 == 0 and row_bytes % 16 == 0
    plan = _plan(gpu, given, EXPERT_COLUMNS, is_aligned, has_experts=True)
    overlaps = plan.shape.overlaps
    routes = allocate(8 * (experts.number + 1 + n_pairs))
    kernel = gpu.kernels.get("routes")
    if kernel is None:
        kernel = gpu.kernels["routes"] = gpu.load_kernel(routes_kernel(overlaps))
    found = experts.ids, n_pairs, experts.number, routes
    gpu.launch(kernel, 1, PREPARE_THREADS, found, stream, overlaps=overlaps)
    x, powers = _prepare(gpu, given, given.n_columns, allocate, stream, overlaps)
    arguments = (
        given.weight, given.n_rows, row_bytes, n_groups, x, given.n_columns, powers, given.bias, given.out, routes,
        experts.chosen,
    )  # fmt: skip
    thread_blocks = plan.thread_blocks, experts.number
    gpu.launch(plan.kernel, thread_blocks, plan.shape.threads, arguments, stream, plan.shared_bytes, overlaps)


def width_of(n_columns: int, x_dtype: str) -> int:
    """The number of columns that a kernel multiplies at a time."""
    if n_columns == 1 and x_dtype == "float16":
        return 1
    return next((width for width in WIDTHS if width >= n_columns), WIDTHS[-1])


def _plan(gpu: Gpu, given: Operands, columns: int, is_aligned: bool, has_experts: bool = False) -> _Plan:
    fmt, bias = given.fmt, given.bias_dtype if given.bias else None
    key = fmt, given.dtype, bias, given.n_rows, given.n_elements, columns, is_aligned, has_experts
    plan: _Plan | None = gpu.kernels.get(key)
    if plan is None:
        tiles = -(-given.n_rows // ROWS)
        shape = product_shape(gpu, fmt, tiles, given.n_elements, columns, is_aligned, has_experts)
        kernel = gpu.load_kernel(product_kernel(fmt, given.dtype, bias, shape), gpu.shared_memory)
        plan = gpu.kernels[key] = _Plan(kernel, shape, *launch_size(gpu, fmt, shape, tiles, given.n_elements))
    return plan
