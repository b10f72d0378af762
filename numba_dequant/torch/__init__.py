"""GGUF weights in PyTorch: operators, layers and files.

`dequantize`, `get_rows`, `linear` and `ggml.mul_mat_id` are registered operators (``torch.ops.numba_dequant``). They
run on PyTorch's current stream, take memory from its caching allocator, and do not wait for the GPU. `torch.compile`,
`torch.export` and CUDA graphs accept them. `QuantizedLinear` and `QuantizedEmbedding` are layers whose weights stay
compressed. `QuantizedColwiseParallel` and `QuantizedRowwiseParallel` divide such layers among ranks. `load_file` and
`load_model` read files. `ggml` has the functions that other programs expect of a GGML kernel library.
"""

from typing import TYPE_CHECKING, Any

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("numba_dequant.torch needs PyTorch; install it with: pip install numba_dequant[torch]") from error

from numba_dequant.torch import ggml
from numba_dequant.torch.files import load_file, load_model
from numba_dequant.torch.functional import dequantize, get_rows, linear
from numba_dequant.torch.layers import QuantizedEmbedding, QuantizedLinear

if TYPE_CHECKING:
    from numba_dequant.torch.tensor_parallel import QuantizedColwiseParallel, QuantizedRowwiseParallel

__all__ = [
    "QuantizedColwiseParallel",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedRowwiseParallel",
    "dequantize",
    "get_rows",
    "ggml",
    "linear",
    "load_file",
    "load_model",
]

# Tracebacks and pickles use the public names, so that modules may move.
for _each in (QuantizedLinear, QuantizedEmbedding):
    _each.__module__ = __name__


def __getattr__(name: str) -> Any:
    # They import torch.distributed, which is slow to import and missing from some builds of PyTorch.
    if name in ("QuantizedColwiseParallel", "QuantizedRowwiseParallel"):
        from numba_dequant.torch import tensor_parallel

        return getattr(tensor_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
