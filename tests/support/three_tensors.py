"""A few blocks, a model of three small tensors, and a call on the CPU: what tests of arguments pass and load."""

import numpy as np
from blocks import random_blocks, write_model

import numba_dequant as nd

BLOCKS = random_blocks("Q8_0", 6)

TENSORS = {
    "token_embd.weight": ("Q8_0", (4, 64), random_blocks("Q8_0", 8)),
    "blk.0.attn_norm.weight": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "ids": ("I32", (3,), np.arange(3, dtype="<i4").tobytes()),
}


def open_model(folder):
    return nd.open(write_model(folder / "model.gguf", TENSORS))


def dequantize(data=BLOCKS, format="Q8_0", *args, device="cpu", **options):
    return nd.dequantize(data, format, *args, device=device, **options)
