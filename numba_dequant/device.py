"""Where to compute: the ``device`` argument."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

from numba_dequant.errors import DeviceError
from numba_dequant.locks import compile_lock
from numba_dequant.warn import warn_once

GPU_PACKAGES = {"numba-cuda": "numba_cuda", "cuda-core": "cuda.core"}
"""What only a GPU needs, and the modules by which it is found."""


@dataclass(frozen=True)
class Place:
    """A device: its kind, and for CUDA the ordinal of the GPU; "simulator" is Numba's, in place of a GPU."""

    kind: Literal["reference", "cpu", "cuda", "simulator"]
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind in ("cuda", "simulator") else self.kind


def place_named(device: str | None) -> Place:
    """The device of that name; None is the first GPU where one can be used, and otherwise the CPU.

    Raises:
        DeviceError: there is no such device, or no GPU can be used.
    """
    if device is None:
        problem = cuda_problem()
        if problem is None:
            return _gpu_named("cuda")
        _say_once(problem)
        return Place("cpu")
    if device in ("reference", "cpu"):
        return Place("reference" if device == "reference" else "cpu")
    place = _gpu_named(str(device))
    problem = cuda_problem()
    if problem is not None:
        raise DeviceError(f"device {device!r} cannot be used: {problem}")
    return place


@lru_cache
def _gpu_named(device: str) -> Place:
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(f"unknown device {device!r}; choose 'reference', 'cpu', 'cuda', 'cuda:1', ... or None")
    return Place("simulator" if is_simulated() else "cuda", int(match[1] or 0))


@lru_cache(maxsize=1)
def is_simulated() -> bool:
    """Whether Numba's CUDA simulator stands in for a GPU; Numba asks once, too."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@lru_cache(maxsize=1)
def cuda_problem() -> str | None:
    """Why no GPU can be used here, or None if one can."""
    if is_simulated():
        return None
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    missing = [package for package, module in GPU_PACKAGES.items() if not is_there(module)]
    if missing:
        no_driver = "" if _driver_version() else "no NVIDIA driver was found, and "
        return f"{no_driver}{' and '.join(missing)} cannot be imported; run: {install_command()}"
    try:
        with compile_lock:  # a fork waits for the import
            from numba_dequant import runtime

        runtime.n_devices()
    except ImportError as error:
        return f"{error}; run: {install_command()}"
    except DeviceError as error:
        return str(error)
    from numba_dequant import compiler

    return compiler.toolkit_problem()


def install_command() -> str:
    """The command that installs what a GPU needs, for the driver that is here."""
    return f'pip install "numba_dequant[{"cu12" if 0 < _driver_version() < 13000 else "cu13"}]"'


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is in
        return False


@lru_cache(maxsize=1)
def _driver_version() -> int:
    """The newest CUDA that the driver knows, as 13010 for 13.1; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        return 0 if driver.cuDriverGetVersion(ctypes.byref(version)) else version.value
    except (OSError, AttributeError):
        return 0


def n_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say_once(problem: str) -> None:
    warn_once(f"numba_dequant computes on the CPU: {problem}")
