"""The ``device`` argument."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from numba_dequant.backends.driver_start import DriverStart
from numba_dequant.errors import DeviceError, shown, warn_once
from numba_dequant.kernels.gpu_packages import install_command, why_no_gpu_packages
from numba_dequant.locks import compile_lock


@dataclass(frozen=True)
class DeviceSpec:
    """A device: its kind, and the ordinal of a GPU; "simulator" is Numba's CUDA simulator in place of a GPU."""

    kind: Literal["reference", "cpu", "cuda", "simulator"]
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind in ("cuda", "simulator") else self.kind


def parse_device(device: Any) -> DeviceSpec:
    """The device for a name, the ordinal of a GPU, or a device of PyTorch, JAX, CuPy, Numba or cuda.core.

    None means the first GPU if it can be used, otherwise the CPU, with one warning.

    Raises:
        DeviceError: there is no such device, or no GPU can be used.
    """
    if device is None:
        problem = _why_not(0)
        if problem is None:
            return _gpu(0)
        warn_once(f"numba_dequant computes on the CPU: {problem}")
        return DeviceSpec("cpu")
    spec = _spec_of(device if type(device) is str else _name_of(device))
    if spec is None:
        raise DeviceError(
            f"unknown device {shown(device)}; choose 'reference', 'cpu', 'cuda', 'cuda:1', ... or None{_hint(device)}"
        )
    return _usable(spec, device)


def gpu_device(index: int) -> DeviceSpec:
    """The device for the ordinal of a GPU. Raises DeviceError if no GPU can be used."""
    return _usable(_gpu(index), index)


def _usable(spec: DeviceSpec, device: Any) -> DeviceSpec:
    problem = _why_not(spec.index) if spec.kind == "cuda" else None
    if problem is not None:
        raise DeviceError(f"device {shown(device)} cannot be used: {problem}")
    return spec


def _why_not(index: int) -> str | None:
    """Why no GPU can be used, or None. The first call also starts the driver for a GPU."""
    if "numba_dequant.backends.gpu" in sys.modules or is_simulated() or sys.platform == "darwin":
        return why_no_cuda()
    with DriverStart(index):
        return why_no_cuda()


@lru_cache(maxsize=64)
def _spec_of(name: str) -> DeviceSpec | None:
    # No GPU has an ordinal of ten digits; Python cannot convert more than 4300 digits.
    match = re.fullmatch("reference|cpu(?::0)?|cuda(?::([0-9]{1,9}))?", name.strip().lower())
    if match is None:
        return None
    if match[0] == "reference":
        return DeviceSpec("reference")
    return DeviceSpec("cpu") if match[0].startswith("cpu") else _gpu(int(match[1] or 0))


@lru_cache(maxsize=64)
def _gpu(index: int) -> DeviceSpec:
    return DeviceSpec("simulator" if is_simulated() else "cuda", index)


def _name_of(device: Any) -> str:
    """The name of a device object; an empty string if it is not a device."""
    try:
        if isinstance(device, (bool, np.bool_, type)):
            return ""
        if hasattr(device, "__index__"):
            return f"cuda:{device.__index__()}"
        library = type(device).__module__.partition(".")[0]
        if library == "builtins" and not isinstance(device, str):  # a list shows all that is in it
            return ""
        return _NAMES.get(library, str)(device)
    except Exception:  # a foreign object may raise any exception
        return ""


def _name_of_jax(device: Any) -> str:
    platform = "cuda" if device.platform == "gpu" else device.platform
    return platform if platform == "cpu" else f"{platform}:{device.local_hardware_id}"


_NAMES: dict[str, Callable[[Any], str]] = {
    "cupy": lambda device: f"cuda:{device.id}",
    "numba": lambda device: f"cuda:{device.id}",
    "cuda": lambda device: f"cuda:{device.device_id}",
    "jax": _name_of_jax,
    "jaxlib": _name_of_jax,
}
"""By library, the name of a device object. Other objects, such as PyTorch's, are named by `str`."""


def _hint(device: Any) -> str:
    name = _name_of(device).strip().lower().partition(":")[0]
    if name == "gpu":
        return ". An NVIDIA GPU is called 'cuda'"
    if name == "meta":
        return ". The meta device has no memory to write values to"
    if name in ("mps", "xpu", "hip", "rocm", "xla", "tpu", "npu", "hpu", "vulkan", "mtia", "maia", "opencl"):
        return ". Only NVIDIA GPUs and the CPU can compute values"
    return ""


@lru_cache(maxsize=1)
def is_simulated() -> bool:
    """Whether Numba's CUDA simulator replaces the GPUs. Numba reads the variable only once, too."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@lru_cache(maxsize=1)
def why_no_cuda() -> str | None:
    """Why no GPU can be used, or None if one can."""
    if is_simulated():
        return None
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    missing = why_no_gpu_packages()
    if missing is not None:
        return missing
    try:
        with compile_lock:  # no fork during the import
            # All that a first call imports, and what takes time in a key, while a driver is being started.
            from numba_dequant.backends import cuda  # noqa: F401
            from numba_dequant.backends.gpu import n_devices
            from numba_dequant.kernels import compiler

        compiler.toolkit_key()
        n_devices()
    except ImportError as error:
        return f"{error}; run: {install_command()}"
    except DeviceError as error:
        return str(error)
    return compiler.why_no_toolkit()


if hasattr(os, "register_at_fork"):  # CUDA that the parent has started cannot be used in the child
    os.register_at_fork(after_in_child=why_no_cuda.cache_clear)


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
