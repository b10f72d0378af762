"""Dequantize the compressed blocks of GGUF files, on an NVIDIA GPU or on the CPU."""

from numba_dequant.api import dequantize
from numba_dequant.errors import (
    DataError,
    DeviceError,
    DtypeError,
    GgufError,
    NumbaDequantError,
    OutputError,
    ShapeError,
    TensorNotFoundError,
    UnknownFormatError,
)
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, register
from numba_dequant.loader import Model, load, open
from numba_dequant.version import VERSION

__version__ = VERSION

__all__ = [
    "FORMATS",
    "DataError",
    "DeviceError",
    "DtypeError",
    "Format",
    "GgufError",
    "Model",
    "NumbaDequantError",
    "OutputError",
    "ShapeError",
    "TensorNotFoundError",
    "UnknownFormatError",
    "dequantize",
    "load",
    "open",
    "register",
]
