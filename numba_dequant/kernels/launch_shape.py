"""How the work of a kernel is divided into thread blocks and threads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import RUN
from numba_dequant.errors import OptionError, shown
from numba_dequant.format import Format

MAPPINGS = ("tile", "block")
TILE_THREADS = 256
TILE_RUNS = 2


@dataclass(frozen=True)
class LaunchShape:
    """The work of each thread block and of each thread.

    Attributes:
        tile_elements: elements that one thread block writes.
        threads: threads per thread block.
        runs: runs of eight elements per thread, `threads` runs apart, so that the stores of a warp are coalesced.
    """

    tile_elements: int
    threads: int
    runs: int

    def thread_blocks(self, n_elements: int) -> int:
        """The number of thread blocks for `n_elements`."""
        return -(-n_elements // self.tile_elements)


def launch_shape(name: str, fmt: Format) -> LaunchShape:
    """The launch shape of the mapping `name` for a format.

    ``"tile"``: a thread block computes a tile of consecutive quant blocks, at least 4096 elements. This is the fast
    mapping.
    ``"block"``: a thread block computes one quant block. This is the simple mapping.

    Raises:
        OptionError: there is no such mapping.
    """
    if not isinstance(name, str) or name not in MAPPINGS:
        raise OptionError(f"mapping must be one of {', '.join(map(repr, MAPPINGS))}, got {shown(name)}")
    return _mapping(name, fmt)


@cache
def _mapping(name: str, fmt: Format) -> LaunchShape:
    if name == "block":
        # A plain array has blocks of one element; a thread block computes one run.
        elements = max(fmt.block_size, RUN)
        return LaunchShape(elements, elements // RUN, 1)
    elements = -(-TILE_THREADS * TILE_RUNS * RUN // fmt.block_size) * fmt.block_size
    return LaunchShape(elements, -(-elements // (TILE_RUNS * RUN)), TILE_RUNS)


def tile_directory(
    mapping: LaunchShape, data_starts: NDArray[np.int64], out_starts: NDArray[np.int64], n_elements: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """The table of a launch over many non-empty tensors, and the total number of tiles.

    The table is int64 of shape (4, number of tensors). Its rows are: the first tile of the tensor, counted over all
    tensors; the byte where its blocks start; the element where its values start; its number of elements.
    """
    tiles = -(-n_elements // mapping.tile_elements)
    ends = tiles.cumsum()
    return np.stack([ends - tiles, data_starts, out_starts, n_elements]), int(ends[-1])
