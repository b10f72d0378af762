"""transformers: the layers whose weights stay packed, and both loaders of GGUF files.

Since 5.18, files of some architectures keep their blocks: `GgufLinear`, `GgufExperts` and `GgufEmbedding` call a kernel
that transformers downloads. Here they call `numba_dequant.torch.ggml`: nothing is downloaded, and the CPU can run them
too. Such a model needs the replacements for as long as it runs. All other architectures, and all older versions, use
gguf-py: there, `accelerate("transformers")` does what `accelerate("gguf")` does.

Source: transformers 5.24, integrations/gguf/kernels.py, dequant.py and reader.py, modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import numba_dequant.torch as ours
from numba_dequant.formats import FORMATS
from numba_dequant.integrations import gguf
from numba_dequant.integrations.devices import has_other_accelerator, is_supported
from numba_dequant.integrations.patching import Replacement, require_version
from numba_dequant.torch.checks import DTYPES

REQUIREMENT = ("transformers", "5.5", "5.24")

_THEIRS: dict[str, Any] = {}
"""The functions of transformers, for other devices. They are kept when the first list of replacements is made."""


def replacements() -> list[Replacement]:
    """The functions of transformers to replace.

    Raises:
        OptionError: transformers or gguf-py is not installed, or its version is unknown.
    """
    require_version(*REQUIREMENT)
    return [*(_of_packed_layers() if _has_packed_layers() else ()), *gguf.replacements(), _of_names()]


def _has_packed_layers() -> bool:
    """Whether it is 5.18 or later. 5.17 has packed layers too, but other ones, and keeps its own functions."""
    if find_spec("transformers.integrations.gguf") is None:
        return False
    from transformers.integrations.gguf import kernels

    return hasattr(kernels, "mul_mat_id")


@cache
def _of_packed_layers() -> tuple[Replacement, ...]:
    from transformers.integrations.gguf import dequant, kernels

    # It imports the modules that take some of the functions by name. Imported later, they would keep ours after `undo`.
    from transformers.quantizers import quantizer_gguf  # noqa: F401

    functions: list[tuple[Any, Any]] = [
        (dequant, dequantize),
        (kernels, dequantize_blocks),
        (kernels, mul_mat_vec),
        (kernels, mul_mat_id),
        (kernels, get_gguf_kernel),
    ]
    _THEIRS["GgufKernel"] = kernels.GgufKernel
    for module, function in functions:
        _THEIRS[function.__name__] = getattr(module, function.__name__)
    found = [Replacement(module, function.__name__, function) for module, function in functions]
    if has_other_accelerator():
        return tuple(found)
    # The layers and the reader ask these tables which types there are.
    packed = [fmt for fmt in FORMATS.values() if fmt.block_size > 1]
    sizes = {fmt.ggml_id: (fmt.block_size, fmt.type_size) for fmt in packed}
    names = {fmt.ggml_id: fmt.name for fmt in packed}
    found.append(Replacement(dequant, "GGML_BLOCK", {**sizes, **dequant.GGML_BLOCK}))
    found.append(Replacement(dequant, "GGML_NAME", {**names, **dequant.GGML_NAME}))
    return tuple(found)


@cache
def _of_names() -> Replacement:
    from gguf import tensor_mapping

    _THEIRS["get_tensor_name_map"] = tensor_mapping.get_tensor_name_map
    return Replacement(tensor_mapping, "get_tensor_name_map", get_tensor_name_map)


def get_tensor_name_map(arch: Any, n_blocks: int) -> Any:
    """The map of gguf-py from names of tensors. The legacy loader asks for it once per module of the model."""
    found = copy.copy(_name_map(arch, n_blocks))
    found.mapping = dict(found.mapping)  # the caller may change it
    return found


@lru_cache(maxsize=8)
def _name_map(arch: Any, n_blocks: int) -> Any:
    return _THEIRS["get_tensor_name_map"](arch, n_blocks)


def dequantize(data: Tensor, ggml_type: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of uint8 blocks, with one dimension: those of GGML in float32, rounded once to `dtype`."""
    if not is_supported(data):
        return _THEIRS["dequantize"](data, ggml_type, dtype)
    if dtype in DTYPES:
        return ours.dequantize(data, ggml_type, dtype, (-1,))
    return ours.dequantize(data, ggml_type, torch.float32, (-1,)).to(dtype)


def dequantize_blocks(
    weight: Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype, indices: Tensor | None = None
) -> Tensor:
    """The values of blocks of shape (rows, bytes per row), or of the rows `indices`: shape (rows, cols)."""
    if not is_supported(weight):
        return _THEIRS["dequantize_blocks"](weight, ggml_type, rows, cols, dtype, indices)
    if indices is not None:
        weight = weight.index_select(0, indices)
    return dequantize(weight, ggml_type, dtype).reshape(rows, cols)


def mul_mat_vec(weight: Tensor, x: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """``x @ weight.T`` for blocks of shape (out_features, bytes per row): shape (rows of x, out_features)."""
    if not is_supported(weight):
        return _THEIRS["mul_mat_vec"](weight, x, ggml_type, out_features)
    return ours.ggml.mul_mat_vec(weight, x, ggml_type, out_features)


def mul_mat_id(blocks: Tensor, x: Tensor, ids: Tensor, ggml_type: int, out_features: int) -> Tensor:
    """Each row of `x` times the weights of the experts `ids`, as `numba_dequant.torch.ggml.mul_mat_id`."""
    if not is_supported(blocks):
        return _THEIRS["mul_mat_id"](blocks, x, ids, ggml_type, out_features)
    return ours.ggml.mul_mat_id(blocks, x, ids, ggml_type, out_features)


def get_gguf_kernel() -> Any:
    """The object that stands for a kernel library. The loader asks it which types can stay packed."""
    return _THEIRS["get_gguf_kernel"]() if has_other_accelerator() else _kernel()


@cache
def _kernel() -> Any:
    return _THEIRS["GgufKernel"](ours.ggml)
