"""Dequantize the blocks of GGUF files on an NVIDIA GPU or on the CPU."""

from importlib import import_module
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
from numba_dequant.version import VERSION

if TYPE_CHECKING:
    from numba_dequant.explain.explanation import Explanation
    from numba_dequant.gguf.limits import Limits
    from numba_dequant.integrations import accelerate
    from numba_dequant.loading.progress import Progress
    from numba_dequant.loading.requests import QuantizedTensor
    from numba_dequant.model import Model, load, open, release_buffers

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
    if isinstance(_each, type) and issubclass(_each, (NumbaDequantError, Batch, Bfloat16Array)):
        _each.__module__ = __name__
del _each

# A process that dequantizes blocks does not need these. They are imported when they are used.
_LATER = {
    "DeviceTensor": "backends.device_tensor",
    "Explanation": "explain.explanation",
    "Limits": "gguf.limits",
    "Model": "model",
    "Progress": "loading.progress",
    "QuantizedTensor": "loading.requests",
    "accelerate": "integrations",
    "load": "model",
    "open": "model",
    "release_buffers": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
