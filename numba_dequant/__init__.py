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

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "DataError",
    "DeviceError",
    "DtypeError",
    "Format",
    "GgufError",
    "NumbaDequantError",
    "OutputError",
    "ShapeError",
    "TensorNotFoundError",
    "UnknownFormatError",
    "dequantize",
    "register",
]
