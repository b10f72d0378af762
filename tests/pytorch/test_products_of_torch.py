"""`linear` with few rows: on a GPU, a kernel multiplies the blocks themselves."""

import numpy as np
import pytest
from products import FUSED, bound, columns, error, weights

import numba_dequant as nd

torch = pytest.importorskip("torch")

from numba_dequant.torch import QuantizedLinear, functional, ggml, ops  # noqa: E402 it needs PyTorch

EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def tensors(name, n_rows, n_elements, n_columns, device, dtype=torch.float16):
    blocks, values = weights(name, n_rows, n_elements)
    x = torch.from_numpy(columns(n_columns, n_elements)).to(device, dtype)
    return torch.from_numpy(blocks.copy()).to(device), x, x.double().cpu().numpy() @ values.T


def check(found, expected, name, dtype):
    """The error of the kernel, plus half a unit in the last place of the result, which may be a subnormal number."""
    assert found.dtype == dtype
    half_a_unit = EPSILON[dtype] + torch.finfo(dtype).smallest_normal * EPSILON[dtype] / np.sqrt((expected**2).mean())
    assert error(found.double().cpu().numpy(), expected) < bound(name) + half_a_unit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("n_columns", [1, 8])
@pytest.mark.parametrize("name", FUSED)
def test_every_format(name, n_columns, dtype):
    weight, x, expected = tensors(name, 48, 1024, n_columns, "cuda", dtype)
    check(functional.linear(x, weight, name), expected, name, dtype)


RAGGED = ["Q4_0", "Q4_1", "Q6_K", "Q3_K", "MXFP4", "NVFP4", "Q2_K", "Q1_0", "IQ1_M"]


@pytest.mark.gpu
@pytest.mark.parametrize("n_columns", [1, 3, 9, 32])
@pytest.mark.parametrize("n_rows", [1, 15, 17, 300])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_shapes(name, n_rows, n_columns):
    fmt = nd.FORMATS[name]
    for n_blocks in (1, 3, 17):
        weight, x, expected = tensors(name, n_rows, n_blocks * fmt.block_size, n_columns, "cuda")
        check(functional.linear(x, weight, name), expected, name, torch.float16)


@pytest.fixture(params=[True, False], ids=["tiles", "columns"])
def always_by_kernels(request, monkeypatch):
    """Kernels multiply the blocks themselves, also where that is not faster; those of the GPU, or those of any GPU."""
    from numba_dequant.backends import cuda_product

    if not request.param:
        monkeypatch.setattr(cuda_product, "has_panels", lambda _: False)
    monkeypatch.setattr(cuda_product, "is_slower", lambda *_: False)
    monkeypatch.setattr(ops, "MOST_COLUMNS", 1000)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 33), (64, 64), (77, 130)])
@pytest.mark.parametrize("name", FUSED)
def test_many_columns(name, n_rows, n_columns, always_by_kernels):
    fmt = nd.FORMATS[name]
    for n_elements, dtype in ((fmt.block_size, torch.float16), (7 * max(fmt.block_size, 64), torch.bfloat16)):
        weight, x, expected = tensors(name, n_rows, n_elements, n_columns, "cuda", dtype)
        found = ops._product(x, weight, fmt, None, False)
        check(found, expected, name, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RAGGED)
def test_nothing_around_many_columns_is_read_or_written(name, always_by_kernels):
    fmt = nd.FORMATS[name]
    weight, x, expected = tensors(name, 70, 3 * fmt.block_size, 65, "cuda")
    for shift in (0, fmt.alignment):
        memory = torch.full((weight.numel() + 512,), 255, dtype=torch.uint8, device="cuda")
        memory[256 + shift : 256 + shift + weight.numel()] = weight.reshape(-1)
        shifted = memory[256 + shift : 256 + shift + weight.numel()].view(weight.shape)
        check(ops._product(x, shifted, fmt, None, False), expected, name, torch.float16)


@pytest.mark.gpu
def test_which_products_cublas_computes():
    """Where thread blocks do not share rows, a kernel for many columns of few rows leaves multiprocessors idle."""
    has_panels = torch.cuda.get_device_capability() == (9, 0)
    for n_rows, n_columns, is_fused in (
        (256, 32, True),
        (256, 33, has_panels),
        (48 * 200, 128, True),
        (48 * 200, 129, False),
    ):
        weight, x, _ = tensors("Q8_0", 16, 64, n_columns, "cuda")
        weight = weight[:1].expand(n_rows, -1).contiguous()
        assert (ops._product(x, weight, nd.FORMATS["Q8_0"], None, False) is not None) == is_fused


@pytest.mark.gpu
@pytest.mark.parametrize("name", RAGGED)
def test_nothing_is_read_or_written_beyond_the_tensors(name):
    """What lies around them is NaN, or must stay."""
    fmt = nd.FORMATS[name]
    n_rows, n_elements = 17, 3 * fmt.block_size
    weight, x, expected = tensors(name, n_rows, n_elements, 1, "cuda")
    for shift in (0, 16, 2 * fmt.alignment, fmt.alignment):
        memory = torch.full((weight.numel() + 512,), 255, dtype=torch.uint8, device="cuda")
        start = 256 + shift
        memory[start : start + weight.numel()] = weight.reshape(-1)
        shifted = memory[start : start + weight.numel()].view(weight.shape)
        around = torch.full((x.numel() + 256,), float("nan"), dtype=x.dtype, device="cuda")
        around[64 : 64 + x.numel()] = x.reshape(-1)
        found = functional.linear(around[64 : 64 + x.numel()].view(x.shape), shifted, name)
        check(found, expected, name, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ1_S", "MXFP4", "F16", "BF16", "F32"])
def test_some_rows(name, dtype):
    fmt = nd.FORMATS[name]
    n_elements = 5000 // fmt.block_size * fmt.block_size
    if name in FUSED:
        blocks = weights(name, 40, n_elements)[0]
    else:
        blocks = np.random.default_rng(0).standard_normal((40, n_elements)).astype(np.float16).view(np.uint8)
        blocks = np.ascontiguousarray(blocks[:, : n_elements * fmt.type_size // 4 * 4])[:, : n_elements * 2]
        blocks = np.repeat(blocks, fmt.type_size // 2, axis=1)
    data = torch.from_numpy(np.ascontiguousarray(blocks)).cuda()
    for numbers in (torch.tensor([[3, 0, 39], [39, 7, 7]]), torch.arange(40), torch.tensor(5), torch.empty(0).long()):
        found = functional.get_rows(data, numbers.cuda().int(), name, dtype)
        expected = functional.dequantize(data, name, dtype)[numbers.cuda()]
        assert found.shape == expected.shape
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.gpu
def test_the_kernel_is_used_and_not_the_dequantized_weight():
    """Its results are those of exact weights, where a float16 weight has an error of its own."""
    weight, x, expected = tensors("Q4_K", 512, 4096, 1, "cuda", torch.float16)
    found = ops._product(x, weight, nd.FORMATS["Q4_K"], None, False)
    assert found is not None
    dense = torch.nn.functional.linear(x, functional.dequantize(weight, "Q4_K", torch.float16))
    assert error(found.double().cpu().numpy(), expected) <= error(dense.double().cpu().numpy(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("n_tokens", [1, 8, 64])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ2_S"])
def test_experts(name, n_tokens, dtype):
    n_experts, n_rows, n_elements = 16, 72, 512
    blocks, values = weights(name, n_experts * n_rows, n_elements)
    weight = torch.from_numpy(blocks.copy()).cuda().view(n_experts, n_rows, -1)
    x = torch.from_numpy(columns(n_tokens, n_elements)).cuda().to(dtype)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, n_experts, (n_tokens, 4))).cuda()
    ids[:, 0] = 3  # more columns than a kernel multiplies at a time
    expected = np.einsum(
        "nk,ncrk->ncr", x.double().cpu().numpy(), values.reshape(n_experts, n_rows, n_elements)[ids.cpu().numpy()]
    )
    number = nd.FORMATS[name].ggml_id
    check(ggml.mul_mat_id(weight, x, ids, number, n_rows), expected, name, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ggml.mul_mat_id(weight, x, ids, number, n_rows)
    graph.replay()
    check(captured, expected, name, dtype)


@pytest.mark.gpu
def test_bias_and_leading_dimensions():
    weight, x, expected = tensors("Q5_1", 100, 640, 6, "cuda", torch.bfloat16)
    bias = torch.randn(100, device="cuda", dtype=torch.bfloat16)
    found = functional.linear(x.view(2, 3, 640), weight, "Q5_1", bias)
    assert found.shape == (2, 3, 100)
    check(found.view(6, 100), expected + bias.double().cpu().numpy(), "Q5_1", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("dtype", EPSILON)
def test_large_and_small_columns(scale, dtype):
    weight, x, expected = tensors("Q4_K", 64, 2048, 2, "cuda", dtype)
    x = (x.float() * scale).clamp(-6e4, 6e4).to(dtype)
    expected = x.double().cpu().numpy() @ weights("Q4_K", 64, 2048)[1].T
    found = functional.linear(x, weight, "Q4_K")
    fits = abs(expected) < torch.finfo(dtype).max
    found = found.double().cpu().numpy()
    # A result that is a subnormal float16 has fewer bits.
    slack = 2.0**-24 / max(np.sqrt((expected[fits] ** 2).mean()), 1e-30) if dtype is torch.float16 else 0
    assert error(found[fits], expected[fits]) < bound("Q4_K") + EPSILON[dtype] + slack


@pytest.mark.gpu
def test_infinite_columns_and_scales_give_no_finite_number():
    weight, x, _ = tensors("Q8_0", 16, 64, 2, "cuda", torch.bfloat16)
    x[1, 5] = float("inf")
    x[0, 5] = 1.0
    weight[3, :2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # an infinite scale
    found = functional.linear(x, weight, "Q8_0")
    assert not found[:, 3].isfinite().any()
    assert not found[1].isfinite().all()
    assert found[0, :3].isfinite().all()


@pytest.mark.gpu
def test_repeated_products_are_equal():
    weight, x, _ = tensors("Q6_K", 4096, 4096, 4, "cuda")
    first = functional.linear(x, weight, "Q6_K")
    for _ in range(20):
        assert torch.equal(functional.linear(x, weight, "Q6_K"), first)


@pytest.mark.gpu
def test_products_that_overlap():
    """Each reads the result of the one before it."""
    layers = []
    for seed in range(3):
        blocks = torch.from_numpy(weights("Q4_K", 2048, 2048)[0].copy()).roll(seed, 0).cuda()
        layers.append(QuantizedLinear.from_blocks(blocks, "Q4_K"))
    model = torch.nn.Sequential(*layers)
    for n_columns in (1, 5):
        x = torch.from_numpy(columns(n_columns, 2048)).cuda() * 1e-3
        expected = x
        for layer in layers:
            expected = functional.linear(expected, layer.weight, "Q4_K")
            torch.cuda.synchronize()
        assert expected.isfinite().all()
        for _ in range(50):
            assert torch.equal(model(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(20):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)


def test_the_cpu_multiplies_in_pieces(monkeypatch):
    monkeypatch.setattr(ops, "CPU_PIECE", 1000)
    weight, x, expected = tensors("Q4_0", 37, 320, 3, "cpu")
    bias = torch.randn(37)
    found = functional.linear(x.float(), weight, "Q4_0", bias)
    assert error(found.double().numpy(), expected + bias.double().numpy()) < 1e-6
