"""`numba.cuda`, importable with every NumPy. Other modules import it from here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np
from numba import config

from numba_dequant.errors import DeviceError
from numba_dequant.kernels.gpu_packages import GPU_PACKAGES, install_command, is_there

REMOVED_NAMES = {"row_stack": "vstack", "trapz": "trapezoid", "in1d": "isin"}
"""Functions that numba-cuda uses on import, but that NumPy 2.5 (row_stack) and NumPy 2.4 have removed."""


@contextmanager
def _names_of_earlier_numpy() -> Iterator[None]:
    missing = [old for old, new in REMOVED_NAMES.items() if not hasattr(np, old) and hasattr(np, new)]
    for old in missing:
        setattr(np, old, getattr(np, REMOVED_NAMES[old]))
    try:
        yield
    finally:
        for old in missing:
            delattr(np, old)


if not config.ENABLE_CUDASIM and not is_there(GPU_PACKAGES["numba-cuda"]):
    # Numba has an older `numba.cuda` of its own.
    raise DeviceError(f"numba-cuda is not installed; run: {install_command()}")

with _names_of_earlier_numpy(), warnings.catch_warnings():
    # numba-cuda 0.30 makes a constant from it; nobody who imports this package can do anything about that.
    warnings.filterwarnings("ignore", "The 'generic' unit for NumPy timedelta", DeprecationWarning)
    from numba import cuda as cuda  # noqa: PLC0414 exported

    if not config.ENABLE_CUDASIM:
        extending: Any = import_module("numba.cuda.extending")
        # Numba imports these at the first compilation.
        for _module in ("arraymath", "arrayobj"):
            with suppress(ModuleNotFoundError):
                import_module(f"numba.cuda.np.{_module}")
