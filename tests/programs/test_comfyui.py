"""`accelerate("comfyui")`, with a stand-in for ComfyUI-GGUF."""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import comfyui_gguf  # noqa: E402
from blocks import random_blocks  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant.integrations import comfyui  # noqa: E402

Q4_K = 12


@pytest.fixture
def comfy(monkeypatch):
    return comfyui_gguf.install(monkeypatch)


def weight(name, rows=2, of=comfyui_gguf.LyingTensor):
    """A weight, and its values in float32."""
    data = random_blocks(name, 8 * rows).reshape(rows, -1)
    values = nd.dequantize(data, name, "float32", device="reference").reshape(rows, -1)
    fmt = nd.FORMATS[name]
    return of(torch.from_numpy(data), fmt.ggml_id, values.shape), torch.from_numpy(values)


def assert_equal(found, expected):
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_it_is_replaced_everywhere_and_restored(comfy):
    theirs, table = comfy.dequant.dequantize, comfy.dequant.dequantize_functions
    with nd.accelerate("comfyui") as replaced:
        assert comfy.dequant.dequantize is comfy.ops.dequantize is comfyui.dequantize
        assert f"{comfyui_gguf.NAME}.dequant.dequantize" in str(replaced)
        with nd.accelerate("comfyui"):
            pass
        assert comfy.dequant.dequantize is comfyui.dequantize
    assert comfy.dequant.dequantize is comfy.ops.dequantize is theirs
    assert comfy.dequant.dequantize_functions is table


@pytest.mark.parametrize(
    ("name", "dtype"), [("Q4_K", torch.float16), ("IQ3_S", torch.float32), ("BF16", torch.float32)]
)
def test_the_type_in_which_it_computes(comfy, name, dtype):
    """If dtype is None: float16 for what has a torch function there, float32 for BF16 and for what went by NumPy."""
    tensor, values = weight(name)
    with nd.accelerate("comfyui"):
        found = comfy.dequant.dequantize(tensor.data, tensor.tensor_type, tensor.tensor_shape)
    assert_equal(found, values.to(dtype))


def test_a_weight_is_exact_in_the_type_of_the_layer(comfy):
    tensor, values = weight("Q4_K")
    with nd.accelerate("comfyui"):
        found = comfy.ops.dequantize_tensor(tensor, torch.bfloat16, "target")
    assert_equal(found, values.to(torch.bfloat16))


def test_types_without_a_function_do_not_go_through_numpy(comfy):
    tensor, values = weight("MXFP4")
    assert comfy.ops.dequantize_tensor(tensor, torch.bfloat16) == "by NumPy"
    with nd.accelerate("comfyui"):
        assert_equal(comfy.ops.dequantize_tensor(tensor, torch.bfloat16), values.to(torch.bfloat16))
    assert comfy.ops.dequantize_tensor(tensor, torch.bfloat16) == "by NumPy"


def test_every_block_format_has_a_function(comfy):
    with nd.accelerate("comfyui"):
        table = comfy.dequant.dequantize_functions
    assert set(table) == {fmt.ggml_id for fmt in nd.FORMATS.values()} - {0, 1}
    tensor, values = weight("Q4_K", 3, lambda data, *_: data)
    assert_equal(table[Q4_K](tensor.reshape(-1, 144), 256, 144, torch.float32), values.reshape(-1, 256))


def test_shapes_that_are_not_rows(comfy):
    """A convolution has four dimensions; its blocks are stored as a matrix."""
    tensor, values = weight("Q4_K")
    shape = torch.Size((16, 16, 4, 4))
    with nd.accelerate("comfyui"):
        found = comfy.dequant.dequantize(torch.nn.Parameter(torch.Tensor(tensor).byte(), False), Q4_K, shape)
    assert_equal(found, values.to(torch.float16).reshape(shape))


def test_a_type_that_is_not_an_output_type(comfy):
    tensor, values = weight("Q4_K")
    with nd.accelerate("comfyui"):
        found = comfy.dequant.dequantize(tensor.data, Q4_K, tensor.tensor_shape, torch.float64)
    assert_equal(found, values.to(torch.float64))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_graph_for_torch_compile(dtype):
    def shifted(blocks):
        return comfyui.dequantize(blocks, Q4_K, torch.Size((2, 2048)), dtype) + 1

    blocks, _ = weight("Q4_K", 2, lambda data, *_: data)
    compiled = torch.compile(shifted, fullgraph=True, backend="eager")
    assert_equal(compiled(blocks), shifted(blocks))


def test_it_must_have_been_imported():
    with pytest.raises(nd.OptionError, match="ComfyUI-GGUF has not been imported; call accelerate after"):
        nd.accelerate("comfyui")


def test_another_signature_is_refused(comfy, monkeypatch):
    def dequantize(data, qtype, shape):
        return "theirs"

    monkeypatch.setattr(comfy.dequant, "dequantize", dequantize)
    with pytest.raises(nd.OptionError, match=r"ComfyUI-GGUF\.dequant\.dequantize is a function\(data, qtype, shape\)"):
        nd.accelerate("comfyui")
    assert comfy.dequant.dequantize is dequantize


def test_modules_that_only_look_similar_are_left_alone(comfy, monkeypatch):
    other = type(sys)("other")
    other.dequantize = other.is_quantized = np.sum
    monkeypatch.setitem(sys.modules, "other", other)
    with nd.accelerate("comfyui"):
        assert other.dequantize is np.sum


def test_another_accelerator_is_refused(comfy, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(nd.OptionError, match="an accelerator other than NVIDIA's, on which ComfyUI-GGUF would fail"):
        nd.accelerate("comfyui")
