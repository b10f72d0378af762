"""A small model with many formats, to be loaded to the late GPU."""

import numpy as np
from blocks import assert_same_bits, random_blocks
from late_gpu import TUNING

import numba_dequant as nd

TENSORS = {
    "token_embd": ("Q8_0", (40, 320), random_blocks("Q8_0", 400)),
    "a.norm": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "a.q": ("Q6_K", (6, 1024), random_blocks("Q6_K", 24)),
    "b.norm": ("F32", (17,), np.arange(17, dtype="<f4").tobytes()),
    "ids": ("I32", (3000,), np.arange(3000, dtype="<i4").tobytes()),
    "none": ("Q4_K", (0, 256), b""),
    "b.q": ("Q4_0", (2, 32), random_blocks("Q4_0", 2)),
    "b.k": ("IQ4_XS", (8, 512), random_blocks("IQ4_XS", 16)),
    "output": ("MXFP4", (90, 64), random_blocks("MXFP4", 180)),
}


def kept_bytes(late):
    """GPU memory that is kept for the next load."""
    return sum(map(len, late.idle_buffers)) * TUNING.chunk_bytes


MAX_BYTES = TUNING.buffers * TUNING.chunk_bytes
"""GPU memory that a load takes for itself."""


def assert_right(found, name, dtype="float16"):
    source, shape, data = TENSORS[name]
    expected = nd.dequantize(data, source, dtype, shape=shape, device="reference")
    values = found.copy_to_host()
    if source == "I32":
        np.testing.assert_array_equal(values, expected)
    else:
        assert_same_bits(values, expected)


def assert_loads(model, threads):
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)
