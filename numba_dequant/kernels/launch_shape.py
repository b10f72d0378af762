"""How a kernel's work is cut into thread blocks and threads."""

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
    """What each thread block and each thread of a kernel does.

    Attributes:
        tile_elements: elements that one thread block writes.
        threads: threads per thread block.
        runs: runs of eight elements per thread, `threads` runs apart so that neighbours store side by side.
    """

    tile_elements: int
    threads: int
    runs: int

    def thread_blocks(self, n_elements: int) -> int:
        """Thread blocks that cover `n_elements`."""
        return -(-n_elements // self.tile_elements)


def launch_shape(name: str, fmt: Format) -> LaunchShape:
    """The mapping of that name for a format.

    ``"tile"`` gives a thread block a tile of consecutive quant blocks, 4096 elements: the fast one.
    ``"block"`` gives it one quant block: exactly one thread block per quant block, the one to read.

    Raises:
        OptionError: there is no such mapping.
    """
    if not isinstance(name, str) or name not in MAPPINGS:
        raise OptionError(f"mapping must be one of {', '.join(map(repr, MAPPINGS))}, got {shown(name)}")
    return _mapping(name, fmt)


@cache
def _mapping(name: str, fmt: Format) -> LaunchShape:
    if name == "block":
        # A plain array has no blocks to speak of: a thread block takes one run.
        elements = max(fmt.block_size, RUN)
        return LaunchShape(elements, elements // RUN, 1)
    elements = -(-TILE_THREADS * TILE_RUNS * RUN // fmt.block_size) * fmt.block_size
    return LaunchShape(elements, -(-elements // (TILE_RUNS * RUN)), TILE_RUNS)


def tile_directory(
    mapping: LaunchShape, data_starts: NDArray[np.int64], out_starts: NDArray[np.int64], n_elements: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """The table of a launch over many tensors, none of them empty, and the number of its tiles.

    It has a column per tensor, in four rows: the number of its first tile, counted through all the tensors; the byte at
    which its blocks start; the element at which its values start; and how many elements it has.
    """
    tiles = -(-n_elements // mapping.tile_elements)
    ends = tiles.cumsum()
    return np.stack([ends - tiles, data_starts, out_starts, n_elements]), int(ends[-1])
