"""Starts the CUDA driver while Python imports what a GPU needs: each takes more than a tenth of a second."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

from numba_dequant.kernels.gpu_packages import driver_library, why_no_gpu_packages
from numba_dequant.locks import compile_lock


class DriverStart:
    """A context for the first imports, in which a thread starts the driver and the context of a GPU.

    Faults are not reported, because the caller then uses the driver, too.

    Args:
        index: the ordinal of the GPU.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        has_packages = why_no_gpu_packages() is None
        compile_lock.__enter__()  # no fork while the driver starts
        if has_packages:
            self._thread = threading.Thread(target=self._start, name="numba_dequant driver", daemon=True)
            with suppress(RuntimeError):  # there are too many threads
                self._thread.start()

    def __exit__(self, *error: object) -> None:
        try:
            if self._thread is not None and self._thread.ident is not None:
                self._thread.join()
        finally:
            compile_lock.__exit__()

    def _start(self) -> None:
        with suppress(OSError, AttributeError):
            driver = driver_library()
            device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
            steps: list[Callable[[], int]] = [
                lambda: driver.cuInit(0),
                lambda: driver.cuDeviceGet(ctypes.byref(device), self._index),
                # The context stays for the life of the process, like that of cuda.core and PyTorch.
                lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
                lambda: driver.cuCtxSetCurrent(context),
                # The first allocation takes ten milliseconds.
                lambda: driver.cuMemAllocAsync(ctypes.byref(memory), ctypes.c_size_t(1), None),
                lambda: driver.cuMemFreeAsync(memory, None),
            ]
            all(step() == 0 for step in steps)
