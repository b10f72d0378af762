"""numba_dequant.torch.ggml: what programs expect of a GGML kernel library."""

import inspect

import pytest
from blocks import QUANTIZED
from finite_blocks import finite_blocks

import numba_dequant as nd

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing
from numba_dequant.torch import ggml  # noqa: E402

Q4_K, Q6_K = (nd.FORMATS[name].ggml_id for name in ("Q4_K", "Q6_K"))


def blocks_of(name, *shape, device):
    *rows, n_columns = shape
    n_rows = torch.Size(rows).numel()
    return torch.from_numpy(finite_blocks(name, n_rows, n_columns)).view(*rows, -1).to(device)


def test_parameters_are_those_that_programs_pass():
    expected = {
        "dequantize": ["blocks", "ggml_type", "rows", "cols", "dtype"],
        "get_rows": ["blocks", "indices", "ggml_type", "cols", "dtype"],
        "mul_mat_vec": ["blocks", "x", "ggml_type", "out_features"],
        "mul_mat_id": ["blocks", "x", "ids", "ggml_type", "out_features"],
        "ggml_dequantize": ["W", "type", "m", "n", "dtype"],
    }
    assert {name: list(inspect.signature(getattr(ggml, name)).parameters) for name in expected} == expected
    assert ggml.MAX_GEMV_ROWS == 8
    assert {nd.FORMATS[name].ggml_id for name in QUANTIZED} == ggml.GEMV_TYPES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values(dtype, device):
    blocks = blocks_of("Q4_K", 6, 512, device=device)
    values = nt.dequantize(blocks, "Q4_K", dtype)
    assert torch.equal(ggml.dequantize(blocks, Q4_K, 6, 512, dtype), values)
    assert torch.equal(ggml.dequantize(blocks.view(-1), Q4_K, 12, 256, dtype), values.view(12, 256))
    assert torch.equal(ggml.ggml_dequantize(blocks, Q4_K, 6, 512, dtype), values)
    assert ggml.ggml_dequantize(blocks, Q4_K, 6, 512).dtype == torch.float16
    indices = torch.tensor([5, 0, 5], device=device)
    assert torch.equal(ggml.get_rows(blocks, indices, Q4_K, 512, dtype), values[indices])


def test_products(device):
    blocks, x = blocks_of("Q6_K", 48, 256, device=device), torch.randn(3, 256, device=device)
    found = ggml.mul_mat_vec(blocks, x, Q6_K, 48)
    torch.testing.assert_close(found, x @ nt.dequantize(blocks, Q6_K).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (4, 2), (5, 2), (20, 3), (0, 2)])
def test_experts(n, k, device):
    """As many pairs as experts, fewer, more, and none."""
    blocks, x = blocks_of("Q4_K", 8, 32, 256, device=device), torch.randn(n, 256, device=device)
    ids = torch.rand(n, 8, device=device).topk(k).indices
    found = ggml.mul_mat_id(blocks, x, ids.int(), Q4_K, 32)
    expected = torch.einsum("nkoi,ni->nko", nt.dequantize(blocks, Q4_K)[ids], x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_shapes_of_experts_that_do_not_fit():
    blocks, x = blocks_of("Q4_K", 8, 32, 256, device="cpu"), torch.randn(3, 256)
    for wrong in ((blocks[0], x, torch.zeros(3, 2)), (blocks, x, torch.zeros(2, 2)), (blocks, x, torch.zeros(3))):
        with pytest.raises(nd.ShapeError, match=r"blocks must have the shape \(experts, rows, bytes per row\)"):
            ggml.mul_mat_id(*wrong, Q4_K, 32)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_arguments_are_checked_with_and_without_gradients(needs_gradient, device):
    blocks = blocks_of("Q4_K", 2, 32, 256, device=device)
    x = torch.randn(1, 256, device=device, requires_grad=needs_gradient)
    ids = torch.tensor([[1, 0]], device=device)
    with pytest.raises(nd.DtypeError, match="not integers"):
        ggml.mul_mat_id(blocks, x, ids.float(), Q4_K, 32)
    with pytest.raises(nd.ShapeError, match=r"the input \(n, in_features\)"):
        ggml.mul_mat_id(blocks, x[:, None].expand(1, 3, 256), ids, Q4_K, 32)
    with pytest.raises(nd.ShapeError, match="is as long as a row"):
        ggml.mul_mat_id(blocks, x[:, :128], ids, Q4_K, 32)
    if device == "cpu":
        with pytest.raises(nd.ShapeError, match="only 2 experts"):
            ggml.mul_mat_id(blocks, x, ids + 1, Q4_K, 32)


@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_gradients_of_experts(n, backend, device):
    """Fewer pairs than experts, and more; in one graph."""
    blocks = blocks_of("Q4_K", 5, 32, 256, device=device)
    x = torch.randn(n, 256, device=device, requires_grad=True)
    ids = torch.rand(n, 5, device=device).topk(2).indices.t().contiguous().t()

    def product(x):
        return ggml.mul_mat_id(blocks, x, ids, Q4_K, 32)

    call = product if backend is None else torch.compile(product, backend=backend, fullgraph=True)
    found = call(x)
    values = nt.dequantize(blocks, Q4_K)
    expected = torch.einsum("nkoi,ni->nko", values[ids], x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous()
    weight = torch.randn_like(found)
    (of_x,) = torch.autograd.grad(found, x, weight)
    (of_expected,) = torch.autograd.grad(expected, x, weight)
    torch.testing.assert_close(of_x, of_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 7])
def test_types_of_experts(n):
    """Autocast does not change the type of the result; double has as many digits, and all integers are numbers."""
    blocks, x = blocks_of("Q4_K", 5, 32, 256, device="cpu"), torch.randn(n, 256)
    ids = torch.rand(n, 5).topk(2).indices
    expected = ggml.mul_mat_id(blocks, x.double(), ids, Q4_K, 32)
    assert expected.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        found = ggml.mul_mat_id(blocks, x, ids, Q4_K, 32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16):
        assert torch.equal(ggml.mul_mat_id(blocks, x, ids.to(dtype), Q4_K, 32), found)
        rows = nt.get_rows(blocks[0], ids.to(dtype), Q4_K, torch.float32)
        assert torch.equal(rows, nt.get_rows(blocks[0], ids, Q4_K, torch.float32))
