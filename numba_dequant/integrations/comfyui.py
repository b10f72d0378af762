"""Replacements for ComfyUI-GGUF, a custom node of ComfyUI: its `dequantize`, and its table of functions.

Source: city96/ComfyUI-GGUF at 795e451, dequant.py and ops.py. ComfyUI imports it under names that depend on its folder,
so the modules are found by what they contain.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from numba_dequant.errors import OptionError
from numba_dequant.formats import FORMATS
from numba_dequant.integrations.devices import require_supported
from numba_dequant.integrations.patching import Replacement
from numba_dequant.torch import functional
from numba_dequant.torch.checks import DTYPES

NAMES = ("dequantize_tensor", "dequantize", "dequantize_functions", "is_quantized")
"""What the module has whose functions are replaced."""

PARAMETERS = [("data", None), ("qtype", None), ("oshape", None), ("dtype", True)]
"""The parameters of `dequantize`, and whether their default is None."""

HALF = frozenset({"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS"})
"""The formats that ComfyUI-GGUF computes in float16 if dtype is None. It returns float32 for all others."""


def replacements() -> list[Replacement]:
    """The functions and tables of ComfyUI-GGUF to replace, in each of its modules that has been imported.

    Raises:
        OptionError: it has not been imported, its version is unknown, or PyTorch has another kind of accelerator.
    """
    require_supported("ComfyUI-GGUF")
    modules = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and all(name in vars(module) for name in NAMES)
    ]
    if not modules:
        raise OptionError(
            "ComfyUI-GGUF has not been imported; call accelerate after ComfyUI has loaded its custom nodes"
        )
    for module in modules:
        _check(module)
    return [
        Replacement(module, name, new)
        for module in modules
        for name, new in (("dequantize", dequantize), ("dequantize_functions", FUNCTIONS))
    ]


def _check(module: ModuleType) -> None:
    """Check that `dequantize` has the known parameters.

    Raises:
        OptionError: it has others.
    """
    try:
        signature = inspect.signature(vars(module)["dequantize"])
    except (TypeError, ValueError):
        found, text = [], " of an unknown signature"
    else:
        found, text = list(signature.parameters.values()), str(signature)
    defaults = [(each.name, None if each.default is each.empty else each.default is None) for each in found]
    if defaults != PARAMETERS or not isinstance(vars(module)["dequantize_functions"], dict):
        raise OptionError(
            f"this ComfyUI-GGUF is unknown to numba_dequant: {module.__name__}.dequantize is a function{text}, not "
            "(data, qtype, oshape, dtype=None); install a newer numba_dequant, or ComfyUI-GGUF of December 2025"
        )


def dequantize(data: Tensor, qtype: Any, oshape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Dequantize a weight, as `dequantize` of ComfyUI-GGUF does.

    Args:
        data: blocks on the CPU or on a CUDA GPU. Only the bytes are used: a subclass of Tensor may have another shape.
        qtype: member of `gguf.GGMLQuantizationType`.
        oshape: shape of the result.
        dtype: a floating-point type. None means the type in which ComfyUI-GGUF computes: float16 for the formats of
            `HALF`, float32 for all others.

    Returns:
        Tensor of the shape `oshape`, on the device of `data`. Integers and F64 keep their stored type.

    Raises:
        UnknownFormatError, DataError, ShapeError: an argument is wrong.
    """
    if dtype is None:
        name, _ = functional.resolved(qtype, torch.float32)  # which torch.compile accepts
        dtype = torch.float16 if name in HALF else torch.float32
    if dtype in DTYPES:
        return functional.dequantize(data, qtype, dtype, tuple(oshape))
    return functional.dequantize(data, qtype, torch.float32, tuple(oshape)).to(dtype)


def _blocks(qtype: str, blocks: Tensor, block_size: int, type_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The values of blocks, of shape (n_blocks, block_size): what an entry of `dequantize_functions` computes."""
    return dequantize(blocks, qtype, (-1, block_size), dtype)


FUNCTIONS: dict[int, Callable[..., Tensor]] = {
    fmt.ggml_id: partial(_blocks, fmt.name) for fmt in FORMATS.values() if fmt.name not in ("F32", "F16")
}
"""Takes the place of `dequantize_functions`. ComfyUI-GGUF computes types that are not in it in NumPy, on the CPU."""
