"""Dequantize the blocks of GGUF files on an NVIDIA GPU or on the CPU."""

from typing import TYPE_CHECKING, Any

from numba_dequant.api import dequantize, dequantize_many, matmul, prepare_many
from numba_dequant.backends.batch import Batch
from numba_dequant.backends.dlpack import Bfloat16Array
from numba_dequant.errors import (
    DataError,
    DeviceError,
    DtypeError,
    GgufError,
    MissingFileError,
    NumbaDequantError,
    OptionError,
    OutputError,
    ReadError,
    ShapeError,
    TensorNotFoundError,
    UnknownFormatError,
)
from numba_dequant.explain import explain
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, register
from numba_dequant.gguf.limits import Limits
from numba_dequant.loading.progress import Progress
from numba_dequant.loading.requests import QuantizedTensor
from numba_dequant.model import Model, load, open, release_buffers
from numba_dequant.version import VERSION

if TYPE_CHECKING:
    from numba_dequant.explain.explanation import Explanation
    from numba_dequant.integrations import accelerate

__version__ = VERSION

__all__ = [
    "FORMATS",
    "Batch",
    "Bfloat16Array",
    "DataError",
    "DeviceError",
    "DeviceTensor",
    "DtypeError",
    "Explanation",
    "Format",
    "GgufError",
    "Limits",
    "MissingFileError",
    "Model",
    "NumbaDequantError",
    "OptionError",
    "OutputError",
    "Progress",
    "QuantizedTensor",
    "ReadError",
    "ShapeError",
    "TensorNotFoundError",
    "UnknownFormatError",
    "accelerate",
    "dequantize",
    "dequantize_many",
    "explain",
    "load",
    "matmul",
    "open",
    "prepare_many",
    "register",
    "release_buffers",
]

# Tracebacks and pickles use the public names, so that modules may move.
for _each in list(globals().values()):
    if isinstance(_each, type) and issubclass(
        _each, (NumbaDequantError, Batch, Bfloat16Array, Limits, Progress, QuantizedTensor)
    ):
        _each.__module__ = __name__
del _each


def __getattr__(name: str) -> Any:
    # The CUDA packages are slow to import, and are needed only with a GPU; few programs use the others.
    if name == "DeviceTensor":
        from numba_dequant.backends.device_tensor import DeviceTensor

        return DeviceTensor
    if name == "Explanation":
        from numba_dequant.explain.explanation import Explanation

        return Explanation
    if name == "accelerate":
        from numba_dequant.integrations import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
