"""The packages and the driver that a GPU needs."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from importlib.util import find_spec

GPU_PACKAGES = {"numba-cuda": "numba_cuda", "cuda-core": "cuda.core"}
"""Packages that a GPU needs, with a module of each."""


def why_no_gpu_packages() -> str | None:
    """What is missing for a GPU, with the command that installs it, or None."""
    missing = missing_packages()
    if not missing:
        return None
    no_driver = "" if driver_version() else "no NVIDIA driver was found, and "
    return f"{no_driver}{' and '.join(missing)} cannot be imported; run: {install_command()}"


def missing_packages() -> list[str]:
    """The packages that a GPU needs and that are not installed."""
    return [package for package, module in GPU_PACKAGES.items() if not is_there(module)]


def install_command() -> str:
    """The command that installs the GPU packages for the installed driver."""
    return f'pip install "numba_dequant[{"cu12" if 0 < driver_version() < 13000 else "cu13"}]"'


def is_there(module: str) -> bool:
    """Whether a module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def driver_library() -> ctypes.CDLL:
    """The library of the driver. Raises OSError if there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@lru_cache(maxsize=1)
def driver_version() -> int:
    """The newest CUDA version that the driver supports, for example 13010 for 13.1; 0 without a driver."""
    try:
        driver = driver_library()
        version = ctypes.c_int()
        return 0 if driver.cuDriverGetVersion(ctypes.byref(version)) else version.value
    except (OSError, AttributeError):
        return 0
