"""`matmul` on a GPU: kernels multiply the compressed weight, and PyTorch what they cannot."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from products import FUSED, bound, columns, error, weights

import numba_dequant as nd

pytestmark = pytest.mark.gpu

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0}
BUSY = 2_000_000
"""Clock cycles: about a millisecond."""


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def on_gpu(array, stream=None):
    """An array as a `DeviceTensor`."""
    array = np.ascontiguousarray(array)
    name = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint8": "I8"}[array.dtype.name]
    dtype = "float16" if name == "I8" else array.dtype.name
    data = array.reshape(-1).view(np.uint8)
    return nd.dequantize(data, name, dtype, shape=array.shape, device="cuda", stream=stream)


def check(found, expected, name):
    assert isinstance(found, nd.DeviceTensor)
    assert found.shape == expected.shape
    assert error(found.copy_to_host(), expected) < bound(name) + EPSILON[found.dtype.name]


@pytest.fixture(scope="module")
def given():
    """300 rows of 1024 elements, forty columns, a bias, the product, and the values of the weight."""
    blocks, values = weights("Q4_K", 300, 1024)
    x, bias = columns(40, 1024), columns(1, 300, seed=1)[0]
    return blocks, x, bias, x.astype(np.float64) @ values.T, values


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_every_format(name, x_dtype, dtype):
    blocks, values = weights(name, 48, 1024)
    for n_columns in (1, 3):
        x = columns(n_columns, 1024).astype(dtype_of(x_dtype))
        found = nd.matmul(on_gpu(x), on_gpu(blocks), name, dtype=dtype)
        assert found.dtype == dtype_of(dtype)
        check(found, x.astype(np.float64) @ values.T, name)


@pytest.mark.parametrize("n_columns", [1, 2, 8, 9, 17, 40])
def test_many_columns(n_columns, given):
    blocks, x, bias, expected, _ = given
    weight = on_gpu(blocks)
    check(nd.matmul(on_gpu(x[:n_columns]), weight, "Q4_K"), expected[:n_columns], "Q4_K")
    found = nd.matmul(x[:n_columns], weight, "Q4_K", bias=bias, dtype="float32")
    check(found, expected[:n_columns] + bias, "Q4_K")


@pytest.mark.parametrize("bias_dtype", EPSILON)
@pytest.mark.parametrize("on_host", ["x", "weight", "bias", "all", None])
def test_arrays_on_the_host(on_host, bias_dtype, given):
    blocks, x, bias, expected, _ = given
    bias = bias.astype(dtype_of(bias_dtype))
    arrays = {"x": x[:6].reshape(2, 3, 1024), "weight": blocks, "bias": bias}
    arrays = {name: array if on_host in (name, "all") else on_gpu(array) for name, array in arrays.items()}
    found = nd.matmul(arrays["x"], arrays["weight"], "Q4_K", bias=arrays["bias"], device="cuda")
    check(found, expected[:6].reshape(2, 3, 300) + bias.astype(np.float64), "Q4_K")


def test_a_vector_and_a_weight_of_a_file(tmp_path, given):
    from blocks import write_model

    blocks, x, _, expected, _ = given
    path = write_model(tmp_path / "m.gguf", {"a": ("Q4_K", (300, 1024), blocks.tobytes())})
    weight = nd.load(path, keep_quantized=True, device="cuda")["a"]
    check(nd.matmul(x[0], weight), expected[0], "Q4_K")
    check(nd.matmul(on_gpu(x[0]), weight), expected[0], "Q4_K")


def test_out(given):
    blocks, x, bias, expected, _ = given
    for dtype in EPSILON:
        out = on_gpu(np.full((40, 300), 7, dtype_of(dtype)))
        assert nd.matmul(x, on_gpu(blocks), "Q4_K", bias=bias, out=out) is out
        check(out, expected + bias, "Q4_K")
    with pytest.raises(nd.OutputError, match="out shares memory with x; pass another array"):
        tensor = on_gpu(columns(300, 256))
        nd.matmul(tensor, on_gpu(weights("Q4_K", 256, 256)[0]), "Q4_K", out=tensor)


def test_nothing():
    x, blocks = columns(2, 256), weights("Q4_K", 3, 256)[0]
    assert nd.matmul(x, b"", "Q4_K", device="cuda").shape == (2, 0)
    assert nd.matmul(on_gpu(x[:0]), on_gpu(blocks), "Q4_K").copy_to_host().shape == (0, 3)
    empty = (b"", "Q4_K", (3, 0))
    np.testing.assert_array_equal(nd.matmul(x[:, :0], empty, device="cuda").copy_to_host(), np.zeros((2, 3)))
    found = nd.matmul(x[:, :0], empty, bias=np.arange(3, dtype=np.float32), device="cuda")
    np.testing.assert_array_equal(found.copy_to_host(), [[0, 1, 2]] * 2)


def test_numba_arrays(given):
    """Through `__cuda_array_interface__`, at any address."""
    from numba import cuda

    blocks, x, bias, expected, _ = given
    room = cuda.to_device(np.concatenate([np.zeros(1, np.float16), x[:5].reshape(-1)]))
    found = nd.matmul(room[1:].reshape(5, 1024), cuda.to_device(blocks), "Q4_K", bias=cuda.to_device(bias))
    check(found, expected[:5] + bias, "Q4_K")
    with pytest.raises(nd.DataError, match=r"x: the array of shape \(5, 1024\) is not contiguous"):
        nd.matmul(cuda.to_device(columns(5, 2048))[:, ::2], cuda.to_device(blocks), "Q4_K")


def test_named_streams(given):
    from numba_dequant.backends.gpu import gpu_at

    blocks, x, bias, expected, _ = given
    gpu = gpu_at(0)
    with gpu.active():
        first, second = gpu.create_stream(), gpu.create_stream()
    for _ in range(10):
        arrays = on_gpu(x, first), on_gpu(blocks, first), on_gpu(bias, second)
        found = nd.matmul(arrays[0], arrays[1], "Q4_K", bias=arrays[2], stream=second)
        del arrays
        assert found.stream == int(second.handle)
        check(found, expected + bias, "Q4_K")


class TestPytorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture
    def tensors(self, torch, given):
        blocks, x, bias, _, _ = given
        found = [torch.from_numpy(array.copy()).cuda() for array in (x, blocks, bias)]
        torch.cuda.synchronize()
        return found

    def check(self, torch, found, expected):
        torch.cuda.synchronize()
        name = str(found.dtype).removeprefix("torch.")
        assert error(found.double().cpu().numpy(), expected) < bound("Q4_K") + EPSILON[name]

    @pytest.mark.parametrize("n_columns", [1, 5, 40])
    def test_a_side_stream(self, torch, n_columns, tensors, given):
        """`x` is written just before, on a busy stream; the result is read just after, and its memory overwritten."""
        x, weight, bias = tensors
        expected, seen = given[3][:n_columns] + given[2], []
        for with_out in [False, True] * 5:
            with torch.cuda.stream(torch.cuda.Stream()):
                late = torch.full_like(x[:n_columns], float("nan"))
                torch.cuda._sleep(BUSY)
                late.copy_(x[:n_columns])
                out = torch.full((n_columns, 300), float("nan"), device="cuda", dtype=late.dtype) if with_out else None
                found = nd.matmul(late, weight, "Q4_K", bias=bias, out=out)
                assert out is None or found is out
                shared = out if with_out else torch.from_dlpack(found)
                late.fill_(float("nan"))
                del late
                again = torch.full_like(x[:n_columns], float("nan"))
                seen.append(shared.clone())
                shared.fill_(0)
                del found, shared, out, again
        for each in seen:
            self.check(torch, each, expected)

    def test_memory_is_of_pytorch_s_allocator(self, torch, tensors):
        found = nd.matmul(tensors[0], tensors[1], "Q4_K")
        assert found.memory.owner.tensor.data_ptr() == found.ptr

    def test_tensors_that_are_dropped_while_a_named_stream_reads_them(self, torch, tensors, given):
        named, seen = torch.cuda.Stream(), []
        for _ in range(10):
            copies = [each.clone() for each in tensors]
            named.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(named):
                torch.cuda._sleep(BUSY)
            found = nd.matmul(copies[0], copies[1], "Q4_K", bias=copies[2], stream=named)
            del copies
            taken = [torch.full_like(each, 0x5A) for each in tensors]
            seen.append(found)
            del taken
        for each in seen:
            check(each, given[3] + given[2], "Q4_K")

    def test_strided_misaligned_and_pinned_tensors(self, torch, tensors, given):
        x, weight, bias = tensors
        expected = given[3] + given[2]
        room = torch.zeros(x.numel() + 1, dtype=x.dtype, device="cuda")
        room[1:] = x.reshape(-1)
        for each in (x.t().contiguous().t(), room[1:].view(x.shape), x.cpu(), x.cpu().pin_memory(), x.cpu().t().t()):
            found = nd.matmul(each, weight.cpu().pin_memory(), "Q4_K", bias=bias.cpu(), device="cuda")
            check(found, expected, "Q4_K")
            check(nd.matmul(each, weight, "Q4_K", bias=bias.repeat_interleave(2)[::2]), expected, "Q4_K")

    def test_gradients_are_ignored(self, torch, tensors, given):
        x, weight, _ = tensors
        for each in (x.clone().requires_grad_(), x.float().requires_grad_()):
            check(nd.matmul(each, weight, "Q4_K", dtype="float32"), given[3], "Q4_K")

    @pytest.mark.parametrize("n_columns", [1, 5])
    def test_capture_and_replay(self, torch, n_columns, tensors, given):
        x, weight, bias = tensors
        x = x[:n_columns].clone()
        for with_out in (False, True):
            out = torch.zeros((n_columns, 300), dtype=x.dtype, device="cuda") if with_out else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = torch.as_tensor(nd.matmul(x, weight, "Q4_K", bias=bias, out=out))
                with pytest.raises(nd.DeviceError, match="data on the host cannot be part of the graph"):
                    nd.matmul(x, given[0], "Q4_K")
            for _ in range(3):
                found.zero_()
                graph.replay()
                self.check(torch, found, given[3][:n_columns] + given[2])

    @pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("case", ["float32", "F16", "BF16", "F32", "odd address"])
    def test_what_the_kernels_cannot_multiply(self, torch, case, dtype, tensors, given, monkeypatch):
        from numba_dequant.backends import cuda_matmul

        monkeypatch.setattr(cuda_matmul, "PIECE", 64 * 1024)
        x, weight, bias = tensors
        name, values = "Q4_K", given[4]
        if case == "float32":
            x = x.float()
        elif case == "odd address":
            room = torch.zeros(weight.numel() + 1, dtype=torch.uint8, device="cuda")
            room[1:] = weight.reshape(-1)
            weight = room[1:]
        else:
            kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[case]
            name, weight = case, torch.from_numpy(values).to("cuda", kind)
        with torch.autocast("cuda", torch.bfloat16):
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found = nd.matmul(x, weight, name, bias=bias, dtype=dtype)
                assert found.dtype.name == (dtype or str(x.dtype).removeprefix("torch."))
                assert error(found.copy_to_host(), given[3] + given[2]) < 1e-2
                if (case, found.dtype.name) in (("float32", "float32"), ("odd address", "float32"), ("F32", "float32")):
                    check(found, given[3] + given[2], "Q4_K")
        found = nd.matmul(x.cpu().numpy(), weight.view(torch.uint8).cpu().numpy(), name, dtype=dtype, device="cuda")
        assert error(found.copy_to_host(), given[3]) < 1e-2


def test_without_pytorch_it_says_what_to_do(given):
    code = """
import numpy as np
import numba_dequant as nd
for x, weight, format, message in (
    (np.ones((1, 32), np.float32), bytes(34), "Q8_0", "convert x to float16, or import PyTorch with CUDA"),
    (np.ones((1, 32), np.float16), bytes(64), "F16", "import PyTorch with CUDA"),
):
    try:
        nd.matmul(x, weight, format, device="cuda")
    except nd.DeviceError as error:
        assert "cannot multiply this weight while it is compressed" in str(error), error
        assert message in str(error), error
    else:
        raise SystemExit("PyTorch was not needed")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_what_is_refused_before_anything_is_launched(given):
    blocks, x, bias, _, _ = given
    weight = on_gpu(blocks)
    for arguments, options, kind, message in (
        ((x, weight, "Q4_K"), {"out": np.empty((40, 300), np.float16)}, nd.OutputError, "out is a ndarray on the host"),
        ((x[:, :512], (weight, "Q4_K", (300, 1024))), {}, nd.ShapeError, "but a row of weight has 1024"),
        ((x.astype(np.float64), weight, "Q4_K"), {}, nd.DtypeError, "x holds float64; convert it to float16"),
        ((x, weight, "Q4_K"), {"bias": bias[:5]}, nd.ShapeError, r"bias has shape \(5,\)"),
        ((x, weight, "Q4_K"), {"device": "cpu"}, nd.DeviceError, "on a GPU, but the device is cpu"),
        ((x, weight, "Q4_K"), {"stream": "no"}, nd.DeviceError, "expected a stream"),
    ):
        with pytest.raises(kind, match=message):
            nd.matmul(*arguments, **options)
