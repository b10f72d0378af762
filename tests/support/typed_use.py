"""What a type checker says of the results: this file is checked, and never run."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import numba_dequant as nd
import numba_dequant.parallel
from numba_dequant.backends.device_tensor import DeviceTensor

Array = NDArray[Any] | DeviceTensor
HALVES = np.empty(32, np.float16)

assert_type(nd.dequantize(b"", "Q8_0", device="cpu"), NDArray[Any])
assert_type(nd.dequantize(b"", "Q8_0"), Array)
assert_type(nd.dequantize(b"", "Q8_0", out=3), int)
assert_type(nd.dequantize_many({"a": (b"", "Q8_0")}), dict[str, Array])
assert_type(nd.prepare_many({1: (b"", "Q8_0")}).run(), dict[int, Array])
assert_type(nd.matmul(HALVES, b"", "Q8_0", bias=HALVES, device="cpu"), NDArray[Any])
assert_type(nd.matmul(HALVES, nd.QuantizedTensor(b"", nd.FORMATS["Q8_0"], (0, 32)), dtype="float32"), Array)
assert_type(nd.matmul(HALVES, b"", "Q8_0", out=3, stream=1), int)
assert_type(nd.load("x.gguf"), dict[str, Array])
assert_type(nd.load("x.gguf", "blk.*", "float32", device="cuda", keep_quantized=True), dict[str, nd.QuantizedTensor])
assert_type(nd.load("x.gguf", out={"a": HALVES}, offset=4), dict[str, Any])

model = nd.open("x.gguf")
assert_type(model.load("a", rows=slice(3)), Array)
assert_type(model.load("a", out=3), int)
assert_type(model.load("a", keep_quantized=True, threads=2), nd.QuantizedTensor)
assert_type(model.load_all(progress=False), dict[str, Array])
for name, values in model.stream(prefetch=3):
    assert_type((name, values), tuple[str, Array])
for name, kept in model.stream(keep_quantized=True):
    assert_type((name, kept), tuple[str, nd.QuantizedTensor])

planned = nd.parallel.plan(model.tensors.values(), 2, [])
for name, parts in model.stream(device=["cpu", "cpu"], plan=planned, prefetch=1, dtype="float32"):
    assert_type((name, parts), tuple[str, list[Any]])
assert_type(model.load_all(device=["cpu", "cpu"], plan=planned, keep_quantized=True), list[dict[str, Any]])
assert_type(nd.load("x.gguf", device=["cpu", "cpu"], plan=lambda model: planned, threads=2), list[dict[str, Any]])
