"""A model in memory."""

import numpy as np
from gguf_bytes import gguf
from small_model import TENSORS, assert_right

import numba_dequant as nd


def test_a_model_in_memory_loads_to_a_gpu(late, threads):
    tensors = [(name, shape, kind, bytes(data)) for name, (kind, shape, data) in TENSORS.items()]
    model = nd.open(b"xyz" + gguf(tensors), offset=3)
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)
    for name, found in model.stream(device="cuda", threads=threads):
        assert_right(found, name)
    kept = model.load("token_embd", device="cuda", keep_quantized=True)
    np.testing.assert_array_equal(kept.data.copy_to_host(), model.read("token_embd"))
