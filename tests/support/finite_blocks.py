"""Blocks of random quants whose values are of moderate size, as those of a model are."""

from functools import cache

import numpy as np
from blocks import random_blocks

import numba_dequant as nd
from numba_dequant import FORMATS


@cache
def _candidates(name):
    fmt = FORMATS[name]
    blocks = random_blocks(name, 4096, seed=len(name)).view(fmt.layout).copy()
    random = np.random.default_rng(1)
    for field in fmt.layout.names:
        if fmt.layout[field].base == np.float16:
            blocks[field] = random.uniform(0.001, 0.01, blocks[field].shape)
    values = nd.dequantize(blocks.view(np.uint8), name, "float32", device="reference").reshape(len(blocks), -1)
    with np.errstate(all="ignore"):
        is_moderate = np.isfinite(values).all(axis=1) & (abs(values).max(axis=1) < 4)
    found = blocks[is_moderate].view(np.uint8).reshape(-1, fmt.type_size)
    assert len(found) > 10, name
    return found


def finite_blocks(name, n_rows, n_columns, seed=0):
    """uint8 of shape (n_rows, bytes per row)."""
    found = _candidates(name)
    n_blocks = n_rows * n_columns // FORMATS[name].block_size
    chosen = np.random.default_rng(seed).integers(0, len(found), n_blocks)
    return found[chosen].reshape(n_rows, -1)
