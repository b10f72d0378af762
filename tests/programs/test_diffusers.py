"""diffusers: exact values, the dtypes and shapes of diffusers, and all types of gguf-py."""

import json
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers", minversion="0.38")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from diffusers.quantizers.gguf import utils  # noqa: E402
from finite_blocks import finite_blocks  # noqa: E402
from torch import nn  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant import FORMATS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TYPES = gguf.GGMLQuantizationType
PACKED = [name for name, fmt in FORMATS.items() if fmt.block_size > 1 and name in TYPES.__members__ and name != "Q8_1"]
"""Not Q8_1: gguf-py has another size for its blocks than GGML."""
THEIRS = [kind.name for kind in utils.SUPPORTED_GGUF_QUANT_TYPES]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def accelerated():
    with nd.accelerate("diffusers") as replaced:
        yield replaced


def parameter(name, n_rows, n_columns, seed=0):
    if name == "BF16":
        values = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return utils.GGUFParameter(values.view(torch.uint8), quant_type=TYPES.BF16)
    blocks = torch.from_numpy(finite_blocks(name, n_rows, n_columns, seed=seed))
    return utils.GGUFParameter(blocks, quant_type=TYPES[name])


def exact(weight):
    """float32, from NumPy."""
    blocks = weight.as_tensor().numpy()
    return torch.from_numpy(nd.dequantize(blocks, weight.quant_type.name, "float32", device="reference")).reshape(
        weight.quant_shape
    )


def layer_of(weight, dtype, bias=True):
    layer = utils.GGUFLinear(weight.quant_shape[1], weight.quant_shape[0], bias, compute_dtype=dtype)
    layer.weight = weight
    return layer.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", THEIRS)
def test_dequantized_tensors_have_their_dtype_and_shape(name, device):
    weight = parameter(name, 6, 512)
    values = exact(weight).to(device)
    weight = layer_of(weight, torch.float32, bias=False).to(device).weight
    theirs = utils.dequantize_gguf_tensor(weight)
    with nd.accelerate("diffusers"):
        ours = utils.dequantize_gguf_tensor(weight)
    assert (type(ours), ours.dtype, ours.shape) == (type(theirs), theirs.dtype, theirs.shape)
    assert torch.equal(ours, values.to(ours.dtype))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_tensor_of_values_is_returned(accelerated):
    values = torch.randn(3)
    assert utils.dequantize_gguf_tensor(values) is values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*PACKED, "BF16"])
def test_layer_computes_with_exact_values(accelerated, name, dtype, device):
    weight = parameter(name, 16, 512)
    values = exact(weight).to(device)
    layer = layer_of(weight, dtype).to(device)
    x = torch.randn(5, 512).to(device, dtype)
    expected = nn.functional.linear(x, values.to(dtype), layer.bias.to(dtype))
    assert torch.equal(layer(x), expected)


def errors(layer, x):
    """Relative RMS errors of their result and of ours, against float64."""
    truth = nn.functional.linear(x.double(), exact(layer.weight).double(), layer.bias.double())
    theirs = layer(x)
    with nd.accelerate("diffusers"):
        ours = layer(x)
    return [((found.double() - truth).norm() / truth.norm()).item() for found in (theirs, ours)]


def test_ours_is_nearer_to_float64():
    torch.manual_seed(0)
    layer = layer_of(parameter("Q4_K", 64, 2048), torch.float32)
    theirs, ours = errors(layer, torch.randn(32, 2048))
    assert ours < 1e-6
    assert theirs > 1e-4


def test_autocast_and_wrong_dtypes_are_as_before():
    layer = layer_of(parameter("Q6_K", 8, 256), torch.bfloat16)
    x = torch.randn(3, 256)
    results = []
    for programs in ([], ["diffusers"]):
        replaced = nd.accelerate(*programs) if programs else None
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer(x))
        if replaced:
            replaced.undo()
    assert results[0].dtype is results[1].dtype is torch.bfloat16
    torch.testing.assert_close(*results, rtol=2e-2, atol=0.1)


def kept_for_backward(layer, x):
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    return sum(kept.values())


def test_backward_keeps_the_blocks():
    layer = layer_of(parameter("Q4_K", 256, 1024), torch.float32, bias=False)
    theirs_x, ours_x = (torch.ones(2, 1024, requires_grad=True) for _ in range(2))
    theirs = kept_for_backward(layer, theirs_x)
    with nd.accelerate("diffusers"):
        ours = kept_for_backward(layer, ours_x)
    assert theirs >= 256 * 1024 * 4
    assert ours <= 256 * 1024 // 256 * 144 + 2 * 1024 * 4
    torch.testing.assert_close(ours_x.grad, exact(layer.weight).sum(0).expand(2, -1), rtol=1e-4, atol=1e-3)


def test_stack_of_layers_compiles_to_one_graph(accelerated):
    sizes = (256, 512, 512, 256)
    stack = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    kinds = ("Q4_K", "IQ3_S", "Q5_0")
    weights = {
        f"{number}.weight": parameter(kind, sizes[number + 1], sizes[number]) for number, kind in enumerate(kinds)
    }
    biases = {f"{number}.bias": torch.randn(sizes[number + 1]) for number in range(3)}
    utils._replace_with_gguf_linear(stack, torch.bfloat16, weights | biases)
    for number in range(3):
        stack[number].weight, stack[number].bias = weights[f"{number}.weight"], nn.Parameter(biases[f"{number}.bias"])
    x = torch.randn(4, 256).bfloat16()
    expected = x
    for number in range(3):
        values = exact(weights[f"{number}.weight"]).bfloat16()
        expected = nn.functional.linear(expected, values, biases[f"{number}.bias"].bfloat16())
    assert torch.equal(stack(x), expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(stack, fullgraph=True, backend="aot_eager")(x), expected)


CONFIG = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "in_channels": 64,
    "joint_attention_dim": 256,
    "num_attention_heads": 2,
    "num_layers": 1,
    "out_channels": 16,
    "patch_size": 2,
}


def write_transformer(folder, kinds):
    """A small image model, whose matrices take the formats in turn."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel.from_config(CONFIG)
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen_image")
    for number, (name, like) in enumerate(model.state_dict().items()):
        if like.dim() == 2 and like.shape[1] % 256 == 0:
            kind = kinds[number % len(kinds)]
            writer.add_tensor(name, finite_blocks(kind, *like.shape, seed=number), raw_dtype=TYPES[kind])
        else:
            values = np.random.default_rng(number).normal(0, 0.05, like.shape)
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def load(folder):
    return diffusers.QwenImageTransformer2DModel.from_single_file(
        str(folder / "model.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )


def image_of(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 64),
            encoder_hidden_states=torch.randn(1, 4, 256),
            encoder_hidden_states_mask=torch.ones(1, 4, dtype=torch.int64),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]


def test_single_file_loads_and_runs(tmp_path):
    model = load(write_transformer(tmp_path, ["Q4_K", "Q6_K", "Q8_0", "IQ4_XS"]))
    theirs = image_of(model)
    with nd.accelerate("diffusers"):
        ours, again = image_of(model), image_of(load(tmp_path))
        dense = image_of(model.dequantize().float())  # before 0.40 it leaves float16
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * theirs.abs().max().item())
    assert torch.isfinite(dense).all()


def test_formats_that_diffusers_refuses_load(tmp_path):
    write_transformer(tmp_path, ["IQ2_S", "MXFP4", "IQ3_XXS", "TQ2_0", "NVFP4"])
    with pytest.raises(OSError, match="Unable to load weights"):
        load(tmp_path)
    with nd.accelerate("diffusers"):
        assert torch.isfinite(image_of(load(tmp_path))).all()


def test_undo_restores_everything():
    before = dict(vars(utils)), dict(vars(utils.GGUFLinear))
    with nd.accelerate("diffusers"), nd.accelerate("diffusers"):
        assert utils.dequantize_gguf_tensor is not before[0]["dequantize_gguf_tensor"]
        assert utils.GGUFLinear.forward_native is not before[1]["forward_native"]
    assert dict(vars(utils)) == before[0]
    assert dict(vars(utils.GGUFLinear)) == before[1]


def test_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr("numba_dequant.integrations.patching.version", lambda name: "0.9.0")
    with pytest.raises(nd.OptionError, match=r"diffusers 0\.9\.0 is unknown to numba_dequant"):
        nd.accelerate("diffusers")
