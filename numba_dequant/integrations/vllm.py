"""Replacements for the package vllm-gguf-plugin: `ops.ggml_dequantize`.

Source: vllm-gguf-plugin 0.0.5, ops.py.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from numba_dequant.integrations.devices import require_supported
from numba_dequant.integrations.patching import Replacement, require_version
from numba_dequant.torch import ggml


def replacements() -> list[Replacement]:
    """The functions of the plugin to replace.

    Raises:
        OptionError: it is not installed, its version is unknown, or PyTorch has another kind of accelerator.
    """
    require_supported("vllm-gguf-plugin")
    require_version("vllm-gguf-plugin", "0.0.5", "0.0.5")
    return [Replacement(import_module("vllm_gguf_plugin.ops"), "ggml_dequantize", ggml_dequantize)]


def ggml_dequantize(
    W: Tensor,  # noqa: N803
    quant_type: int,
    m: int,
    n: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """Dequantize a weight, with the arguments of `vllm_gguf_plugin.ops.ggml_dequantize`.

    Args:
        W: uint8 of shape (m, bytes per row), on the CPU or on a CUDA GPU.
        quant_type: number of the format.
        m: rows of the result.
        n: elements per row.
        dtype: torch.float16, torch.bfloat16 or torch.float32; None means float16.

    Returns:
        Tensor of shape (m, n) on the device of `W`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError: an argument is wrong.
    """
    return ggml.ggml_dequantize(W, quant_type, m, n, dtype)
