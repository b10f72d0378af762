"""Finds which bits of a block affect which elements, by flipping bits and comparing the results of `dequantize`.

Bit `8 * b + k` of a block is bit k of byte b; bit 0 is the lowest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import RUN

Dequantize = Callable[[NDArray[Any]], NDArray[np.float32]]

FIRST_BLOCKS = 128
"""Random blocks of the first round, in which every bit is flipped separately."""

ROUND = 1024
"""Random blocks of each later round."""

SIGHTINGS = 50
"""How often each effect of a bit must be seen before the search for its effects ends; some effects are rare."""

IDLE_ROUNDS = 4
"""Rounds after which a bit without a visible effect counts as having none."""

MAX_ROUNDS = 32


def bit_map(layout: np.dtype[np.void], block_size: int, dequantize: Dequantize, seed: int = 0) -> NDArray[np.bool_]:
    """Which elements each bit affects: bool, shape (bits of a block, `block_size`)."""
    rng = np.random.default_rng(seed)
    seen = np.zeros((8 * layout.itemsize, block_size), np.int64)

    def try_flips(n_blocks: int, groups: list[list[int]]) -> None:
        base = random_blocks(layout, n_blocks, rng)
        before = bits_of(dequantize, base)
        for group in groups:
            changed = (bits_of(dequantize, flipped(base, group)) != before).sum(axis=0)
            if len(group) == 1:
                seen[group[0]] += changed
                continue
            for bit in group:
                seen[bit] += np.where(np.repeat(_runs(seen[bit]), RUN)[:block_size], changed, 0)

    try_flips(FIRST_BLOCKS, [[bit] for bit in range(len(seen))])
    for number in range(MAX_ROUNDS):
        rarest = np.where(seen, seen, SIGHTINGS).min(axis=1)
        is_idle = ~seen.any(axis=1)
        pending = np.flatnonzero((rarest < SIGHTINGS) | (is_idle & (number < IDLE_ROUNDS)))
        if not len(pending):
            break
        try_flips(ROUND, _apart(seen, pending.tolist()))
    return seen > 0


def _apart(seen: NDArray[np.int64], bits: list[int]) -> list[list[int]]:
    """Groups of bits that may be flipped together.

    Each bit of a group affects one run, and no two affect the same run, so that each change has one cause. A bit that
    affects several runs is a group of its own.
    """
    alone: list[list[int]] = []
    shared: list[list[int]] = []
    occupied: list[set[int]] = []
    for bit in bits:
        runs = np.flatnonzero(_runs(seen[bit]))
        if len(runs) != 1:
            alone.append([bit])
            continue
        for used_runs, members in zip(occupied, shared, strict=True):
            if runs[0] not in used_runs:
                used_runs.add(runs[0])
                members.append(bit)
                break
        else:
            occupied.append({runs[0]})
            shared.append([bit])
    return alone + shared


def _runs(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.add.reduceat(counts, np.arange(0, len(counts), RUN)) > 0


def flipped(blocks: NDArray[Any], bits: list[int]) -> NDArray[Any]:
    """A copy of the blocks with some bits flipped."""
    changed = blocks.copy()
    raw = changed.view(np.uint8).reshape(len(blocks), -1)
    for bit in bits:
        raw[:, bit // 8] ^= np.uint8(1 << bit % 8)
    return changed


def bits_of(dequantize: Dequantize, blocks: NDArray[Any]) -> NDArray[np.uint32]:
    """The values of blocks as bits, so that 0 and -0 differ."""
    with np.errstate(all="ignore"):
        return dequantize(blocks).view(np.uint32).reshape(len(blocks), -1)


def random_blocks(layout: np.dtype[np.void], n_blocks: int, rng: np.random.Generator) -> NDArray[Any]:
    """Random blocks whose float fields are between 0.5 and 2, so that no scale hides the effect of a bit."""
    blocks = rng.integers(0, 256, n_blocks * layout.itemsize, np.uint8).view(layout)
    for name in layout.names or ():
        if layout[name].base.kind == "f":
            blocks[name] = rng.uniform(0.5, 2.0, blocks[name].shape)
    return blocks


def value_range(
    layout: np.dtype[np.void], block_size: int, dequantize: Dequantize, bits: NDArray[np.bool_], seed: int = 0
) -> tuple[float, float]:
    """The smallest and the largest finite value of an element if all float fields are 1.

    Found by hill climbing: each of many random blocks keeps every bit flip that improves its value.
    """
    rng = np.random.default_rng(seed)
    is_free = np.ones(8 * layout.itemsize, bool)
    floats = [name for name in layout.names or () if layout[name].base.kind == "f"]
    for name in floats:
        assert layout.fields is not None
        dtype, start = layout.fields[name][:2]
        is_free[8 * start : 8 * (start + dtype.itemsize)] = False
    ends = []
    for sign in (-1, 1):
        best = -np.inf
        for element in {0, block_size - 1}:
            blocks = random_blocks(layout, FIRST_BLOCKS, rng)
            for name in floats:
                blocks[name] = 1
            flips = np.flatnonzero(bits[:, element] & is_free).tolist()
            best = max(best, _climb(blocks, flips, element, sign, dequantize))
        ends.append(sign * best)
    return ends[0], ends[1]


def _climb(blocks: NDArray[Any], bits: list[int], element: int, sign: int, dequantize: Dequantize) -> float:
    """The largest `sign * value` of an element that flips of these bits reach."""

    def height(blocks: NDArray[Any]) -> NDArray[np.float64]:
        values = bits_of(dequantize, blocks).view(np.float32)[:, element].astype(np.float64)
        return np.where(np.isfinite(values), sign * values, -np.inf)

    reached = height(blocks)
    while True:
        before = reached
        for bit in bits:
            tried = flipped(blocks, [bit])
            heights = height(tried)
            blocks[heights > reached] = tried[heights > reached]
            reached = np.maximum(heights, reached)
        if (reached == before).all():
            return float(reached.max())
