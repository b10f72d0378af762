"""transformers: models load with the same values and run packed, without a download."""

import logging

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.5")
gguf = pytest.importorskip("gguf")

from finite_blocks import finite_blocks  # noqa: E402
from small_gguf import write_lfm2, write_llama  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant import FORMATS  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
needs_packed_layers = pytest.mark.skipif(VERSION < (5, 18), reason="transformers before 5.18 lacks these layers")
needs_lfm2 = pytest.mark.skipif(VERSION < (5, 20), reason="transformers before 5.20 does not keep lfm2 packed")
KNOWN = ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "Q4_0", "IQ3_S", "Q5_K")
NEW = ("Q5_0", "Q5_1", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")
"""Formats of gguf-py that transformers refuses to keep packed."""

TOKENS = torch.arange(20).view(1, 20)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def accelerated():
    with nd.accelerate("transformers") as replaced:
        yield replaced


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("models")
    write_llama(found / "llama.gguf", [*KNOWN, "Q5_0", "Q5_1", "F16", "F32"])
    write_lfm2(found / "lfm2.gguf", KNOWN)
    write_lfm2(found / "new.gguf", NEW)
    return found


def load(folder, name, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, attn_implementation="sdpa", dtype=torch.float32, **options
    )


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def test_legacy_loader_gives_the_same_logits(folder):
    theirs = load(folder, "llama.gguf")
    with nd.accelerate("transformers"):
        ours = load(folder, "llama.gguf")
    for name, values in theirs.state_dict().items():
        assert torch.equal(values, ours.state_dict()[name]), name
    assert torch.equal(logits(theirs), logits(ours))
    assert logits(ours).isfinite().all()


def layers_of(model, kind):
    return [module for module in model.modules() if type(module).__name__ == kind]


@needs_lfm2
def test_model_stays_packed_without_a_download(folder, monkeypatch):
    def get_kernel(*arguments, **options):
        raise AssertionError("a kernel was to be downloaded")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", get_kernel)
    dense = load(folder, "lfm2.gguf")
    with nd.accelerate("transformers"):
        packed = load(folder, "lfm2.gguf")
        assert not layers_of(packed, "Linear")
        assert len(layers_of(packed, "GgufLinear")) == 13
        assert len(layers_of(packed, "GgufEmbedding")) == 1
        assert torch.equal(logits(packed), logits(dense))  # more than 8 rows: dequantized, then multiplied
        few = TOKENS[:, :5]
        torch.testing.assert_close(logits(packed, few), logits(dense, few), rtol=1e-4, atol=1e-3)
        found = packed.generate(few, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, dense.generate(few, max_new_tokens=4, do_sample=False, pad_token_id=0))


@needs_lfm2
def test_files_of_formats_that_transformers_lacks_load(folder):
    with pytest.raises(ValueError, match="not supported yet"):
        load(folder, "new.gguf")
    with nd.accelerate("transformers"):
        packed = load(folder, "new.gguf")
        dense = load(folder, "new.gguf", quantization_config=transformers.GgufConfig(dequantize=True))
        found = {tuple(layer.weight.shape): layer.ggml_type for layer in layers_of(packed, "GgufLinear")}
        assert set(found.values()) <= {FORMATS[name].ggml_id for name in NEW}
        assert torch.equal(logits(packed), logits(dense))
    assert logits(dense).isfinite().all()
    reader = gguf.GGUFReader(folder / "new.gguf")
    [tensor] = [each for each in reader.tensors if each.name == "blk.0.ffn_gate.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(dense.model.layers[0].feed_forward.w1.weight, expected)


@needs_packed_layers
def test_undo_leaves_no_trace(folder):
    from transformers.integrations.gguf import dequant, gguf_conversion_mapping, kernels, reader, utils
    from transformers.quantizers import quantizer_gguf

    modules = (dequant, gguf_conversion_mapping, kernels, reader, utils, quantizer_gguf)
    before = [dict(vars(module)) for module in modules]
    with nd.accelerate("transformers"), nd.accelerate("transformers"):
        assert utils.mul_mat_vec is kernels.mul_mat_vec is not before[2]["mul_mat_vec"]
        assert reader.GGML_BLOCK is dequant.GGML_BLOCK is not before[0]["GGML_BLOCK"]
        assert quantizer_gguf.get_gguf_kernel is kernels.get_gguf_kernel
    for module, names in zip(modules, before, strict=True):
        assert {name for name, value in vars(module).items() if value is not names.get(name)} == set()
    assert gguf.dequantize.__module__ == "gguf.quants"


@needs_packed_layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_is_exact_in_each_dtype(accelerated, dtype):
    from transformers.integrations.gguf import dequant

    for name in (*KNOWN, *NEW):
        blocks = torch.from_numpy(finite_blocks(name, 4, 512))
        expected = torch.from_numpy(nd.dequantize(blocks.numpy(), name, "float32", device="reference")).reshape(-1)
        found = dequant.dequantize(blocks, FORMATS[name].ggml_id, dtype)
        assert torch.equal(found, expected.to(dtype)), name


@needs_packed_layers
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("name", [*KNOWN, *NEW])
def test_linear_layer(accelerated, name, rows, device):
    from transformers.integrations.gguf.utils import GgufLinear

    layer = GgufLinear(512, 48, FORMATS[name].ggml_id, bias=True)
    layer.weight.data = torch.from_numpy(finite_blocks(name, 48, 512))
    layer.bias.data = torch.randn(48)
    layer, x = layer.to(device), torch.randn(rows, 512, device=device)
    expected = torch.nn.functional.linear(x, values_of(layer.weight, name), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer(x.half()).dtype is torch.float16


def values_of(blocks, name):
    return nd.torch.dequantize(blocks, name, torch.float32)


@needs_packed_layers
@pytest.mark.parametrize("n", [1, 3, 20])
def test_experts(accelerated, n, device):
    """Fewer pairs than experts, and more."""
    from transformers.integrations.gguf.utils import GgufExperts

    experts, hidden, inner, k = 8, 256, 512, 2
    layer = GgufExperts(experts, hidden, inner, FORMATS["Q4_K"].ggml_id, FORMATS["Q6_K"].ggml_id, torch.nn.SiLU())
    layer.gate_up_proj.data = torch.from_numpy(finite_blocks("Q4_K", experts * 2 * inner, hidden)).view(
        experts, 2 * inner, -1
    )
    layer.down_proj.data = torch.from_numpy(finite_blocks("Q6_K", experts * hidden, inner)).view(experts, hidden, -1)
    x, ids = torch.randn(n, hidden) / 16, torch.rand(n, experts).topk(k).indices
    weights = torch.rand(n, k)
    gate_up, down = values_of(layer.gate_up_proj, "Q4_K"), values_of(layer.down_proj, "Q6_K")
    expected = torch.zeros(n, hidden)
    for row in range(n):
        for column in range(k):
            gate, up = (gate_up[ids[row, column]] @ x[row]).chunk(2)
            expected[row] += weights[row, column] * (down[ids[row, column]] @ (torch.nn.SiLU()(gate) * up))
    scale = expected.abs().max().item()
    found = layer.to(device)(x.to(device), ids.to(device), weights.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


@needs_packed_layers
def test_layers_compile_to_one_graph(accelerated, device):
    from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

    embedding, linear = GgufEmbedding(100, 256, FORMATS["Q6_K"].ggml_id), GgufLinear(256, 48, FORMATS["Q5_0"].ggml_id)
    embedding.weight.data = torch.from_numpy(finite_blocks("Q6_K", 100, 256))
    linear.weight.data = torch.from_numpy(finite_blocks("Q5_0", 48, 256))
    model = torch.nn.Sequential(embedding, linear).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (torch.arange(3), torch.arange(20), torch.arange(30)):
        assert torch.equal(compiled(tokens.to(device)), model(tokens.to(device)))


def test_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr("numba_dequant.integrations.patching.version", lambda name: "9.0.0")
    with pytest.raises(nd.OptionError, match=r"transformers 9\.0\.0 is unknown to numba_dequant"):
        nd.accelerate("transformers")


def test_message_says_what_is_replaced(caplog):
    with caplog.at_level(logging.WARNING, "numba_dequant"), nd.accelerate("transformers"):
        pass
    [record] = [each for each in caplog.records if each.name == "numba_dequant"]
    assert "gguf.quants.dequantize" in record.getMessage()


def test_maps_of_names_are_kept_and_cannot_be_spoiled(accelerated):
    from gguf import MODEL_ARCH, get_tensor_name_map

    before = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    before.mapping.clear()
    assert get_tensor_name_map(MODEL_ARCH.LLAMA, 2).get_name("model.layers.1.self_attn.q_proj") == "blk.1.attn_q"
    assert get_tensor_name_map(MODEL_ARCH.LLAMA, 1).get_name("model.layers.1.self_attn.q_proj") is None
