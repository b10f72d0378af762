"""Where to compute: the ``device`` argument."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from numba_dequant.errors import DeviceError, shown, warn_once
from numba_dequant.kernels.gpu_packages import install_command, why_no_gpu_packages
from numba_dequant.locks import compile_lock


@dataclass(frozen=True)
class DeviceSpec:
    """A device: its kind, and for CUDA the ordinal of the GPU; "simulator" is Numba's, in place of a GPU."""

    kind: Literal["reference", "cpu", "cuda", "simulator"]
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind in ("cuda", "simulator") else self.kind


def parse_device(device: Any) -> DeviceSpec:
    """The device of that name; None is the first GPU where one can be used, and otherwise the CPU.

    It may be a name in any case, the ordinal of a GPU, or a device of PyTorch, JAX, CuPy, Numba or cuda.core.

    Raises:
        DeviceError: there is no such device, or no GPU can be used.
    """
    if device is None:
        problem = why_no_cuda()
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
    """The GPU of that ordinal.

    Raises:
        DeviceError: no GPU can be used.
    """
    return _usable(_gpu(index), index)


def _usable(spec: DeviceSpec, device: Any) -> DeviceSpec:
    problem = why_no_cuda() if spec.kind == "cuda" else None
    if problem is not None:
        raise DeviceError(f"device {shown(device)} cannot be used: {problem}")
    return spec


@lru_cache(maxsize=64)
def _spec_of(name: str) -> DeviceSpec | None:
    # Ten digits and more are the ordinal of nothing, and Python refuses to read more than 4300 of them.
    found = re.fullmatch("reference|cpu(?::0)?|cuda(?::([0-9]{1,9}))?", name.strip().lower())
    if found is None:
        return None
    if found[0] == "reference":
        return DeviceSpec("reference")
    return DeviceSpec("cpu") if found[0].startswith("cpu") else _gpu(int(found[1] or 0))


@lru_cache(maxsize=64)
def _gpu(index: int) -> DeviceSpec:
    return DeviceSpec("simulator" if is_simulated() else "cuda", index)


def _name_of(device: Any) -> str:
    """The name of a device that is not given by name; an empty one if it is no device."""
    try:
        if isinstance(device, (bool, np.bool_, type)):
            return ""
        if hasattr(device, "__index__"):
            return f"cuda:{device.__index__()}"
        library = type(device).__module__.partition(".")[0]
        return _NAMES.get(library, str)(device)
    except Exception:  # a foreign object may fail in any way when it is asked what it is
        return ""


def _name_of_jax(device: Any) -> str:
    kind = "cuda" if device.platform == "gpu" else device.platform
    return kind if kind == "cpu" else f"{kind}:{device.local_hardware_id}"


_NAMES: dict[str, Callable[[Any], str]] = {
    "cupy": lambda device: f"cuda:{device.id}",
    "numba": lambda device: f"cuda:{device.id}",
    "cuda": lambda device: f"cuda:{device.device_id}",
    "jax": _name_of_jax,
    "jaxlib": _name_of_jax,
}
"""By library, what its devices are called here; others, such as PyTorch's, are called what they say."""


def _hint(device: Any) -> str:
    kind = _name_of(device).strip().lower().partition(":")[0]
    if kind == "gpu":
        return ". An NVIDIA GPU is called 'cuda'"
    if kind == "meta":
        return ". The meta device has no memory to write values to"
    if kind in ("mps", "xpu", "hip", "rocm", "xla", "tpu", "npu", "hpu", "vulkan", "mtia", "maia", "opencl"):
        return ". Values are computed on NVIDIA GPUs and on the CPU only"
    return ""


@lru_cache(maxsize=1)
def is_simulated() -> bool:
    """Whether Numba's CUDA simulator stands in for a GPU; Numba asks once, too."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@lru_cache(maxsize=1)
def why_no_cuda() -> str | None:
    """Why no GPU can be used here, or None if one can."""
    if is_simulated():
        return None
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    missing = why_no_gpu_packages()
    if missing is not None:
        return missing
    try:
        with compile_lock:  # a fork waits for the import
            from numba_dequant.backends.gpu import n_devices

        n_devices()
    except ImportError as error:
        return f"{error}; run: {install_command()}"
    except DeviceError as error:
        return str(error)
    from numba_dequant.kernels import compiler

    return compiler.why_no_toolkit()


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
