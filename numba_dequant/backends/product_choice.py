"""Which shape of a product kernel is the fastest, and how many thread blocks it gets, as measured on an H100."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba_dequant.format import Format
from numba_dequant.kernels.product_shape import (
    PART,
    WIDTHS,
    ProductShape,
    part_bytes,
    shared_bytes,
    sum_bytes,
    table_bytes,
)

if TYPE_CHECKING:
    from numba_dequant.backends.gpu import Gpu

WARPS = (4, 5, 6, 7, 8)
"""Warps of a thread block."""

WARPS_OF_WAVE = (8, 10)
"""Warps of a thread block, if all thread blocks run at once; see `_shape_of_one_column`."""

WAVE = 2
"""If there are at most this many tiles for each multiprocessor, all thread blocks of a product run at once."""

RESERVED = 1024
"""Bytes of shared memory that CUDA reserves for each thread block."""

LONG_COLUMN = 8192
"""With more elements, each warp copies its own chunks of the column, when it needs them."""

BYTES_OF_LIGHT_PART = 136
"""Bytes of 256 weights up to which products take longer to compute than to read."""

BYTES_OF_HEAVY_PART = 256
"""Bytes of 256 weights from which products of eight columns take longer to read than to compute."""

BYTES_OF_TINY_PART = 36
"""Bytes of 256 weights up to which two thread blocks do not have enough loads in flight."""

BYTES_OF_LIGHT_TABLE = 1536
"""Bytes of a table that each thread block can copy for one tile."""

MANY_TILES = 2048
"""With at least this many tiles, thread blocks with memory for one chunk are faster.

More of them fit on a multiprocessor.
"""


def launch_size(gpu: Gpu, fmt: Format, shape: ProductShape, tiles: int, n_elements: int) -> tuple[int, int]:
    """The number of thread blocks for `tiles` tiles, and the bytes of shared memory of each.

    If all thread blocks of a product of one column run at once, each takes so much shared memory that a multiprocessor
    holds only `shape.resident` of them. So no thread block of the next product starts beside them. If one did, the
    multiprocessors would later run different numbers of thread blocks, and all would wait for those with the most.
    """
    n_bytes = shared_bytes(fmt, shape, n_elements)
    if shape.columns == WIDTHS[0] and shape.overlaps and not shape.experts:
        return min(tiles, max(min(gpu.shared_memory // n_bytes, shape.resident), 1) * gpu.processors), n_bytes
    is_one_column = shape.columns == 1 and shape.overlaps
    if is_one_column and tiles <= WAVE * gpu.processors:
        n_bytes = max(n_bytes, (gpu.shared_memory + RESERVED) // (shape.resident + 1) - RESERVED + 1)
    per_processor = max(gpu.shared_memory // n_bytes, 1)
    if is_one_column and not (shape.stages > 1 and part_bytes(fmt) <= BYTES_OF_TINY_PART):
        per_processor = min(per_processor, shape.resident)
    has_one_tile = shape.stages == 1
    if has_one_tile and is_one_column and WAVE * gpu.processors < tiles < MANY_TILES:
        # More thread blocks than fit at once are balanced better, but each prepares the column for one tile.
        has_one_tile = (
            part_bytes(fmt) <= BYTES_OF_LIGHT_PART and sum_bytes(fmt) == 0 and table_bytes(fmt) <= BYTES_OF_LIGHT_TABLE
        )
    return tiles if has_one_tile else min(tiles, per_processor * gpu.processors), n_bytes


def product_shape(
    gpu: Gpu, fmt: Format, tiles: int, n_elements: int, columns: int, is_aligned: bool, has_experts: bool = False
) -> ProductShape:
    """The fastest shape for `tiles` tiles of 16 rows, and `columns` columns.

    If possible, a thread block takes at most half of the shared memory, so that a multiprocessor can run two of them.
    The second may belong to the next product.
    """
    overlaps = gpu.capability >= (9, 0)
    if columns == 1 and overlaps:
        found = _shape_of_one_column(gpu, fmt, tiles, n_elements, is_aligned)
        if found is not None:
            return found
    if columns == WIDTHS[0] and overlaps and not has_experts:
        shape = _shape_of_eight_columns(gpu, fmt, tiles, n_elements, is_aligned)
        if shared_bytes(fmt, shape, n_elements) <= gpu.shared_memory:
            return shape
    stages_and_parts = ((1, 2), (1, 1)) if tiles >= MANY_TILES else ((2, 2), (2, 1), (1, 1))
    choices = [
        ProductShape(
            _warps(n_elements, parts, width),
            stages,
            parts,
            width,
            is_aligned,
            overlaps,
            has_experts,
            resident=3 if stages == 1 else 2,
        )
        for width in ((1, WIDTHS[0]) if columns == 1 else (columns,))
        for stages, parts in (stages_and_parts if width < 32 else ((2, 2), (2, 1), (1, 1)))
    ]
    for share in (2, 1):
        for shape in choices:
            if shared_bytes(fmt, shape, n_elements) <= gpu.shared_memory // share:
                return shape
    return choices[-1]


def _shape_of_one_column(gpu: Gpu, fmt: Format, tiles: int, n_elements: int, is_aligned: bool) -> ProductShape | None:
    """The fastest shape for one column if there are not very many tiles, as measured on an H100; None if too large.

    Up to two tiles for each multiprocessor are one wave: all warps start together and wait for the same things.
    Many warps with one chunk each are then faster than fewer warps that copy ahead.
    """
    if tiles >= MANY_TILES:
        return None

    def fits(shape: ProductShape, times: int) -> bool:
        return times * (shared_bytes(fmt, shape, n_elements) + RESERVED) <= gpu.shared_memory + RESERVED

    if tiles <= WAVE * gpu.processors:
        warps = _warps(n_elements, 2, 1, WARPS_OF_WAVE)
        shape = ProductShape(warps, 1, 2, 1, is_aligned, overlaps=True, resident=WAVE, streams=n_elements > LONG_COLUMN)
        return shape if fits(shape, WAVE) else None
    warps = _warps(n_elements, 2, 1)
    ahead = ProductShape(warps, 2, 2, 1, is_aligned, overlaps=True)
    # Formats with blocks of fewer than 256 elements need more registers than each of three thread blocks can have.
    three = ProductShape(warps, 1, 2, 1, is_aligned, overlaps=True, resident=3)
    if fits(three, 3) and (fmt.block_size == PART or not fits(ahead, 2)):
        return three
    return ahead if fits(ahead, 1) else None


def _shape_of_eight_columns(gpu: Gpu, fmt: Format, tiles: int, n_elements: int, is_aligned: bool) -> ProductShape:
    """The fastest shape for up to eight columns, as measured on an H100.

    What shared memory leaves of the first-level cache holds the columns, so that few warps with one chunk each are
    faster than many chunks in flight. Each thread block goes on to its next tile, whose first chunks it copies early.
    """
    stages, parts, resident = 1, 2, 2
    if n_elements > LONG_COLUMN:  # the cache does not hold the columns
        stages, parts = 2, 1
    elif part_bytes(fmt) >= BYTES_OF_HEAVY_PART:
        stages = 2
    elif part_bytes(fmt) < BYTES_OF_LIGHT_PART and tiles > WAVE * gpu.processors:
        resident = 3
    warps = _warps(n_elements, parts, WIDTHS[0])
    return ProductShape(warps, stages, parts, WIDTHS[0], is_aligned, overlaps=True, resident=resident)


def _warps(n_elements: int, parts: int, columns: int, choices: tuple[int, ...] = WARPS) -> int:
    """The number of warps that share a tile: as many as possible, with an equal number of chunks if possible."""
    if columns == 32:
        return 4  # more would not have enough registers
    chunks = -(-n_elements // (PART * parts))
    return max(choices, key=lambda warps: (chunks / (-(-chunks // warps) * warps), warps))
