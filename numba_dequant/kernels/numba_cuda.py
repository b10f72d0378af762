"""`numba.cuda`, made to import beside every NumPy; modules that need it import it from here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np
from numba import config

from numba_dequant.errors import DeviceError
from numba_dequant.kernels.gpu_packages import GPU_PACKAGES, install_command, is_there

REMOVED_NAMES = {"row_stack": "vstack", "trapz": "trapezoid", "in1d": "isin"}
"""Names that NumPy has taken back, which versions of numba-cuda ask for when they are imported: 0.30 for row_stack, of
NumPy before 2.5, 0.24 for the others, of NumPy before 2.4."""


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
    # Numba has a `numba.cuda` of its own, of an earlier time.
    raise DeviceError(f"numba-cuda is not installed; run: {install_command()}")

with _names_of_earlier_numpy():
    from numba import cuda as cuda  # noqa: PLC0414 for others to import

    if not config.ENABLE_CUDASIM:
        extending: Any = import_module("numba.cuda.extending")
        # Numba would import these when it first compiles.
        for _module in ("arraymath", "arrayobj"):
            with suppress(ModuleNotFoundError):
                import_module(f"numba.cuda.np.{_module}")
