"""QuantizedLinear and QuantizedEmbedding."""

import copy

import pytest
from finite_blocks import finite_blocks

import numba_dequant as nd

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing


@pytest.fixture
def blocks(device):
    return torch.from_numpy(finite_blocks("Q4_K", 24, 512)).to(device)


@pytest.fixture
def linear(blocks, device):
    return nt.QuantizedLinear.from_blocks(blocks, "q4_k", torch.randn(24, device=device))


def test_linear(linear, blocks, device):
    assert isinstance(linear, torch.nn.Linear)
    assert (linear.in_features, linear.out_features, linear.qtype) == (512, 24, "Q4_K")
    assert str(linear) == "QuantizedLinear(in_features=512, out_features=24, bias=True, qtype=Q4_K)"
    assert linear.weight.data_ptr() == blocks.data_ptr()
    assert type(linear.weight) is torch.nn.Parameter
    assert not linear.weight.requires_grad
    dense = linear.dequantize()
    assert type(dense) is torch.nn.Linear
    assert torch.equal(dense.weight, nt.dequantize(blocks, "Q4_K"))
    input = torch.randn(2, 512, device=device)
    torch.testing.assert_close(linear(input), dense(input))
    assert linear.dequantize(torch.float16).weight.dtype == torch.float16
    assert linear.dequantize(torch.float16).bias.dtype == torch.float16


def test_a_new_layer_takes_a_state_dict(linear, device):
    fresh = nt.QuantizedLinear(512, 24, "Q4_K", device=device)
    assert fresh.weight.shape == linear.weight.shape
    assert fresh.load_state_dict(linear.state_dict()) == ([], [])
    input = torch.randn(2, 512, device=device)
    assert torch.equal(fresh(input), linear(input))
    assert nt.QuantizedLinear(512, 24, 12, bias=False).bias is None
    with pytest.raises(nd.ShapeError, match="whole number of blocks"):
        nt.QuantizedLinear(500, 24, "Q4_K")
    with pytest.raises(nd.UnknownFormatError):
        nt.QuantizedLinear(512, 24, "Q4_L")
    with pytest.raises(nd.DataError, match="weight must be uint8"):
        nt.QuantizedLinear.from_blocks(torch.zeros(3, 288), "Q4_K")
    with pytest.raises(nd.DataError, match="blocks of 144 bytes"):
        nt.QuantizedLinear.from_blocks(torch.zeros(3, 287, dtype=torch.uint8), "Q4_K")


def moved(name):
    return pytest.param(name, id=name)


CHANGES = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "double": lambda layer: layer.double(),
    "deepcopy": copy.deepcopy,
    "there and back": lambda layer: layer.to(*[layer.weight.device, layer.to("cpu")][:1]),
    "train": lambda layer: layer.train().eval(),
    "reset": lambda layer: (layer.reset_parameters(), layer)[1],
    "share": lambda layer: layer.share_memory(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [nt.QuantizedLinear, nt.QuantizedEmbedding])
def test_the_blocks_stay(blocks, change, kind):
    layer = kind.from_blocks(blocks.clone(), "Q4_K")
    changed = CHANGES[change](layer)
    assert type(changed) is kind
    assert changed.weight.dtype == torch.uint8
    assert not changed.weight.requires_grad
    assert torch.equal(changed.weight, blocks)
    assert changed.qtype == "Q4_K"


def test_to_meta_and_back(linear, device):
    state = linear.state_dict()
    empty = copy.deepcopy(linear).to("meta").to_empty(device=device)
    empty.load_state_dict(state)
    assert torch.equal(empty.weight, linear.weight)
    with torch.device("meta"):
        fresh = nt.QuantizedLinear(512, 24, "Q4_K")
    assert fresh.weight.is_meta
    assert fresh(torch.empty(3, 512, device="meta")).shape == (3, 24)
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh.weight, linear.weight)


def test_saving(linear, tmp_path, device):
    torch.save(linear.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, map_location=device)
    assert torch.equal(state["weight"], linear.weight)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(linear.state_dict(), tmp_path / "state.safetensors")
    state = safetensors.load_file(tmp_path / "state.safetensors", device=device)
    fresh = nt.QuantizedLinear(512, 24, "Q4_K", device=device)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.weight, linear.weight)


def test_embedding(blocks, device):
    layer = nt.QuantizedEmbedding.from_blocks(blocks, "Q4_K", torch.bfloat16)
    assert isinstance(layer, torch.nn.Embedding)
    assert str(layer) == "QuantizedEmbedding(24, 512, qtype=Q4_K, dtype=torch.bfloat16)"
    values = nt.dequantize(blocks, "Q4_K", torch.bfloat16)
    indices = torch.tensor([[3, 0], [23, 3]], device=device)
    assert torch.equal(layer(indices), values[indices])
    dense = layer.dequantize()
    assert type(dense) is torch.nn.Embedding
    assert torch.equal(dense(indices), values[indices])
    assert list(layer.state_dict()) == ["weight"]
    assert layer.half()(indices).dtype == torch.float16
    fresh = nt.QuantizedEmbedding(24, 512, "Q4_K", padding_idx=0, device=device)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(indices), nt.dequantize(blocks, "Q4_K")[indices])


def test_only_the_bias_is_trained(linear, device):
    linear(torch.randn(2, 512, device=device)).sum().backward()
    assert linear.weight.grad is None
    assert torch.equal(linear.bias.grad, torch.full((24,), 2.0, device=device))
