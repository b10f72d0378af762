"""`matmul` on the host: the product with a weight that stays compressed."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from blocks import DECODED, random_blocks, shifted, write_model
from products import columns, error, weights

import numba_dequant as nd
from numba_dequant.backends import matmul

DEVICES = ["cpu", "reference"]
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-22}


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)


def product(x, values):
    return np.asarray(x, np.float64) @ values.T


@pytest.fixture(scope="module")
def weight():
    """37 rows of 96 elements, their values, and three columns of float32."""
    blocks, values = weights("Q4_1", 37, 96)
    return blocks, values, columns(3, 96).astype(np.float32)


class TestValues:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", DECODED)
    def test_every_format(self, name, device, monkeypatch):
        monkeypatch.setattr(matmul, "TILE", 5 * 512)  # the last tile is smaller
        if nd.FORMATS[name].block_size == 1:
            values = columns(12, 512, seed=1).astype(np.float64)
            blocks = values.astype(nd.FORMATS[name].layout[0]) if name != "BF16" else values.astype(ml_dtypes.bfloat16)
            values = blocks.astype(np.float64)
        else:
            blocks, values = weights(name, 12, 512)
        x = columns(3, 512).astype(np.float32)
        found = nd.matmul(x, blocks, name, device=device)
        assert found.dtype == np.float32
        assert error(found, product(x, values)) < 1e-6

    @pytest.mark.parametrize("dtype", ROUNDING)
    @pytest.mark.parametrize("x_dtype", ROUNDING)
    def test_every_type(self, x_dtype, dtype, weight):
        blocks, values, x = weight
        x = x.astype(dtype_of(x_dtype))
        found = nd.matmul(x, blocks, "Q4_1", dtype=dtype, device="cpu")
        assert found.dtype == dtype_of(dtype)
        assert error(found, product(x, values)) < ROUNDING[dtype]
        assert nd.matmul(x, blocks, "Q4_1", device="cpu").dtype == dtype_of(x_dtype)

    def test_it_is_rounded_once(self, weight):
        """Also the bias is added in float32."""
        blocks, _, x = weight
        bias = np.linspace(-1, 1, 37, dtype=np.float32)
        exact = nd.matmul(x, blocks, "Q4_1", bias=bias, device="cpu")
        rounded = nd.matmul(x, blocks, "Q4_1", bias=bias, dtype="bfloat16", device="cpu")
        np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16))
        assert isinstance(rounded, nd.Bfloat16Array)

    @pytest.mark.parametrize("bias_dtype", ROUNDING)
    def test_bias(self, bias_dtype, weight):
        blocks, values, x = weight
        bias = columns(1, 37, seed=2)[0].astype(dtype_of(bias_dtype))
        found = nd.matmul(x, blocks, "Q4_1", bias=bias, device="cpu")
        assert error(found, product(x, values) + bias.astype(np.float64)) < 1e-6

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("n_bytes", [1, 2, 13])
    def test_odd_addresses(self, n_bytes, device, weight):
        blocks, _, x = weight
        bias = np.linspace(-1, 1, 37, dtype=np.float32)
        expected = nd.matmul(x, blocks, "Q4_1", bias=bias, device=device)
        x, blocks, bias = (shifted(array, n_bytes) for array in (x, blocks, bias))
        assert not x.flags.aligned
        np.testing.assert_array_equal(nd.matmul(x, blocks, "Q4_1", bias=bias, device=device), expected)
        with pytest.raises(nd.OutputError, match="the address of out is not a multiple of 4; pass an aligned array"):
            nd.matmul(x, blocks, "Q4_1", out=shifted(expected, n_bytes), device=device)

    def test_infinite_and_nan_scales_give_no_warning(self):
        blocks = weights("Q8_0", 4, 64)[0].copy()
        blocks[1, :2] = 0x00, 0x7C
        blocks[2, :2] = 0x00, 0x7E
        x = columns(2, 64)
        x[0, 3] = np.inf
        for device in DEVICES:
            for dtype in ROUNDING:
                found = nd.matmul(x, blocks, "Q8_0", dtype=dtype, device=device).astype(np.float32)
                assert not np.isfinite(found[:, 1:3]).any()
                assert not np.isfinite(found[0]).any()
                assert np.isfinite(found[1, [0, 3]]).all()

    def test_results_beyond_float16_are_infinite(self):
        found = nd.matmul(np.full((1, 32), 60000, np.float16), weights("Q8_0", 8, 32)[0], "Q8_0", device="cpu")
        assert np.isinf(found).any()

    def test_random_bytes(self):
        for name in ("Q6_K", "IQ1_M", "NVFP4"):
            found = nd.matmul(np.ones(256, np.float16), random_blocks(name, 256), name, device="cpu")
            assert found.shape == (nd.FORMATS[name].block_size,)


class TestShapes:
    @pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 2, 1, 3), (0,), (2, 0)])
    def test_leading_dimensions(self, shape, weight):
        blocks, values, _ = weight
        x = columns(6, 96)[: int(np.prod(shape))].reshape(*shape, 96).astype(np.float32)
        found = nd.matmul(x, blocks, "Q4_1", device="cpu")
        assert found.shape == (*shape, 37)
        np.testing.assert_allclose(found, product(x, values), rtol=1e-4, atol=1e-5)

    def test_no_rows(self):
        x = np.ones((2, 64), np.float16)
        assert nd.matmul(x, b"", "Q8_0", device="cpu").shape == (2, 0)
        assert nd.matmul(x, (b"", "Q8_0", (0, 64)), device="cpu", bias=np.ones(0, np.float16)).shape == (2, 0)

    def test_no_elements(self):
        x = np.ones((2, 0), np.float16)
        found = nd.matmul(x, (b"", "Q8_0", (3, 0)), device="cpu")
        np.testing.assert_array_equal(found, np.zeros((2, 3), np.float16))
        found = nd.matmul(x, (b"", "Q8_0", (3, 0)), bias=np.arange(3, dtype=np.float32), device="cpu")
        np.testing.assert_array_equal(found, [[0, 1, 2]] * 2)

    def test_rows_that_are_longer_than_a_tile(self, monkeypatch, weight):
        monkeypatch.setattr(matmul, "TILE", 7)
        blocks, values, x = weight
        assert error(nd.matmul(x, blocks, "Q4_1", device="cpu"), product(x, values)) < 1e-6


class TestArrays:
    def test_strided_arrays(self, weight):
        blocks, values, x = weight
        expected = product(x, values)
        room = np.full((3, 2, 200), np.nan, np.float32)
        room[:, 0, 4:196:2] = x
        padded = np.full((37, 200), 255, np.uint8)
        padded[:, : blocks.shape[1]] = blocks
        bias = np.repeat(np.ones(37, np.float32), 2)[::2]
        for each in (room[:, 0, 4:196:2], np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
            found = nd.matmul(each, padded[:, : blocks.shape[1]], "Q4_1", bias=bias, device="cpu")
            assert error(found, expected + 1) < 1e-6

    def test_what_an_array_may_be(self, weight):
        blocks, values, x = weight

        class WithDlpack:
            def __init__(self, array):
                self.array = array

            def __dlpack__(self, **options):
                return self.array.__dlpack__(**options)

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        bfloat16 = nd.dequantize(x, "F32", "bfloat16", shape=x.shape, device="cpu")
        assert isinstance(bfloat16, nd.Bfloat16Array)
        x = bfloat16.astype(np.float32)
        for each in (memoryview(x), x.view(np.matrix), WithDlpack(x), bfloat16, bfloat16.view(np.ndarray)):
            found = nd.matmul(each, memoryview(blocks), "Q4_1", dtype="float32", device="cpu")
            assert type(found) is np.ndarray
            assert error(found, product(x, values)) < 1e-6

    def test_tensors_of_pytorch(self, weight):
        torch = pytest.importorskip("torch")
        blocks, values, x = weight
        for dtype in (torch.float32, torch.bfloat16):
            columns = torch.from_numpy(x).to(dtype).requires_grad_()
            expected = product(columns.detach().double().numpy(), values)
            bias = torch.nn.Parameter(torch.ones(37, dtype=dtype))
            found = nd.matmul(columns, torch.from_numpy(blocks.copy()), "Q4_1", bias=bias, device="cpu")
            assert torch.from_dlpack(found).dtype == dtype
            assert error(found, expected + 1) < ROUNDING[str(dtype).removeprefix("torch.")]
            out = torch.zeros((3, 37), dtype=dtype)
            version = out._version
            assert nd.matmul(columns, blocks, "Q4_1", bias=bias, out=out, device="cpu") is out
            assert out._version > version
            np.testing.assert_array_equal(out.float().numpy(), found.astype(np.float32))

    def test_a_weight_of_a_file(self, tmp_path, weight):
        blocks, values, x = weight
        path = write_model(tmp_path / "m.gguf", {"a": ("Q4_1", (37, 96), blocks.tobytes())})
        kept = nd.load(path, keep_quantized=True, device="cpu")["a"]
        assert isinstance(kept, nd.QuantizedTensor)
        found = nd.matmul(x, kept, device="cpu")
        assert error(found, product(x, values)) < 1e-6
        for each in (("Q4_1", (37, 96)), (nd.FORMATS["Q4_1"], [-1, 96]), ("q4_1",)):
            np.testing.assert_array_equal(nd.matmul(x, (blocks, *each), device="cpu"), found)
        np.testing.assert_array_equal(nd.matmul(x, kept, "Q4_1", device="cpu"), found)
        np.testing.assert_array_equal(nd.matmul(x, kept, 3, device="cpu"), found)

    def test_a_format_of_ones_own(self, own_format):
        blocks, values = weights("Q8_0", 5, 64)
        x = columns(2, 64).astype(np.float32)
        assert error(nd.matmul(x, blocks, own_format, device="cpu"), product(x, values)) < 1e-6

    def test_without_a_gpu(self, weight, monkeypatch):
        monkeypatch.setattr("numba_dequant.api.parse_device", lambda _: nd.backends.devices.DeviceSpec("cpu"))
        blocks, values, x = weight
        assert error(nd.matmul(x, blocks, "Q4_1"), product(x, values)) < 1e-6


class TestOut:
    def test_out(self, weight):
        blocks, values, x = weight
        for dtype, bound in ROUNDING.items():
            out = np.full((3, 37), 7, dtype_of(dtype))
            assert nd.matmul(x, blocks, "Q4_1", out=out, device="cpu") is out
            assert error(out, product(x, values)) < bound

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (np.empty((3, 36), np.float32), r"out has shape \(3, 36\), the result has shape \(3, 37\)"),
            (np.empty(111, np.float32), r"out has shape \(111,\), the result has shape \(3, 37\)"),
            (np.empty((3, 37), np.float64), "out holds float64, the result is float32; pass an array of float32"),
            (np.empty((3, 74), np.float32)[:, ::2], "out is not C-contiguous"),
            (np.empty((37, 3), np.float32).T, "out is not C-contiguous"),
            (np.frombuffer(bytes(444), np.float32).reshape(3, 37), "out is read-only; pass a writable array"),
            (np.empty(445, np.uint8)[1:].view(np.float32).reshape(3, 37), "the address of out is not a multiple of 4"),
            ([0] * 111, "out must be a NumPy array or a PyTorch tensor"),
        ],
    )
    def test_out_that_cannot_be_written(self, out, message, weight):
        blocks, _, x = weight
        with pytest.raises(nd.OutputError, match=message):
            nd.matmul(x, blocks, "Q4_1", out=out, device="cpu")

    def test_a_wrong_dtype(self, weight):
        blocks, _, x = weight
        with pytest.raises(nd.OutputError, match="out holds float32, the result is float16"):
            nd.matmul(x, blocks, "Q4_1", dtype="float16", out=np.empty((3, 37), np.float32), device="cpu")

    def test_shared_memory(self):
        room = np.zeros(4096, np.uint8)
        x, weight, bias = room[:128].view(np.float32), room[1024:2112], room[3072:3200].view(np.float32)
        for start, name in ((64, "x"), (2048, "weight"), (3000, "bias")):
            out = room[start : start + 128].view(np.float32)
            with pytest.raises(nd.OutputError, match=f"out shares memory with {name}; pass another array"):
                nd.matmul(x, weight, "Q8_0", bias=bias, out=out, device="cpu")
        assert not room.any()
        nd.matmul(x, weight, "Q8_0", bias=bias, out=room[2560:2688].view(np.float32), device="cpu")


X = np.ones((2, 64), np.float16)
WEIGHT = bytes(34 * 2 * 3)
TENSOR = nd.QuantizedTensor(np.frombuffer(WEIGHT, np.uint8), nd.FORMATS["Q8_0"], (3, 64))

WRONG = [
    ({"format": None}, nd.UnknownFormatError, "the format of weight is not known; pass format, such as format='Q4_K'"),
    ({"format": "Q9_Z"}, nd.UnknownFormatError, "Q9_Z"),
    ({"weight": (1, 2, 3, 4)}, nd.DataError, "weight is a tuple of 4; pass a QuantizedTensor"),
    ({"weight": TENSOR, "format": "Q4_0"}, nd.DataError, "the format Q8_0, but format is 'Q4_0'; omit format"),
    ({"weight": bytes(8), "format": "F64"}, nd.DtypeError, r"weight holds float64 \(F64\), which matmul does not"),
    ({"weight": "text"}, nd.DataError, "weight: cannot read bytes from 'text'; pass bytes"),
    ({"weight": None}, nd.DataError, "weight: cannot read bytes from None"),
    ({"weight": WEIGHT[1:]}, nd.DataError, "weight: Q8_0 data comes in blocks of 34 bytes, but 203 bytes were given"),
    ({"weight": WEIGHT[34:]}, nd.ShapeError, "weight has 160 elements, which are not whole rows of 64, the last"),
    ({"weight": (WEIGHT, "Q8_0", (4, 64))}, nd.ShapeError, r"weight: shape \(4, 64\) does not have as many elements"),
    ({"weight": (WEIGHT, "Q8_0", (6, 32))}, nd.ShapeError, "x has 64 elements in its last .* row of weight has 32"),
    ({"weight": (WEIGHT, "Q8_0", (3, 2, 32))}, nd.ShapeError, r"weight has shape \(3, 2, 32\); .* two dimensions"),
    ({"weight": (WEIGHT, "Q8_0", (192,))}, nd.ShapeError, r"weight has shape \(192,\); .* two dimensions"),
    ({"weight": (WEIGHT, "Q8_0", "no")}, nd.ShapeError, "weight: shape must be whole numbers"),
    ({"x": np.ones((2, 48), np.float16)}, nd.ShapeError, "blocks of 32 elements, but the last dimension of x is 48"),
    ({"x": np.ones((2, 0), np.float16)}, nd.ShapeError, "the last dimension of x is 0, so .*; pass its shape too"),
    ({"x": np.float16(1)}, nd.ShapeError, "x has no dimensions"),
    ({"x": np.ones((2, 64))}, nd.DtypeError, "x holds float64; convert it to float16, bfloat16 or float32"),
    ({"x": np.ones((2, 64), ">f4")}, nd.DtypeError, "x holds float32 of the other byte order"),
    ({"x": bytes(64)}, nd.DtypeError, "x holds uint8"),
    ({"x": [[1.0] * 64]}, nd.DataError, r"x: expected a NumPy array, a PyTorch tensor or an array on a GPU, got \["),
    ({"x": "text"}, nd.DataError, "x: expected .* got 'text'"),
    ({"x": TENSOR}, nd.DataError, "x: expected"),
    ({"x": np.ma.ones((2, 64), np.float16)}, nd.DataError, "x: it is a masked array"),
    ({"bias": np.ones(2, np.float16)}, nd.ShapeError, r"bias has shape \(2,\); pass one number for each of the 3 rows"),
    ({"bias": np.ones((1, 3), np.float16)}, nd.ShapeError, r"bias has shape \(1, 3\)"),
    ({"bias": np.ones(3, np.int32)}, nd.DtypeError, "bias holds int32; convert it to float16"),
    ({"bias": 1.0}, nd.DataError, "bias: expected"),
    ({"dtype": "int8"}, nd.DtypeError, "int8"),
    ({"dtype": np.float64}, nd.DtypeError, "float64"),
    ({"device": "tpu"}, nd.DeviceError, "unknown device 'tpu'"),
    ({"stream": 0}, nd.DeviceError, "has no streams"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_errors(options, kind, message):
    """One sentence each, and nothing has been written."""
    out = np.full((2, 3), 7, np.float16)
    arguments = {"x": X, "weight": WEIGHT, "format": "Q8_0", "device": "cpu", "out": out} | options
    if arguments["weight"] is not WEIGHT and "format" not in options and isinstance(arguments["weight"], tuple):
        arguments["format"] = None
    with pytest.raises(kind, match=message) as caught:
        nd.matmul(arguments.pop("x"), arguments.pop("weight"), arguments.pop("format"), **arguments)
    assert "\n" not in str(caught.value)
    assert (out == 7).all()


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_an_array_on_a_gpu(name):
    class OnGpu:
        def __dlpack_device__(self):
            return (2, 0)

    arguments = {"x": X, "weight": WEIGHT, "bias": None} | {name: OnGpu()}
    with pytest.raises(nd.DeviceError, match="on a GPU, but the device is cpu; copy it to the host first"):
        nd.matmul(arguments["x"], arguments["weight"], "Q8_0", bias=arguments["bias"], device="cpu")


def test_tensors_that_cannot_be_read():
    torch = pytest.importorskip("torch")
    with pytest.raises(nd.DtypeError, match="x holds int64; convert it to float16, bfloat16 or float32"):
        nd.matmul(torch.ones((2, 64), dtype=torch.int64), WEIGHT, "Q8_0", device="cpu")
    with pytest.raises(nd.DataError, match="x: cannot read bytes from a Tensor: it is a tensor without memory"):
        nd.matmul(torch.ones((2, 64), device="meta"), WEIGHT, "Q8_0", device="cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_dequantized_weight_is_never_whole(device):
    blocks = np.tile(weights("Q4_0", 16, 4096)[0], (128, 1))  # 2048 rows: 32 MiB of float32
    x = columns(1, 4096)
    nd.matmul(x, blocks[:1], "Q4_0", device=device)
    tracemalloc.start()
    nd.matmul(x, blocks, "Q4_0", device=device)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < (8 if device == "cpu" else 28) << 20


def test_the_host_is_out_of_memory(weight, monkeypatch):
    def fail(*arguments):
        raise MemoryError("not enough")

    monkeypatch.setattr(np, "matmul", fail)
    blocks, _, x = weight
    with pytest.raises(nd.DeviceError, match="the CPU is out of memory while multiplying: not enough"):
        nd.matmul(x, blocks, "Q4_1", device="cpu")
