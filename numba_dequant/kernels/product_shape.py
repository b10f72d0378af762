"""How the work of a product is divided, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

from numba_dequant.format import Format
from numba_dequant.halves import RUNS

ROWS = 16
"""Rows of a tile."""

WIDTHS = (8, 16, 32)
"""Columns that a kernel multiplies at a time."""

PANEL_WIDTHS = (32, 64, 128)
"""Columns that the kernel for many columns multiplies at a time on compute capability 9.0."""

GROUP = 32
"""Elements that the tensor cores multiply together."""

PART = 256
"""Elements of a part, which is a whole number of blocks."""

RESULT_PADDING = 4
"""Numbers after the results of a column in shared memory."""

PREPARE_THREADS = 256
"""Threads of a thread block that prepares a column."""


@dataclass(frozen=True)
class ProductShape:
    """The work of a thread block, whose warps share a tile of 16 rows.

    Attributes:
        warps: warps of a thread block. Each takes every n-th chunk of the tile.
        stages: chunks of each warp that are in shared memory at a time.
        parts: parts of 256 elements in a chunk.
        columns: columns that it multiplies, one of `WIDTHS`; or one column of float16.
        is_aligned: whether all rows start at multiples of 16 bytes.
        overlaps: whether the kernel may start before the preceding kernel has ended.
        experts: whether there are several matrices, and routes that say which columns each matrix multiplies.
        resident: thread blocks that a multiprocessor must have registers for.
        streams: whether each warp copies the elements of one column to shared memory chunk by chunk. Otherwise, the
            thread block copies the whole column before its first tile.
    """

    warps: int
    stages: int
    parts: int
    columns: int
    is_aligned: bool
    overlaps: bool
    experts: bool = False
    resident: int = 2
    streams: bool = False

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return 32 * self.warps


@dataclass(frozen=True)
class WideShape:
    """The work of a thread block of the kernel for many columns. Each warp has a tile of 16 rows of its own.

    Attributes:
        is_aligned: whether all rows start at multiples of 16 bytes.
        overlaps: whether the kernel may start before the preceding kernel has ended.
    """

    is_aligned: bool
    overlaps: bool

    rows = 64
    threads = 128
    columns = 64
    panel = 0
    """0: the columns are prepared one after the other, not in panels."""
    stages = 2
    """Number of parts, each of all rows and columns, that are in shared memory at a time."""
    parts = 1
    """Parts of 256 elements that are copied at a time."""


@dataclass(frozen=True)
class PanelShape:
    """The work of a thread block on compute capability 9.0, whose tensor cores read the columns from shared memory.

    Attributes:
        columns: the columns that it multiplies at a time, one of `PANEL_WIDTHS`.
        is_aligned: whether all rows start at multiples of 16 bytes.
        rows: rows that it multiplies at a time, a multiple of 64.
        resident: thread blocks that a multiprocessor must have registers for.
    """

    columns: int
    is_aligned: bool
    rows: int
    resident: int

    overlaps = True
    stages = 2
    parts = 1

    @property
    def threads(self) -> int:
        """Threads of a thread block: a warp for 16 rows."""
        return 2 * self.rows

    @property
    def panel(self) -> int:
        """Columns of a panel. They are prepared together: a part of each column, then the next part of each."""
        return self.columns


def has_products(fmt: Format) -> bool:
    """Whether the tensor cores can multiply this format: a part is a whole number of blocks, each of whole groups."""
    return fmt.decode is not None and fmt.block_size % GROUP == 0 and PART % fmt.block_size == 0


def part_bytes(fmt: Format) -> int:
    """Bytes of 256 elements of a row."""
    return PART // fmt.block_size * fmt.type_size


def sum_bytes(fmt: Format) -> int:
    """Bytes of the sums of a part of a column: two TF32 numbers for each minimum; 0 if the format has no minima."""
    factors = fmt.factors
    return 0 if factors is None or factors.minimum is None else PART // factors.minimum_size * 8


def column_bytes(fmt: Format, n_elements: int) -> int:
    """Bytes of a column that is prepared for the tensor cores: its elements as float16, and their sums."""
    return -(-n_elements // PART) * (2 * PART + sum_bytes(fmt))


def column_stride(fmt: Format) -> int:
    """Bytes between the columns of a part in shared memory, chosen so that two columns are in different banks."""
    n_bytes = 2 * PART + sum_bytes(fmt)
    return n_bytes + (64 - n_bytes) % 128


def row_stride(fmt: Format, shape: ProductShape | WideShape | PanelShape) -> int:
    """Bytes between the rows of a chunk in shared memory, chosen so that eight rows are in different banks."""
    n_bytes = shape.parts * part_bytes(fmt)
    load_bytes = 8 if fmt.factors is None or fmt.factors.order is RUNS else 4
    stride = -(-(n_bytes + (0 if shape.is_aligned and n_bytes % 16 == 0 else 15)) // 16) * 16
    while stride % (8 * load_bytes) != 4 * load_bytes:
        stride += 16
    return stride


def result_bytes(shape: ProductShape) -> int:
    """Bytes of the results of all warps. They have two places, used in turn, so that one barrier per tile is enough."""
    return 2 * shape.warps * ROWS * shape.columns * 4


def many_result_bytes(shape: WideShape | PanelShape) -> int:
    """Bytes of the results of a kernel for many columns. Four numbers after each column avoid conflicts of banks."""
    return shape.columns * (shape.rows + RESULT_PADDING) * 4


def table_bytes(fmt: Format) -> int:
    """Bytes of the table at the start of shared memory."""
    return 0 if fmt.factors is None or fmt.factors.table is None else fmt.factors.table.items.nbytes


def shared_bytes(fmt: Format, shape: ProductShape, n_elements: int) -> int:
    """Bytes of shared memory of a thread block."""
    stages = shape.warps * shape.stages * ROWS * row_stride(fmt, shape)
    column = 16  # unaligned loads read up to eight bytes after the last row
    if shape.columns == 1:
        column = shape.warps * column_bytes(fmt, shape.parts * PART) if shape.streams else column_bytes(fmt, n_elements)
    return table_bytes(fmt) + result_bytes(shape) + stages + column


def panel_bytes(fmt: Format, columns: int) -> int:
    """Bytes of a panel: one part of some columns."""
    return columns * column_bytes(fmt, PART)


def stage_bytes(fmt: Format, shape: PanelShape) -> int:
    """Bytes of a part of all rows and columns in shared memory, or of all results, which take the same place."""
    weights = -(-shape.rows * row_stride(fmt, shape) // 128) * 128
    return max(panel_bytes(fmt, shape.columns) + weights, -(-many_result_bytes(shape) // 128) * 128)


def wide_shared_bytes(fmt: Format, shape: WideShape | PanelShape) -> int:
    """Bytes of shared memory of a thread block that multiplies many columns."""
    if isinstance(shape, PanelShape):
        # Everything starts at a multiple of 128 bytes; 128 bytes are for the barriers.
        start = -(-table_bytes(fmt) // 128) * 128 + 128
        return start + shape.stages * stage_bytes(fmt, shape) + 16
    start, stage = table_bytes(fmt), shape.rows * row_stride(fmt, shape) + shape.columns * column_stride(fmt)
    # Unaligned loads read up to eight bytes after the last row.
    return start + max(shape.stages * stage + 16, many_result_bytes(shape))
