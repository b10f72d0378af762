"""Tensors for `dequantize_many`."""

import numpy as np
from blocks import DECODED, assert_same_bits, random_blocks

import numba_dequant as nd


def mixture(names=DECODED, sizes=(0, 1, 3, 40)):
    """Tensors of every format and of several sizes, in blocks."""
    return {
        (name, size): (random_blocks(name, size, seed=size), name, (size, nd.FORMATS[name].block_size))
        for size in sizes
        for name in names
    }


def expected(tensors, dtype="float16"):
    return {
        name: nd.dequantize(*entry[:2], dtype, shape=(*entry, None)[2], device="reference")
        for name, entry in tensors.items()
    }


def assert_all_same(found, tensors, dtype="float16"):
    assert list(found) == list(tensors)
    for name, values in expected(tensors, dtype).items():
        tensor = found[name]
        assert_same_bits(tensor if isinstance(tensor, np.ndarray) else tensor.copy_to_host(), values)
