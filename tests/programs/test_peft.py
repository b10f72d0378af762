"""peft and accelerate: LoRA on packed weights, and that blocks survive what programs do to modules."""

import copy

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
safetensors_torch = pytest.importorskip("safetensors.torch")

from finite_blocks import finite_blocks  # noqa: E402
from torch import nn  # noqa: E402

from numba_dequant.torch import QuantizedEmbedding, QuantizedLinear  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WIDE = 512


def packed_linear(name="Q4_K", n_rows=WIDE, n_columns=WIDE, seed=0):
    blocks = torch.from_numpy(finite_blocks(name, n_rows, n_columns, seed=seed))
    bias = torch.randn(n_rows, generator=torch.Generator().manual_seed(seed))
    return QuantizedLinear.from_blocks(blocks, name, bias).requires_grad_(requires_grad=False)


def packed_model():
    embedding = QuantizedEmbedding.from_blocks(torch.from_numpy(finite_blocks("Q6_K", 50, WIDE)), "Q6_K", torch.float32)
    return nn.ModuleDict(
        {"embedding": embedding, "first": packed_linear(seed=1), "second": packed_linear("Q5_0", seed=2)}
    )


class Model(nn.Module):
    """Two layers with packed or dense weights."""

    def __init__(self, is_packed=True):
        super().__init__()
        layers = packed_model()
        self.embedding, self.first, self.second = layers.values()
        if not is_packed:
            self.embedding, self.first, self.second = (layer.dequantize(torch.float32) for layer in layers.values())
            self.requires_grad_(requires_grad=False)

    def forward(self, tokens):
        return self.second(torch.tanh(self.first(self.embedding(tokens)) / 8))


TOKENS = torch.tensor([[3, 49, 0, 7]])


def with_lora(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def trained(model):
    """The bytes of the weights that are kept for backward. The gradients are in the parameters then."""
    kept = {}

    def keep(tensor):
        if tensor.numel() > WIDE * 64:  # neither adapters nor activations
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(TOKENS).square().mean()
    loss.backward()
    return sum(kept.values())


def test_gradients_of_lora_are_those_of_the_dense_model():
    packed, dense = with_lora(Model()), with_lora(Model(is_packed=False))
    kept, kept_dense = trained(packed), trained(dense)
    found, expected = dict(packed.named_parameters()), dict(dense.named_parameters())
    adapters = [name for name, parameter in found.items() if parameter.requires_grad]
    assert len(adapters) == 4
    for name in adapters:
        scale = expected[name].grad.abs().max()
        assert scale > 0
        torch.testing.assert_close(found[name].grad / scale, expected[name].grad / scale, rtol=1e-5, atol=1e-5)
    # Only the second layer has an input that needs a gradient: it keeps 22 bytes per 32 weights.
    assert (kept, kept_dense) == (WIDE * WIDE // 32 * 22, WIDE * WIDE * 4)


def test_adapters_can_be_switched_off_and_unloaded():
    plain = Model()
    expected = plain(TOKENS)
    packed = with_lora(plain)
    assert not torch.equal(packed(TOKENS), expected)
    with packed.disable_adapter():
        assert torch.equal(packed(TOKENS), expected)
    assert torch.equal(packed.unload()(TOKENS), expected)


def test_merging_into_blocks_is_refused_by_pytorch():
    """As with all packed weights: a delta of shape (out, in) cannot be added to (out, bytes per row)."""
    packed = with_lora(Model())
    blocks = packed.base_model.model.first.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="size of tensor"):
        packed.merge_and_unload()
    assert torch.equal(packed.base_model.model.first.base_layer.weight, blocks)


def test_merging_into_dequantized_layers_works():
    packed = with_lora(Model())
    expected = packed(TOKENS)
    for name in ("first", "second"):
        wrapped = getattr(packed.base_model.model, name)
        wrapped.base_layer = wrapped.base_layer.dequantize(torch.float32)
    torch.testing.assert_close(packed.merge_and_unload()(TOKENS), expected, rtol=1e-3, atol=1e-3)


def assert_same(model, like):
    assert torch.equal(model(TOKENS), like(TOKENS))
    for name, module in like.named_children():
        assert torch.equal(getattr(model, name).weight, module.weight)
        assert getattr(model, name).qtype == module.qtype


def other_model():
    """The same layers with other blocks."""
    model = Model()
    for layer in model.children():
        layer.weight.data = layer.weight.data.flip(0)
    return model


def test_copies_and_saved_files_hold_the_blocks(tmp_path):
    model = Model()
    assert_same(copy.deepcopy(model), model)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items() if "weight" in name} == dict.fromkeys(
        ["embedding.weight", "first.weight", "second.weight"], torch.uint8
    )
    torch.save(model.state_dict(), tmp_path / "model.pt")
    safetensors_torch.save_model(model, str(tmp_path / "model.safetensors"))
    for state in (
        copy.deepcopy(model.state_dict()),
        torch.load(tmp_path / "model.pt", weights_only=True),
        safetensors_torch.load_file(tmp_path / "model.safetensors"),
    ):
        loaded = other_model()
        assert not torch.equal(loaded(TOKENS), model(TOKENS))
        loaded.load_state_dict(state)
        assert_same(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["to", "method"])
def test_change_of_dtype_leaves_the_blocks(dtype, way):
    model, like = Model(), Model()
    if way == "to":
        model.to(dtype)
    else:
        model.half() if dtype is torch.float16 else model.bfloat16()
    for name, module in like.named_children():
        assert torch.equal(getattr(model, name).weight, module.weight)
    assert model.first.bias.dtype is dtype
    assert model.embedding(TOKENS).dtype is dtype
    assert model(TOKENS).dtype is dtype
    torch.testing.assert_close(model(TOKENS).float(), like(TOKENS), rtol=0.1, atol=0.5)


def test_gradient_checkpointing():
    packed = with_lora(Model())
    expected = packed(TOKENS)
    x = packed.base_model.model.embedding(TOKENS).requires_grad_()
    found = torch.utils.checkpoint.checkpoint(packed.base_model.model.first, x, use_reentrant=False)
    found.sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(packed(TOKENS), expected)


@pytest.mark.parametrize("is_sequential", [False, True])
def test_offloaded_blocks_come_back(is_sequential):
    """The weights of each module are on the meta device, except while it runs."""
    model, like = Model(), Model()
    if is_sequential:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    else:
        for layer in model.children():
            hook = accelerate.hooks.AlignDevicesHook(
                execution_device=torch.device("cpu"),
                offload=True,
                weights_map={name: tensor.clone() for name, tensor in layer.state_dict().items()},
            )
            accelerate.hooks.add_hook_to_module(layer, hook)
    assert {module.weight.device.type for module in model.children()} == {"meta"}
    for _ in range(2):
        assert torch.equal(model(TOKENS), like(TOKENS))
    assert {module.weight.dtype for module in model.children()} == {torch.uint8}
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_same(model, like)


def test_offload_to_disk(tmp_path):
    model, like = Model(), Model()
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(model(TOKENS), like(TOKENS))
