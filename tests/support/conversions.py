"""A model to convert, and what its conversion must hold."""

import numpy as np
from blocks import assert_same_bits, random_blocks

import numba_dequant as nd
from numba_dequant.cli import main

TENSORS = {
    "token_embd.weight": ("Q8_0", (40, 64), random_blocks("Q8_0", 80)),
    "blk.0.attn_norm.weight": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "blk.0.attn_q.weight": ("Q6_K", (4, 256), random_blocks("Q6_K", 4)),
    "ids": ("I8", (3,), bytes(3)),
    "none": ("Q4_K", (0, 256), b""),
    "scalar": ("F16", (), bytes(2)),
}


def run(*arguments, device="reference"):
    return main.main(["convert", *map(str, arguments), "--device", device])


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "model.gguf")


def assert_holds(arrays, path, dtype):
    with nd.open(path) as model:
        assert set(arrays) == set(model.tensors)
        for name, found in arrays.items():
            tensor = model.tensors[name]
            expected = nd.dequantize(model.read(name), tensor.format, dtype, shape=tensor.shape, device="reference")
            expected = np.asarray(expected)
            if expected.dtype.kind == "i":
                np.testing.assert_array_equal(found, expected)
            else:
                assert_same_bits(found, expected)
