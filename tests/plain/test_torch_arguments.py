"""PyTorch's tensors, types and devices as arguments, where the device is the CPU."""

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant.arguments import is_on_gpu
from numba_dequant.interop import TORCH

torch = pytest.importorskip("torch")

BLOCKS = random_blocks("Q8_0", 6)
EXPECTED = nd.dequantize(BLOCKS, "Q8_0", device="reference")
BYTES = torch.from_numpy(BLOCKS.copy())
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def dequantize(data=BLOCKS, *args, **options):
    return nd.dequantize(data, "Q8_0", *args, **({"device": "cpu"} | options))


class Overriding(torch.Tensor):
    """A subclass that lets no function of PyTorch through, as those that track shapes or types of their own do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("this subclass has its own idea of tensors")


class TestData:
    @pytest.mark.parametrize(
        "data",
        [
            BYTES,
            BYTES.reshape(6, 34),
            BYTES.view(torch.int8),
            BYTES.view(torch.bfloat16),
            BYTES.view(torch.float16),
            BYTES.view(torch.float8_e4m3fn),
            BYTES.view(torch.int16),
            BYTES.view(torch.bfloat16).requires_grad_(),
            torch.nn.Parameter(BYTES, requires_grad=False),
            torch.nn.Parameter(BYTES.view(torch.float16)),
            BYTES.as_subclass(Overriding),
            torch.stack([BYTES, BYTES], 1)[:, 0],
            torch.nn.functional.pad(BYTES.reshape(6, 34), (0, 9))[:, :34],
            torch.nn.functional.pad(BYTES.view(torch.bfloat16).reshape(6, 17), (0, 9))[:, :17],
        ],
        ids=range(14),
    )
    def test_every_tensor_is_taken_by_its_bytes(self, data):
        for device in ("cpu", "reference"):
            assert_same_bits(dequantize(data, device=device), EXPECTED)
        assert_same_bits(nd.dequantize_many({1: (data, "Q8_0")}, device="cpu")[1], EXPECTED)
        assert nd.explain(data, "Q8_0", block=5).raw.tobytes() == BLOCKS[5 * 34 :].tobytes()

    def test_a_batch_reads_tensors_anew(self):
        rows = torch.zeros(6, 50, dtype=torch.uint8)
        flat = torch.zeros(204, dtype=torch.uint8)
        batch = nd.prepare_many({"rows": (rows[:, :34], "Q8_0"), "flat": (flat, "Q8_0")}, device="cpu")
        assert not any(values.any() for values in batch.run().values())
        rows[:, :34] = BYTES.reshape(6, 34)
        flat[:] = BYTES
        for values in batch.run().values():
            assert_same_bits(values, EXPECTED)

    def test_conjugates_and_negatives_are_resolved(self):
        lazy = torch.view_as_complex(torch.arange(34, dtype=torch.float32).reshape(17, 2)).conj()
        assert lazy.is_conj()
        assert_same_bits(dequantize(lazy), dequantize(lazy.resolve_conj().numpy()))
        assert lazy.imag.is_neg()
        assert_same_bits(dequantize(lazy.imag), dequantize(lazy.imag.resolve_neg().numpy().copy()))

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_tensors_without_memory(self, device):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.zeros(34, dtype=torch.uint8, device=device)
        for data in (fake, torch.zeros(34, dtype=torch.uint8, device="meta")):
            assert not is_on_gpu(data)
            for call in (dequantize, lambda data: nd.explain(data, "Q8_0")):
                with pytest.raises(
                    nd.DataError, match=r"without memory \(meta or fake\).*numba_dequant\.torch\.dequantize"
                ):
                    call(data)
            with pytest.raises(nd.DataError, match=r"tensor 'a': .*without memory"):
                nd.dequantize_many({"a": (data, "Q8_0")}, device="cpu")

    def test_what_has_no_bytes_of_its_own(self):
        for data in (torch.eye(34).to_sparse(), torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)):
            with pytest.raises(nd.DataError, match="cannot read bytes from a "):
                dequantize(data)
        with pytest.raises(nd.DataError, match="cannot read bytes from a Tensor"):
            torch.func.vmap(lambda row: torch.from_numpy(dequantize(row)))(BYTES.reshape(6, 34))


class TestOut:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", ["cpu", "reference"])
    def test_it_is_written_to_and_returned(self, dtype, device):
        expected = torch.from_numpy(dequantize(dtype="float32")).to(dtype)
        for out in (
            torch.empty(192, dtype=dtype),
            torch.empty(6, 32, dtype=dtype),
            torch.empty(192, dtype=dtype).as_subclass(torch.nn.Buffer) if hasattr(torch.nn, "Buffer") else None,
            torch.nn.Parameter(torch.empty(6, 32, dtype=dtype)),
            torch.empty(400, dtype=dtype)[3:195],
        ):
            if out is not None:
                assert dequantize(dtype=dtype, out=out, device=device) is out
                torch.testing.assert_close(out.detach().reshape(-1), expected, rtol=0, atol=0)
        found = nd.dequantize_many({1: (BLOCKS, "Q8_0")}, dtype, device=device, out={1: out})
        assert found[1] is out

    def test_stored_types(self):
        out = torch.empty(4, dtype=torch.int32)
        assert nd.dequantize(np.arange(4, dtype=np.int32), "I32", out=out, device="cpu") is out
        assert out.tolist() == [0, 1, 2, 3]

    def test_autograd_learns_of_it(self):
        """A graph that has kept the old values must not use the new ones without a word."""
        out = torch.ones(192, requires_grad=True)
        product = (out * out).sum()
        batch = nd.prepare_many({1: (BLOCKS, "Q8_0")}, None, device="cpu", out={1: out})
        product.backward(retain_graph=True)
        before = out._version
        batch.run()
        assert out._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        assert out.is_leaf
        assert out.requires_grad

    def test_inference_tensors(self):
        with torch.inference_mode():
            out = torch.empty(192, dtype=torch.float16)
        assert dequantize(out=out) is out
        assert_same_bits(out.numpy(), EXPECTED)

    def test_a_result_of_a_graph_is_refused_unless_gradients_are_off(self):
        out = torch.zeros(192, dtype=torch.float16, requires_grad=True) * 1
        with pytest.raises(nd.OutputError, match=r"keeps gradients; pass out\.detach\(\)"):
            dequantize(out=out)
        assert not out.any()
        with torch.no_grad():
            assert dequantize(out=out) is out
        assert dequantize(out=out.detach()).any()

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (lambda: torch.empty(192, dtype=torch.float64), "it holds float64, the result is float16"),
            (lambda: torch.empty(192, dtype=torch.float8_e5m2), "it holds float8_e5m2, the result is float16"),
            (lambda: torch.empty(191, dtype=torch.float16), r"shape \(191,\)"),
            (lambda: torch.empty(384, dtype=torch.float16)[::2], "not C-contiguous"),
            (lambda: torch.empty(1, dtype=torch.float16).expand(192), "not C-contiguous"),
            (lambda: torch.empty(192, dtype=torch.float16, device="meta"), "without memory"),
            (lambda: torch.empty(192, dtype=torch.float16).to_sparse(), "cannot write to out"),
        ],
        ids=["float64", "float8", "shape", "strided", "expanded", "meta", "sparse"],
    )
    def test_what_is_wrong_is_said(self, out, message):
        with pytest.raises(nd.OutputError, match=message):
            dequantize(out=out())

    def test_one_that_shares_memory_with_another(self):
        room = torch.zeros(1000, dtype=torch.uint8)
        halves = room[:400].view(torch.float16)
        with pytest.raises(nd.OutputError, match="out shares memory with data"):
            dequantize(room[100:304], out=halves[:192])
        tensors = {"a": (BLOCKS, "Q8_0"), "b": (BLOCKS, "Q8_0")}
        with pytest.raises(nd.OutputError, match="shares memory with out of tensor"):
            nd.dequantize_many(tensors, device="cpu", out={"a": halves[:192], "b": halves[8:].numpy()})

    def test_the_parameters_of_a_module_are_loaded(self, tmp_path):
        model = nd.open(write_model(tmp_path / "m.gguf", {"weight": ("Q8_0", (6, 32), BLOCKS)}))
        for dtype in DTYPES:
            linear = torch.nn.Linear(32, 6, bias=False, dtype=dtype)
            for out in (linear.state_dict(), dict(linear.named_parameters())):
                torch.nn.init.zeros_(linear.weight)
                found = model.load_all(out=out, dtype=None, device=linear.weight.device)
                assert found["weight"] is out["weight"]
                expected = torch.from_numpy(dequantize(dtype="float32", shape=(6, 32))).to(dtype)
                torch.testing.assert_close(linear.weight.detach(), expected, rtol=0, atol=0)
        assert model.load("weight", None, device="cpu", out=linear.weight) is linear.weight


class TestFreedMemory:
    """FSDP keeps tensors whose memory it has freed. PyTorch checks nothing: access would end the process."""

    @pytest.mark.parametrize("n_bytes", [0, 203])
    @pytest.mark.parametrize("make", [torch.Tensor.detach, lambda data: data.view(torch.int16),
                                      lambda data: torch.nn.Parameter(data, requires_grad=False),
                                      lambda data: data.as_subclass(Overriding)])  # fmt: skip
    def test_data(self, make, n_bytes):
        base = BYTES.clone()
        data = make(base)
        base.untyped_storage().resize_(n_bytes)
        message = f"its memory was freed: its storage has {n_bytes} of the 204 bytes that it needs"
        for device in ("cpu", "reference"):
            with pytest.raises(nd.DataError, match=message):
                dequantize(data, device=device)
        with pytest.raises(nd.DataError, match=message):
            nd.dequantize_many({1: (data, "Q8_0")}, device="cpu")
        with pytest.raises(nd.DataError, match=message):
            nd.matmul(torch.zeros(1, 32), data, "Q8_0", device="cpu")
        with pytest.raises(nd.DataError, match=message):
            nd.open(data)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_out(self, dtype, tmp_path):
        out = torch.zeros(192, dtype=dtype)
        out.untyped_storage().resize_(out.nbytes - 1)
        message = f"its storage has {out.nbytes - 1} of the {out.nbytes} bytes that it needs"
        with pytest.raises(nd.OutputError, match=message):
            dequantize(out=out)
        path = write_model(tmp_path / "model.gguf", {"x": ("Q8_0", (192,), BLOCKS)})
        with pytest.raises(nd.OutputError, match=f"tensor 'x': .*{message}"):
            nd.load(path, out={"x": out}, device="cpu")

    def test_columns_and_bias(self):
        x, bias = torch.zeros(2, 32), torch.zeros(6)
        for lost, given in ((x, {"x": x}), (bias, {"bias": bias})):
            lost.untyped_storage().resize_(8)
            with pytest.raises(nd.DataError, match=f"its storage has 8 of the {lost.nbytes} bytes"):
                nd.matmul(**{"x": torch.zeros(2, 32), "weight": BLOCKS, "format": "Q8_0", "device": "cpu"} | given)

    def test_on_a_gpu(self):
        """Where a pointer is all that a kernel gets, its tensor is looked at before."""
        assert TORCH.view(BYTES).pointer == BYTES.data_ptr()
        lost = BYTES.clone()
        lost.untyped_storage().resize_(0)
        with pytest.raises(nd.DataError, match="its memory was freed"):
            TORCH.view(lost)
        assert "its memory was freed" in TORCH.why_not_written(lost)

    def test_where_nothing_should_look_at_its_values(self):
        """PyTorch's `repr` of such a tensor ends the process."""
        lost = torch.zeros(3)
        lost.untyped_storage().resize_(0)
        for wrong in (lost, [lost], {"a": (lost,)}):
            with pytest.raises(nd.NumbaDequantError, match=r"Tensor of shape \(3,\)"):
                dequantize(dtype=wrong)
            with pytest.raises(nd.NumbaDequantError, match=r"Tensor of shape \(3,\)"):
                dequantize(device=wrong)


class TestTheOthers:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype(self, dtype):
        assert f"torch.{dequantize(dtype=dtype).dtype.name}" == str(dtype)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.zeros(3)])
    def test_dtypes_that_are_none(self, dtype):
        with pytest.raises(nd.DtypeError, match="choose one of float16, bfloat16, float32"):
            dequantize(dtype=dtype)

    def test_no_dtype_is_the_default_of_torch_for_its_tensors(self):
        assert dequantize(BYTES, None).dtype == np.float32
        assert dequantize(BLOCKS, None).dtype == np.float16
        assert nd.dequantize_many({1: (BYTES, "Q8_0")}, None, device="cpu")[1].dtype == np.float32
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            assert dequantize(BYTES, None).dtype.name == "bfloat16"
            torch.set_default_dtype(torch.float64)
            with pytest.raises(nd.DtypeError, match=r"torch\.float64"):
                dequantize(BYTES, None)
        finally:
            torch.set_default_dtype(before)

    def test_device(self):
        for device in (torch.device("cpu"), torch.device("cpu", 0), BYTES.device):
            assert_same_bits(dequantize(device=device), EXPECTED)
        for device in ("meta", "mps", "xpu"):
            with pytest.raises(nd.DeviceError, match="unknown device device"):
                dequantize(device=torch.device(device))

    @pytest.mark.parametrize("shape", [torch.Size([6, 32]), torch.tensor([6, 32]), [torch.tensor(6), -1]])
    def test_shape(self, shape):
        assert dequantize(shape=shape).shape == (6, 32)

    @pytest.mark.parametrize("shape", [torch.tensor([6.0, 32.0]), torch.tensor([True]), torch.zeros(2, device="meta")])
    def test_shapes_that_are_none(self, shape):
        with pytest.raises(nd.ShapeError, match="whole numbers"):
            dequantize(shape=shape)
