"""numba_dequant.torch: operators, on the CPU and on a GPU."""

import enum

import numpy as np
import pytest
from blocks import DTYPES, GOLDEN, QUANTIZED, assert_same_bits, golden, rounded
from finite_blocks import finite_blocks

import numba_dequant as nd

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing
from numba_dequant.torch import ops  # noqa: E402

OPERATORS = torch.ops.numba_dequant


def bits_of(tensor):
    values = tensor.cpu()
    if values.dtype in (torch.float16, torch.float32, torch.float64) or not values.is_floating_point():
        return values.numpy()
    return values.view(getattr(torch, f"int{8 * values.itemsize}")).numpy().view(f"u{values.itemsize}")


def assert_exact(tensor, values, dtype):
    """The float32 `values`, rounded once."""
    expected = rounded(values, dtype)
    assert_same_bits(bits_of(tensor).view(expected.dtype), expected)


def blocks_of(name, device, n_rows=4, n_columns=512, seed=0):
    return torch.from_numpy(finite_blocks(name, n_rows, n_columns, seed)).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in GOLDEN if nd.FORMATS[name].decode is not None])
def test_golden(name, dtype, device):
    data, values = golden(name)
    tensor = torch.from_numpy(data.reshape(-1)).to(device)
    assert_exact(nt.dequantize(tensor, name, getattr(torch, dtype)), values.reshape(-1), dtype)


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64"])
def test_a_stored_type_stays(name, device):
    stored = nd.FORMATS[name].stored_dtype
    values = np.arange(12, dtype=stored).reshape(3, 4)
    data = torch.from_numpy(values.view(np.uint8)).to(device)
    found = nt.dequantize(data, name, torch.float16)
    assert found.cpu().numpy().dtype == stored
    np.testing.assert_array_equal(found.cpu().numpy(), values)


class Kind(enum.IntEnum):
    Q4_K = 12


@pytest.mark.parametrize("qtype", ["Q4_K", "q4_k", 12, Kind.Q4_K, nd.FORMATS["Q4_K"], np.int64(12)], ids=repr)
def test_ways_to_name_a_format(qtype, device):
    blocks = blocks_of("Q4_K", device)
    found = nt.dequantize(blocks, qtype)
    assert found.shape == (4, 512)
    assert found.dtype == torch.float32
    assert torch.equal(found, nt.dequantize(blocks, "Q4_K", "float32"))


def test_true_is_not_the_type_1():
    blocks = torch.zeros(4, dtype=torch.uint8)
    assert nt.dequantize(blocks, 1).shape == (2,)
    with pytest.raises(nd.UnknownFormatError):
        nt.dequantize(blocks, True)


def test_the_default_dtype(device):
    blocks = blocks_of("Q8_0", device)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert nt.dequantize(blocks, "Q8_0").dtype == torch.bfloat16
        assert nt.get_rows(blocks, torch.tensor([1], device=device), "Q8_0").dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("shape", [(2048,), (2, -1), (2, 2, 512), torch.Size([8, 256])])
def test_shape(shape, device):
    blocks = blocks_of("Q5_K", device)
    found = nt.dequantize(blocks, "Q5_K", torch.float16, shape)
    assert torch.equal(found, nt.dequantize(blocks, "Q5_K", torch.float16).reshape(shape))


def test_out(device):
    blocks = blocks_of("Q6_K", device)
    expected = nt.dequantize(blocks, "Q6_K", torch.bfloat16)
    out = torch.full((4, 512), 7, dtype=torch.bfloat16, device=device)
    version = out._version
    assert nt.dequantize(blocks, "Q6_K", out=out) is out
    assert torch.equal(out, expected)
    assert out._version > version
    flat = torch.empty(2048, dtype=torch.bfloat16, device=device)
    assert torch.equal(nt.dequantize(blocks, "Q6_K", torch.bfloat16, (2048,), out=flat), expected.reshape(-1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qtype": "Q4_L"}, nd.UnknownFormatError, "Did you mean"),
        ({"dtype": torch.float64}, nd.DtypeError, "float64"),
        ({"dtype": torch.int32}, nd.DtypeError, "int32"),
        ({"data": np.zeros(144, np.uint8)}, nd.DataError, "data must be a tensor"),
        ({"data": torch.zeros(4, 143, dtype=torch.uint8)}, nd.DataError, "blocks of 144 bytes"),
        ({"data": torch.zeros((), dtype=torch.uint8)}, nd.DataError, "no dimension"),
        ({"shape": (3, -1)}, nd.ShapeError, "-1"),
        ({"shape": (5, 512)}, nd.ShapeError, "as many elements"),
        ({"out": np.zeros(2048, np.float16)}, nd.OutputError, "out must be a tensor"),
        ({"out": torch.zeros(3, 512)}, nd.OutputError, "1536 elements"),
        ({"out": torch.zeros(4, 512), "dtype": torch.float16}, nd.OutputError, "out holds torch.float32"),
        ({"out": torch.zeros(512, 4).T}, nd.OutputError, "not contiguous"),
        ({"out": torch.zeros(4, 512, device="meta")}, nd.OutputError, "out is on meta"),
        ({"out": torch.zeros(4, 512), "shape": (8, 256)}, nd.OutputError, "out has shape"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"data": blocks_of("Q4_K", "cpu"), "qtype": "Q4_K"} | change
    with pytest.raises(error, match=message):
        nt.dequantize(**arguments)


def test_an_operator_that_is_called_directly_checks_too(device):
    blocks = blocks_of("Q4_K", device)
    with pytest.raises(nd.UnknownFormatError):
        OPERATORS.dequantize(blocks, "Q4_L", torch.float16)
    with pytest.raises(nd.DtypeError, match=r"values of Q4_K cannot be torch\.int32; choose"):
        OPERATORS.dequantize(blocks, "Q4_K", torch.int32)
    with pytest.raises(nd.DtypeError, match=r"cannot be torch\.int32"):
        OPERATORS.dequantize(blocks, "Q4_K", out=torch.empty(4, 512, dtype=torch.int32, device=device))


def test_out_that_shares_memory_with_data(device):
    memory = torch.zeros(4096, dtype=torch.uint8, device=device)
    blocks = memory[:34]
    with pytest.raises(nd.OutputError, match="out shares memory with data"):
        nt.dequantize(blocks, "Q8_0", out=memory[32:96].view(torch.float16))
    assert nt.dequantize(blocks, "Q8_0", out=memory[64:128].view(torch.float16)).shape == (32,)
    assert not memory.any()


class Lying(torch.Tensor):
    """As ComfyUI-GGUF's tensors: `shape` is that of the values."""

    @property
    def shape(self):
        return torch.Size([4, 512])


def test_kinds_of_data(device):
    blocks = blocks_of("Q4_K", device)
    expected = nt.dequantize(blocks, "Q4_K")
    padded = torch.zeros(4, 300, dtype=torch.uint8, device=device)
    padded[:, :288] = blocks
    kinds = [
        torch.nn.Parameter(blocks, requires_grad=False),
        blocks.as_subclass(Lying),
        blocks.view(torch.int8),
        blocks.view(torch.float16),
        padded[:, :288],
    ]
    for data in kinds:
        found = nt.dequantize(data, "Q4_K")
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)
        assert torch.equal(nt.dequantize(data, "Q4_K", shape=(8, 256)), expected.view(8, 256))


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_values_of_a_plain_type_as_data(name, device):
    values = torch.randn(3, 8, device=device).to(
        {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]
    )
    assert torch.equal(nt.dequantize(values, name, torch.float32), values.float())
    assert torch.equal(nt.dequantize(values.view(torch.uint8), name, values.dtype), values)


def test_an_unregistered_format_is_refused(own_format):
    with pytest.raises(nd.UnknownFormatError, match="is not registered; call"):
        nt.dequantize(torch.zeros(34, dtype=torch.uint8), own_format)
    nd.register(own_format)
    assert nt.dequantize(torch.zeros(2, 34, dtype=torch.uint8), own_format).shape == (2, 32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_elements(name, device):
    assert nt.dequantize(torch.empty(0, dtype=torch.uint8, device=device), name).shape == (0,)
    empty = torch.empty(0, nd.FORMATS[name].type_size, dtype=torch.uint8, device=device)
    assert nt.dequantize(empty, name).shape == (0, nd.FORMATS[name].block_size)


def test_get_rows(device):
    blocks = blocks_of("Q4_K", device, n_rows=9)
    values = nt.dequantize(blocks, "Q4_K", torch.bfloat16)
    for numbers in ([[3, 0, 3], [8, 1, 2]], [], 5):
        indices = torch.tensor(numbers, dtype=torch.int64, device=device)
        found = nt.get_rows(blocks, indices, "Q4_K", torch.bfloat16)
        assert torch.equal(found, values[indices])
    found = nt.get_rows(blocks, torch.tensor([2], dtype=torch.int32, device=device), 12)
    assert torch.equal(found, nt.dequantize(blocks[2:3], 12))
    with pytest.raises(nd.DataError, match="2 dimensions"):
        nt.get_rows(blocks.view(-1), torch.tensor([0], device=device), "Q4_K")


def test_rows_out_of_range():
    with pytest.raises(IndexError):
        nt.get_rows(blocks_of("Q4_K", "cpu"), torch.tensor([4]), "Q4_K")


mul_mat_id = torch.ops.numba_dequant.mul_mat_id.default


def test_numbers_of_rows_and_experts_are_integers_on_the_same_device(device):
    """A kernel would read an address of the other device."""
    blocks = blocks_of("Q4_K", device, n_columns=256)
    x = torch.ones(1, 256, device=device)
    for wrong in (torch.tensor([[0.0]], device=device), torch.tensor([[True]], device=device)):
        with pytest.raises(nd.DtypeError, match="integers"):
            nt.get_rows(blocks, wrong, "Q4_K")
        with pytest.raises(nd.DtypeError, match="integers"):
            mul_mat_id(x, blocks[None], wrong, "Q4_K")
    if device == "cuda":
        with pytest.raises(nd.DataError, match="one device"):
            nt.get_rows(blocks, torch.tensor([[0]]), "Q4_K")
        with pytest.raises(nd.DataError, match="one device"):
            mul_mat_id(x, blocks[None], torch.tensor([[0]]), "Q4_K")


@pytest.mark.parametrize("numbers", [[[7], [7], [7]], [[7]], [[-1]]])
def test_experts_that_do_not_exist(numbers):
    x = torch.ones(len(numbers), 256)
    with pytest.raises(nd.ShapeError, match="there are only 1 experts; pass numbers from 0 to 0"):
        mul_mat_id(x, blocks_of("Q4_K", "cpu", n_columns=256)[None], torch.tensor(numbers), "Q4_K")


def test_integers_are_not_multiplied_by_experts():
    x = torch.ones(1, 256, dtype=torch.int32)
    with pytest.raises(nd.DtypeError, match="floating-point"):
        mul_mat_id(x, blocks_of("Q4_K", "cpu", n_columns=256)[None], torch.tensor([[0]]), "Q4_K")


@pytest.mark.parametrize("name", QUANTIZED)
def test_linear(name, device):
    blocks = blocks_of(name, device, 24)
    bias = torch.randn(24, device=device)
    input = torch.randn(2, 3, 512, device=device)
    dense = nt.dequantize(blocks, name)
    torch.testing.assert_close(nt.linear(input, blocks, name, bias), torch.nn.functional.linear(input, dense, bias))
    half = input.half()
    found = nt.linear(half, blocks, name)
    assert found.dtype == torch.float16
    # A product rounds the weights to float16, or not at all.
    expected, of_half = (half.double() @ weights.double().T for weights in (dense, dense.half()))
    allowed = (expected - of_half).norm() + 2.0**-11 * expected.norm()
    assert (found.double() - expected).norm() <= allowed


def test_gradients(device):
    blocks = blocks_of("Q4_K", device, 6, 256)
    input = torch.randn(2, 256, device=device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nt.linear(x, blocks, "Q4_K", b), (input, bias))
    assert torch.autograd.gradgradcheck(lambda x: nt.linear(x, blocks, "Q4_K"), (input,))


def kept_bytes(function):
    """Bytes of the tensors that a forward keeps for backward."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


def test_backward_keeps_the_blocks(device):
    blocks = blocks_of("Q4_K", device, 512)
    input = torch.randn(4, 512, device=device, requires_grad=True)
    ours, found = kept_bytes(lambda: nt.linear(input, blocks, "Q4_K"))
    dense, expected = kept_bytes(lambda: torch.nn.functional.linear(input, nt.dequantize(blocks, "Q4_K")))
    assert ours == blocks.numel()
    assert dense >= 4 * 512 * 512
    gradient = torch.randn_like(found)
    (of_ours,) = torch.autograd.grad(found, input, gradient)
    (of_dense,) = torch.autograd.grad(expected, input, gradient)
    torch.testing.assert_close(of_ours, of_dense)


def test_a_large_weight_is_dequantized_in_pieces(monkeypatch, device):
    blocks = blocks_of("Q8_0", device, 37)
    input = torch.randn(3, 512, device=device, requires_grad=True)
    bias = torch.randn(37, device=device)
    whole = nt.linear(input, blocks, "Q8_0", bias)
    (of_whole,) = torch.autograd.grad(whole.sum(), input)
    monkeypatch.setattr(ops, "PIECE", 512 * 10)
    monkeypatch.setattr(ops, "CPU_PIECE", 512 * 10)
    monkeypatch.setattr(ops, "MOST_COLUMNS", 0)
    assert len(ops._pieces(blocks, "Q8_0")) == 4
    pieces = nt.linear(input, blocks, "Q8_0", bias)
    torch.testing.assert_close(pieces, whole)
    (of_pieces,) = torch.autograd.grad(pieces.sum(), input)
    torch.testing.assert_close(of_pieces, of_whole)


def test_autocast(device):
    blocks, input = blocks_of("Q4_K", device), torch.randn(2, 512, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = nt.linear(input, blocks, "Q4_K")
        direct = OPERATORS.linear(input, blocks, "Q4_K", None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, nt.linear(input.bfloat16(), blocks, "Q4_K"))
    assert direct.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 511)}, nd.ShapeError, "input has 511 features, but a row of weight"),
        ({"input": torch.zeros(2, 512, dtype=torch.int32)}, nd.DtypeError, "floating-point"),
        ({"weight": torch.zeros(1152, dtype=torch.uint8)}, nd.DataError, "weight must have 2 dimensions"),
        ({"input": torch.tensor(1.0)}, nd.ShapeError, "input has no dimension"),
        ({"input": torch.zeros(2, 384), "weight": torch.zeros(4, 216, dtype=torch.uint8)}, nd.DataError, "whole rows"),
        ({"bias": torch.zeros(3)}, nd.ShapeError, r"bias has shape \(3,\), but weight has 4 rows"),
        ({"bias": torch.zeros(4, 1)}, nd.ShapeError, r"bias has shape \(4, 1\), but weight has 4 rows"),
        ({"qtype": "Q4_L"}, nd.UnknownFormatError, "Did you mean"),
    ],
)
def test_wrong_arguments_of_linear(change, error, message):
    arguments = {"input": torch.zeros(2, 512), "weight": blocks_of("Q4_K", "cpu"), "qtype": "Q4_K"} | change
    with pytest.raises(error, match=message):
        nt.linear(**arguments)


def test_operators_read_nothing_that_does_not_belong_to_their_arguments(device):
    """A kernel would read beyond a row, a weight or a bias, or another row than the one that is meant."""
    blocks, input = blocks_of("Q4_K", device), torch.zeros(2, 512, device=device)
    cut, short = blocks[:, :216].contiguous(), torch.zeros(3, device=device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=device)
    for wrong in (lambda: OPERATORS.linear(input[:, :384].contiguous(), cut, "Q4_K", None),
                  lambda: OPERATORS.linear(input[:, :256].contiguous(), blocks, "Q4_K", None),
                  lambda: OPERATORS.linear(input, blocks, "Q4_K", short),
                  lambda: OPERATORS.linear(input, blocks, "Q4_K", torch.zeros(4, device=device).half()),
                  lambda: OPERATORS.mul_mat_id(input[:, :384].contiguous(), cut[None], ids, "Q4_K"),
                  lambda: OPERATORS.mul_mat_id(input[:, :256].contiguous(), blocks[None], ids, "Q4_K")):  # fmt: skip
        with pytest.raises((nd.DataError, nd.ShapeError)):
            wrong()


@pytest.mark.gpu
def test_operators_take_tensors_of_one_device():
    blocks, input = blocks_of("Q4_K", "cpu"), torch.zeros(2, 512)
    for given in ((input.cuda(), blocks), (input, blocks.cuda())):
        with pytest.raises(nd.DataError, match="pass both on the same device"):
            OPERATORS.linear(*given, "Q4_K", None)


def test_strided_data_and_an_output_in_the_same_memory():
    memory = torch.arange(400, dtype=torch.int32).to(torch.uint8)
    data, out = memory[0:100:2], memory[60:110].view(torch.int8)
    expected = data.clone().view(torch.int8)
    nt.dequantize(data, "I8", torch.float32, out=out)
    assert torch.equal(out, expected)


def test_a_table_without_rows():
    with pytest.raises(IndexError, match="data has no rows"):
        nt.get_rows(torch.zeros(0, 18, dtype=torch.uint8), torch.tensor([0]), "Q4_0", torch.float32)
