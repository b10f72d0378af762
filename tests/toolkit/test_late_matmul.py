"""`matmul` on a GPU that does its work as late as it may, and that multiplies by the reference."""

import copy
from contextlib import nullcontext, suppress
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from products import columns, error, weights

import numba_dequant as nd
from numba_dequant.backends import cuda_matmul, cuda_product
from numba_dequant.backends.device_tensor import DeviceTensor

pytestmark = pytest.mark.usefixtures("late")


@pytest.fixture(scope="module", autouse=True)
def threads_of_pytorch():
    """PyTorch starts threads when it first computes; tests of this GPU count threads."""
    with suppress(ImportError):
        import torch

        for dtype in (torch.float16, torch.float32):
            torch.nn.functional.linear(*(torch.ones(shape, dtype=dtype) for shape in ((11, 512), (16, 512), (16,))))


@pytest.fixture(autouse=True)
def no_pytorch(monkeypatch):
    """This GPU is none of PyTorch's."""
    monkeypatch.setattr("numba_dequant.backends.cuda_matmul.TORCH.can_compute", lambda: False)


def on_gpu(array, stream=None):
    array = np.ascontiguousarray(array)
    name = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint8": "I8"}[array.dtype.name]
    dtype = "float16" if name == "I8" else array.dtype.name
    return nd.dequantize(array.view(np.uint8), name, dtype, shape=array.shape, device="cuda", stream=stream)


def part_of(tensor, start, n_bytes, dtype, shape):
    memory = replace(tensor.memory, pointer=tensor.ptr + start, n_bytes=n_bytes)
    return DeviceTensor(memory, shape, np.dtype(dtype), 0)


@pytest.fixture(scope="module")
def given():
    """20 rows of 512 elements, eleven columns, a bias, and the product."""
    blocks, values = weights("Q6_K", 20, 512)
    x, bias = columns(11, 512), columns(1, 20, seed=1)[0]
    return blocks, x, bias, x.astype(np.float64) @ values.T, values


def assert_right(found, expected, bound=1e-3):
    assert isinstance(found, DeviceTensor)
    assert found.shape == expected.shape
    assert error(found.copy_to_host(), expected) < bound


@pytest.mark.parametrize("n_columns", [1, 2, 8, 11])
@pytest.mark.parametrize("place", [np.asarray, on_gpu], ids=["host", "gpu"])
def test_columns(place, n_columns, given):
    blocks, x, bias, expected, _ = given
    found = nd.matmul(place(x[:n_columns]), place(blocks), "Q6_K", device="cuda")
    assert found.dtype == np.float16
    assert_right(found, expected[:n_columns])
    found = nd.matmul(place(x[:n_columns]), place(blocks), "Q6_K", bias=place(bias), dtype="float32", device="cuda")
    assert found.dtype == np.float32
    assert_right(found, expected[:n_columns] + bias, 1e-6)


@pytest.mark.parametrize("on_host", ["x", "weight", "bias", None])
def test_some_arrays_on_the_host(on_host, given):
    blocks, x, bias, expected, _ = given
    arrays = {"x": x.reshape(1, 11, 512), "weight": blocks, "bias": bias}
    arrays = {name: array if name == on_host else on_gpu(array, 7) for name, array in arrays.items()}
    found = nd.matmul(arrays["x"], arrays["weight"], "Q6_K", bias=arrays["bias"], stream=8)
    del arrays
    assert found.stream == 8
    assert_right(found, expected[None] + bias)


@pytest.mark.parametrize("stream", [None, 7])
def test_one_product_after_another(stream):
    square, values = weights("Q4_0", 32, 32)
    weight = nd.QuantizedTensor(on_gpu(square), nd.FORMATS["Q4_0"], (32, 32))
    found = nd.matmul(columns(3, 32), weight, stream=stream)
    found = nd.matmul(found, weight, stream=stream)
    assert_right(found, columns(3, 32).astype(np.float64) @ values.T @ values.T)


def test_bfloat16(given):
    blocks, x, bias, _, values = given
    x, bias = x.astype(ml_dtypes.bfloat16), bias.astype(np.float32)
    found = nd.matmul(x, on_gpu(blocks), "Q6_K", bias=bias)
    assert found.dtype == ml_dtypes.bfloat16
    assert_right(found, x.astype(np.float64) @ values.T + bias, 4e-3)


def test_a_vector(given):
    blocks, x, _, expected, _ = given
    assert_right(nd.matmul(x[0], on_gpu(blocks), "Q6_K"), expected[0])


@pytest.mark.parametrize("shift", [2, 8])
def test_odd_addresses(shift, given):
    blocks, x, bias, expected, _ = given
    aside = np.concatenate([np.zeros(shift, np.uint8), x[:2].reshape(-1).view(np.uint8)])
    room = on_gpu(aside)
    found = nd.matmul(part_of(room, shift, 2048, np.float16, (2, 512)), on_gpu(blocks), "Q6_K")
    assert_right(found, expected[:2])
    room = on_gpu(np.concatenate([np.zeros(1, np.uint8), bias.view(np.uint8)]))
    found = nd.matmul(x, on_gpu(blocks), "Q6_K", bias=part_of(room, 1, 40, np.float16, (20,)))
    assert_right(found, expected + bias)


def test_out(given):
    blocks, x, _, expected, _ = given
    out = on_gpu(np.full((11, 20), 7, np.float16))
    assert nd.matmul(x, blocks, "Q6_K", out=out, device="cuda") is out
    assert_right(out, expected)
    assert nd.matmul(x, on_gpu(blocks, 7), "Q6_K", out=out, stream=9) is out
    assert out.stream == 9
    assert_right(out, expected)


@pytest.mark.parametrize("place", [np.asarray, on_gpu], ids=["host", "gpu"])
def test_nothing(place):
    empty = np.zeros(0, np.uint8)
    assert nd.matmul(place(np.ones((2, 64), np.float16)), place(empty), "Q8_0", device="cuda").shape == (2, 0)
    blocks = weights("Q8_0", 3, 64)[0]
    assert nd.matmul(place(np.ones((0, 64), np.float16)), place(blocks), "Q8_0", device="cuda").shape == (0, 3)
    x, weight = place(np.ones((2, 0), np.float16)), (place(empty), "Q8_0", (3, 0))
    np.testing.assert_array_equal(nd.matmul(x, weight, device="cuda").copy_to_host(), np.zeros((2, 3)))
    bias = place(np.arange(3, dtype=np.float32))
    found = nd.matmul(x, weight, bias=bias, device="cuda").copy_to_host()
    np.testing.assert_array_equal(found, np.array([[0, 1, 2]] * 2, np.float16))


class TestErrors:
    def test_out(self, given):
        blocks, x, *_ = given
        for out, message in (
            (np.zeros((11, 20), np.float16), "out is a ndarray on the host"),
            (on_gpu(np.zeros((20, 11), np.float16)), r"out has shape \(20, 11\), the result has shape \(11, 20\)"),
            (on_gpu(np.zeros((11, 20), np.float32)), "out holds float32, the result is float16"),
        ):
            with pytest.raises(nd.OutputError, match=message):
                nd.matmul(x, blocks, "Q6_K", dtype="float16", out=out, device="cuda")
        room = on_gpu(np.zeros(2000, np.uint8))
        odd = part_of(room, 1, 440, np.float16, (11, 20))
        with pytest.raises(nd.OutputError, match="the address of out is not a multiple of 2"):
            nd.matmul(x, blocks, "Q6_K", out=odd, device="cuda")

    @pytest.mark.parametrize("name", ["x", "weight", "bias"])
    def test_shared_memory(self, name, given):
        blocks, x, bias, _, _ = given
        arrays = {"x": on_gpu(x), "weight": on_gpu(blocks), "bias": on_gpu(bias)}
        out = part_of(arrays[name], arrays[name].nbytes - 32, 440, np.float16, (11, 20))
        with pytest.raises(nd.OutputError, match=f"out shares memory with {name}; pass another array"):
            nd.matmul(arrays["x"], arrays["weight"], "Q6_K", bias=arrays["bias"], out=out)

    def test_another_gpu(self, late, given):
        blocks, x, *_ = given
        weight = on_gpu(blocks)
        weight.memory.gpu = copy.copy(late)
        weight.memory.gpu.index = 1
        with pytest.raises(nd.DeviceError, match="weight is on cuda:1, but the device is cuda:0; copy it there first"):
            nd.matmul(on_gpu(x), weight, "Q6_K")

    @pytest.mark.parametrize("place", [np.asarray, on_gpu], ids=["host", "gpu"])
    def test_types_and_shapes(self, place, given):
        blocks, x, bias, _, _ = given
        weight = place(blocks)
        doubles = nd.dequantize(np.ones(512), "F64", device="cuda") if place is on_gpu else np.ones(512)
        with pytest.raises(nd.DtypeError, match="x holds float64; convert it to float16"):
            nd.matmul(doubles, weight, "Q6_K", device="cuda")
        with pytest.raises(nd.ShapeError, match=r"bias has shape \(3,\); pass one number for each of the 20 rows"):
            nd.matmul(place(x), weight, "Q6_K", bias=place(bias[:3]), device="cuda")
        with pytest.raises(
            nd.ShapeError, match="x has 256 elements in its last dimension, but a row of weight has 512"
        ):
            nd.matmul(place(x[:, :256]), (weight, "Q6_K", (20, 512)), device="cuda")

    def test_what_the_tensor_cores_cannot_do(self, late, given):
        blocks, x, _, _, _ = given
        weight = on_gpu(blocks)
        before = len(late.loaded)
        with pytest.raises(
            nd.DeviceError, match=r"because the columns hold float32.*; convert x to float16, or import"
        ):
            nd.matmul(x.astype(np.float32), weight, "Q6_K")
        with pytest.raises(nd.DeviceError, match=r"because F16 has no blocks.*; import PyTorch with CUDA before"):
            nd.matmul(x, on_gpu(x), "F16")
        room = on_gpu(np.zeros(blocks.nbytes + 1, np.uint8))
        with pytest.raises(nd.DeviceError, match="because the address of the weights is not a multiple of 2"):
            nd.matmul(x, part_of(room, 1, blocks.nbytes, np.uint8, (blocks.nbytes,)), "Q6_K")
        late.capability = (7, 5)
        with pytest.raises(
            nd.DeviceError, match=r"because it needs compute capability 8.0, but the GPU has 7.5; import PyTorch"
        ):
            nd.matmul(x, weight, "Q6_K")
        assert not [kernel for kernel in late.loaded[before:] if "product" in kernel.spec.maker]


def test_the_driver_refuses_a_launch(given, monkeypatch):
    """The error comes out, and the next product works."""
    blocks, x, _, expected, _ = given
    with monkeypatch.context() as patch:

        def fail(*arguments, **options):
            raise nd.DeviceError("the CUDA driver returned CUDA_ERROR_UNKNOWN")

        patch.setattr(cuda_product, "multiply", fail)
        with pytest.raises(nd.DeviceError, match="CUDA_ERROR_UNKNOWN"):
            nd.matmul(x, blocks, "Q6_K", device="cuda")
    assert_right(nd.matmul(x, blocks, "Q6_K", device="cuda"), expected)


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("case", ["float32", "float16", "F16", "odd address", "old"])
def test_pieces_that_pytorch_multiplies(case, dtype, late, given, monkeypatch):
    """PyTorch's part runs on the CPU, at once, after all that the stream has been asked to do."""
    torch = pytest.importorskip("torch")
    from late_gpu import at

    def tensor(memory, shape, name):
        late.run(0)
        n_bytes = int(np.prod(shape)) * np.dtype(name).itemsize
        return torch.from_numpy(at(memory.pointer, n_bytes).view(name).reshape(shape))

    def write_product(out, x, values, bias):
        late.run(0)
        pieces.append(len(values))
        out.copy_(torch.nn.functional.linear(x, values, bias))

    pieces = []
    monkeypatch.setattr(cuda_matmul, "PIECE", 20 * 512)
    monkeypatch.setattr(cuda_matmul, "_tensor", tensor)
    monkeypatch.setattr(cuda_matmul.TORCH, "can_compute", lambda: True)
    monkeypatch.setattr(cuda_matmul.TORCH, "computing_on", lambda *_: nullcontext())
    monkeypatch.setattr(cuda_matmul.TORCH, "write_product", write_product)
    monkeypatch.setattr(late, "capability", (7, 5) if case == "old" else (9, 0))
    blocks, x, bias, expected, values = given
    name, weight = "Q6_K", on_gpu(blocks)
    if case == "F16":
        name, weight = "F16", on_gpu(values.astype(np.float16))
    elif case == "odd address":
        room = on_gpu(np.concatenate([np.zeros(16, np.uint8), blocks.reshape(-1)]))
        weight = part_of(room, 16, blocks.nbytes, np.uint8, (blocks.nbytes,))
        reason = "the address of the weights is not a multiple of 2"
        monkeypatch.setattr(cuda_product, "why_not", lambda *_: reason)
    if case == "float32":
        x = x.astype(np.float32)
    found = nd.matmul(x, weight, name, bias=bias, dtype=dtype)
    assert found.dtype == np.dtype(dtype or x.dtype)
    assert_right(found, expected + bias, 3e-3 if "float16" in (case, found.dtype.name) or case == "F16" else 1e-5)
    assert pieces == ([] if case == "float16" else [16, 4])
