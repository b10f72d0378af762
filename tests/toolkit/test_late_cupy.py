"""Arrays of CuPy on the late GPU. A module with CuPy's interface stands for it; its arrays are in the GPU's memory."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from blocks import assert_same_bits
from finite_blocks import finite_blocks

import numba_dequant as nd
from numba_dequant.interop import CUPY

BLOCKS = finite_blocks("Q8_0", 4, 320).reshape(-1)
EXPECTED = nd.dequantize(BLOCKS, "Q8_0", device="reference")
CURRENT = 5


class Array:
    """A part of the GPU's memory. What it holds is written as late as the GPU likes, on CuPy's current stream."""

    def __init__(self, late, host, is_contiguous=True):
        self.late, self.host = late, host
        self.memory = late.allocate(host.nbytes, CURRENT)
        late.send(self.memory.pointer, np.ascontiguousarray(host).reshape(-1).view(np.uint8), CURRENT)
        self.data, self.nbytes = SimpleNamespace(ptr=self.memory.pointer), host.nbytes
        self.device, self.dtype, self.shape = SimpleNamespace(id=0), host.dtype, host.shape
        self.flags = SimpleNamespace(c_contiguous=is_contiguous)

    def to_host(self):
        found = np.empty(self.shape, self.dtype)
        self.late.copy_to_host(found, self.data.ptr, CURRENT)
        return found


@pytest.fixture
def cupy(late, monkeypatch):
    module = ModuleType("cupy")
    module.stream = SimpleNamespace(ptr=CURRENT, is_capturing=lambda: False)
    module.cuda = SimpleNamespace(get_current_stream=lambda index=None: module.stream)
    module.ndarray = Array
    module.asarray = lambda host, **options: Array(late, host, **options)
    module.ascontiguousarray = lambda array: Array(late, array.host)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_a_call_runs_on_the_current_stream(cupy):
    data = cupy.asarray(BLOCKS)
    found = nd.dequantize(data, "Q8_0")
    assert (found.stream, found.framework) == (CURRENT, CUPY)
    again = nd.dequantize(found, "F16", "float32")  # a result of such a call belongs to CuPy, too
    assert (again.stream, again.framework) == (CURRENT, CUPY)
    assert_same_bits(found.copy_to_host(), EXPECTED)
    assert_same_bits(again.copy_to_host(), EXPECTED.astype(np.float32))


def test_a_strided_array_is_copied(cupy):
    data = cupy.asarray(BLOCKS, is_contiguous=False)
    assert_same_bits(nd.dequantize(data, "Q8_0").copy_to_host(), EXPECTED)


def test_a_stream_of_the_caller_waits_for_the_array_and_keeps_it(cupy, late):
    data = cupy.asarray(BLOCKS)
    found = nd.dequantize(data, "Q8_0", stream=9)
    assert (found.stream, found.framework) == (9, None)
    assert late.kept == [data]  # CuPy would give its memory to the next array of its own stream
    assert_same_bits(found.copy_to_host(), EXPECTED)


def test_out(cupy):
    out = cupy.asarray(np.zeros(EXPECTED.shape, np.float16))
    assert nd.dequantize(BLOCKS, "Q8_0", out=out, device="cuda") is out
    assert_same_bits(out.to_host(), EXPECTED)
    found = nd.dequantize_many({"a": (cupy.asarray(BLOCKS), "Q8_0")}, device="cuda", out={"a": out})
    assert found["a"] is out
    assert_same_bits(out.to_host(), EXPECTED)


def test_a_product(cupy):
    x = np.random.default_rng(0).standard_normal((2, 320)).astype(np.float16)
    found = nd.matmul(cupy.asarray(x), cupy.asarray(BLOCKS.reshape(4, -1)), "Q8_0", dtype="float32")
    expected = x.astype(np.float64) @ EXPECTED.reshape(4, 320).astype(np.float64).T
    np.testing.assert_allclose(found.copy_to_host(), expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_contiguous": False}, "out is not C-contiguous; pass a C-contiguous array"),
        ({"host": np.zeros(1280, np.float32)}, "out holds float32, the result is float16"),
        ({"host": np.zeros(1279, np.float16)}, r"out has shape \(1279,\), the result has 1280 elements"),
    ],
)
def test_a_wrong_out_is_refused(cupy, late, change, message):
    out = cupy.asarray(**{"host": np.zeros(1280, np.float16)} | change)
    late.launch = lambda *_: pytest.fail("launched")
    with pytest.raises(nd.OutputError, match=message):
        nd.dequantize(cupy.asarray(BLOCKS), "Q8_0", out=out)


def test_a_graph_that_would_miss_the_call(cupy):
    """No array of the call is CuPy's, while CuPy captures."""
    cupy.stream.is_capturing = lambda: True
    with pytest.raises(
        nd.DeviceError, match="cupy is capturing a CUDA graph, but no array of this call is an array of"
    ):
        nd.dequantize(BLOCKS, "Q8_0", device="cuda")
