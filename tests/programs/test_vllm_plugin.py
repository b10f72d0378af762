"""`accelerate("vllm")`, with a stand-in for vllm-gguf-plugin, which needs vLLM and a GPU."""

import inspect
import sys
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

from blocks import assert_same_bits, random_blocks  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant.integrations import patching  # noqa: E402


def ggml_dequantize(W: torch.Tensor, quant_type: int, m: int, n: int, dtype: torch.dtype | None) -> torch.Tensor:  # noqa: N803
    """As in vllm_gguf_plugin/ops.py of version 0.0.5."""
    raise AssertionError("the function of the plugin")


@pytest.fixture
def plugin(monkeypatch):
    installed = {"vllm-gguf-plugin": "0.0.5"}
    monkeypatch.setattr(patching, "version", installed.__getitem__)
    package, ops = ModuleType("vllm_gguf_plugin"), ModuleType("vllm_gguf_plugin.ops")
    package.ops, ops.ggml_dequantize, package.by_name = ops, ggml_dequantize, ggml_dequantize
    monkeypatch.setitem(sys.modules, "vllm_gguf_plugin", package)
    monkeypatch.setitem(sys.modules, "vllm_gguf_plugin.ops", ops)
    package.installed = installed
    return package


def test_the_signature_is_that_of_the_plugin(plugin):
    theirs = inspect.signature(plugin.ops.ggml_dequantize)
    with nd.accelerate("vllm"):
        assert plugin.by_name is plugin.ops.ggml_dequantize
        ours = inspect.signature(plugin.ops.ggml_dequantize)
    assert list(ours.parameters) == list(theirs.parameters)
    assert [each.default for each in ours.parameters.values()] == [inspect.Parameter.empty] * 5
    assert inspect.signature(plugin.by_name) == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None])
@pytest.mark.parametrize("shape", [(4, 512), (512, 4)])
def test_values(plugin, dtype, shape):
    """The embedding of the plugin passes columns and rows in this order, and views the result in another."""
    data = random_blocks("Q4_0", 64).reshape(4, -1)
    with nd.accelerate("vllm"):
        found = plugin.ops.ggml_dequantize(torch.from_numpy(data), 2, *shape, dtype)
    name = str(dtype or torch.float16).removeprefix("torch.")
    expected = nd.dequantize(data, "Q4_0", name, shape=shape, device="reference")
    assert_same_bits(found.numpy(), expected)


def test_keywords_of_the_plugin(plugin):
    with nd.accelerate("vllm"):
        data = torch.zeros(1, 18, dtype=torch.uint8)
        found = plugin.ops.ggml_dequantize(W=data, quant_type=2, m=1, n=32, dtype=torch.bfloat16)
    assert found.dtype is torch.bfloat16


def test_another_version_is_refused(plugin):
    plugin.installed["vllm-gguf-plugin"] = "0.0.6"
    with pytest.raises(nd.OptionError, match=r"vllm-gguf-plugin 0\.0\.6 is unknown to numba_dequant"):
        nd.accelerate("vllm")
    assert plugin.ops.ggml_dequantize is plugin.by_name


def test_another_accelerator_is_refused(plugin, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(nd.OptionError, match="other than NVIDIA's, on which vllm-gguf-plugin would fail"):
        nd.accelerate("vllm")
