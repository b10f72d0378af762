"""Where to compute: the ``device`` argument."""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from numba_dequant.errors import DeviceError


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
    try:
        from numba_dequant import runtime

        runtime.n_devices()
    except (ImportError, DeviceError) as error:
        return str(error)
    from numba_dequant import compiler

    return compiler.toolkit_problem()


def n_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _say_once(problem: str) -> None:
    # The warning points at the line of the user's that called us.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"numba_dequant computes on the CPU: {problem}", RuntimeWarning, stacklevel=level)
