"""What `doctor` tries in processes of its own, because a driver or a package may crash a process, or never return.

A process runs the steps of one part. After each step, it writes a line of JSON: the name of the step and what was
found.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

Facts = dict[str, Any]

FORMAT, DTYPE = "Q6_K", "float16"
"""What is dequantized."""

N_BLOCKS = 64

LIKE_H100 = (9, 0)
"""The compute capability that kernels are compiled for where no GPU is."""


def answer(part: str) -> None:
    """Run the steps of a part, in a process of `doctor`."""
    # What packages and drivers print must not come between the lines.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name, step in PARTS[part].items():
            try:
                found = step()
            except BaseException as error:  # a broken package may raise any exception
                found = {"error": _first_line(error), "type": type(error).__name__}
            out.write(json.dumps({"step": name, **found}) + "\n")
            out.flush()


def _first_line(error: BaseException) -> str:
    lines = [line for line in map(str.strip, str(error).splitlines()) if line.strip("=-^~")]
    return lines[0][:1000] if lines else type(error).__name__


def _cpu() -> Facts:
    """Compile for the CPU and compare with the reference; `problem` is why nothing was compiled."""
    import tqdm  # noqa: F401 a dependency

    from numba_dequant.backends import cpu
    from numba_dequant.dtypes import numpy_dtype
    from numba_dequant.formats import FORMATS

    numpy_dtype("bfloat16")  # imports another dependency
    if cpu.is_jit_disabled():
        return {"is_disabled": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_compiled = cpu.compiled(FORMATS[FORMAT], DTYPE) is not None
    if not is_compiled:
        return {"problem": str(caught[-1].message) if caught else "nothing was compiled"}
    return _compared("cpu")


def _compared(device: str) -> Facts:
    """Dequantize some blocks, and compare them with the reference. Raises DeviceError if a value differs."""
    from numba_dequant.api import dequantize
    from numba_dequant.formats import FORMATS
    from numba_dequant.verify import assert_bit_identical

    data = np.random.default_rng(0).integers(0, 256, N_BLOCKS * FORMATS[FORMAT].type_size, np.uint8)
    found: Any = dequantize(data, FORMAT, DTYPE, device=device)
    values = found if isinstance(found, np.ndarray) else found.copy_to_host()
    assert_bit_identical(values, dequantize(data, FORMAT, DTYPE, device="reference"), f"{FORMAT} to {DTYPE}")
    return {"compared": values.size}


def _cache() -> Facts:
    """Write an entry to the cache, read it and remove it."""
    from numba_dequant import disk_cache

    found: Facts = {"problem": disk_cache.problem()}
    with suppress(OSError):
        found["directory"] = str(disk_cache.directory())
    if found["problem"] is None:
        entries = disk_cache.entries()
        found |= {"entries": len(entries), "bytes": sum(entries.values()), "is_kept": disk_cache.try_out()}
    return found


def _driver() -> Facts:
    """The version of the driver, and the newest CUDA version that it supports."""
    from numba_dequant.kernels.gpu_packages import driver_version

    return {"cuda": driver_version(), "driver": _name_of_driver()}


def _name_of_driver() -> str | None:
    with suppress(OSError, AttributeError):
        management = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if not management.nvmlInit_v2() and not management.nvmlSystemGetDriverVersion(text, len(text)):
            return text.value.decode(errors="replace")
    return None


def _gpu_packages() -> Facts:
    """The packages of an extra that are missing, and whether numba-cuda can be imported."""
    from numba_dequant.backends.devices import is_simulated
    from numba_dequant.kernels.gpu_packages import missing_packages

    missing = missing_packages()
    if not missing and not is_simulated():
        from numba_dequant.kernels import numba_cuda  # noqa: F401 it is only tried
    return {"missing": missing, "is_simulated": is_simulated()}


def _toolkit() -> Facts:
    """Compile a kernel for a GPU that need not be there."""
    from numba_dequant.backends.devices import is_simulated
    from numba_dequant.formats import FORMATS
    from numba_dequant.kernels import compiler

    if is_simulated():
        return {}
    problem = compiler.why_no_toolkit()
    if problem is None:
        compiler.cubin(compiler.dequantize_kernel(FORMATS[FORMAT], DTYPE), LIKE_H100)
    return {"problem": problem}


def _gpus() -> Facts:
    """Dequantize on each GPU."""
    from numba_dequant.backends.gpu import gpu_at, n_devices

    found: list[Facts] = []
    for index in range(n_devices()):
        described: Facts = {"device": f"cuda:{index}"}
        try:
            gpu = gpu_at(index)
            with gpu.active() as device:
                described |= {"name": device.name, "capability": gpu.capability}
            described |= _compared(f"cuda:{index}")
        except Exception as error:
            described |= {"error": _first_line(error), "type": type(error).__name__}
        found.append(described)
    return {"gpus": found}


PARTS: dict[str, dict[str, Callable[[], Facts]]] = {
    "cpu": {"cpu": _cpu},
    "cache": {"cache": _cache},
    "gpu": {"driver": _driver, "gpu_packages": _gpu_packages, "toolkit": _toolkit, "gpus": _gpus},
}
"""The steps of each process, in order."""
