"""diffusers: the layers whose weights stay packed, and the types that it can load.

Source: diffusers 0.42, quantizers/gguf/utils.py, models/model_loading_utils.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import numba_dequant.torch as ours
from numba_dequant.formats import FORMATS
from numba_dequant.integrations.devices import has_other_accelerator, is_supported
from numba_dequant.integrations.patching import Replacement, require_version
from numba_dequant.torch.checks import DTYPES

REQUIREMENT = ("diffusers", "0.38", "0.42")

_IN_FLOAT32 = tuple(FORMATS[name].ggml_id for name in ("BF16", "IQ4_NL", "IQ4_XS"))
"""The types whose values are float32 in diffusers; those of all others are float16."""

_THEIRS: dict[str, Any] = {}
"""The functions of diffusers, for other devices. They are kept when the first list of replacements is made."""


def replacements() -> list[Replacement]:
    """The functions of diffusers to replace.

    Raises:
        OptionError: diffusers or gguf-py is not installed, or the version of diffusers is unknown.
    """
    require_version(*REQUIREMENT)
    require_version("gguf", "0.10", "9999")  # without it, diffusers has no such layers
    return list(_of_layers())


@cache
def _of_layers() -> tuple[Replacement, ...]:
    from diffusers.quantizers.gguf import gguf_quantizer, utils  # noqa: F401  it has imported names of `utils`
    from gguf import GGMLQuantizationType

    layer = utils.GGUFLinear
    _THEIRS["dequantize_gguf_tensor"] = utils.dequantize_gguf_tensor
    found = [
        Replacement(utils, "dequantize_gguf_tensor", dequantize_gguf_tensor),
        Replacement(layer, "forward_native", forward_native),
        Replacement(layer, "forward_cuda", forward_cuda),
    ]
    if not has_other_accelerator():
        known = utils.SUPPORTED_GGUF_QUANT_TYPES
        more = [each for each in GGMLQuantizationType if each not in known and _is_packed(each, utils)]
        found.append(Replacement(utils, "SUPPORTED_GGUF_QUANT_TYPES", [*known, *more]))
    return tuple(found)


def _is_packed(kind: Any, utils: Any) -> bool:
    """Whether a type of gguf-py is one of blocks that we know. gguf-py has a wrong size for Q8_1."""
    fmt = FORMATS.get(kind.name)
    return fmt is not None and fmt.block_size > 1 and utils.GGML_QUANT_SIZES[kind] == (fmt.block_size, fmt.type_size)


def dequantize_gguf_tensor(tensor: Tensor) -> Tensor:
    """The values of a `GGUFParameter` in the dtype of diffusers: float32 for BF16, IQ4_NL and IQ4_XS, else float16.

    The values are those of GGML in float32, rounded once. A tensor without `quant_type` is returned as it is.
    """
    if not hasattr(tensor, "quant_type"):
        return tensor
    if not is_supported(tensor):
        return _THEIRS["dequantize_gguf_tensor"](tensor)
    return _values(tensor, torch.float32 if tensor.quant_type in _IN_FLOAT32 else torch.float16)


def forward_native(layer: Any, inputs: Tensor) -> Tensor:
    """`GGUFLinear.forward_native`, by `numba_dequant.torch.linear` if possible; backward then keeps the blocks."""
    weight, dtype = layer.weight, layer.compute_dtype
    is_packed = hasattr(weight, "quant_type") and is_supported(weight)
    if is_packed and (inputs.dtype == dtype or torch.is_autocast_enabled(inputs.device.type)):
        return ours.linear(inputs, weight.as_tensor(), weight.quant_type, layer.bias)
    # PyTorch refuses inputs of another dtype, with a message that names both.
    values = _values(weight, dtype) if is_packed and dtype in DTYPES else dequantize_gguf_tensor(weight).to(dtype)
    return torch.nn.functional.linear(inputs, values, None if layer.bias is None else layer.bias.to(dtype))


def forward_cuda(layer: Any, inputs: Tensor) -> Tensor:
    """`GGUFLinear.forward_cuda`, which diffusers calls if its own CUDA kernels are switched on."""
    return forward_native(layer, inputs.to(layer.compute_dtype))


def _values(tensor: Any, dtype: torch.dtype) -> Tensor:
    # As a plain tensor: a method of the subclass would return the subclass, with the type of blocks.
    return ours.dequantize(tensor.as_tensor(), tensor.quant_type, dtype)
