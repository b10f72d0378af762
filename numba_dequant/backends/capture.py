"""CUDA graphs that are being captured: which streams are part of one, and what a thread may do meanwhile."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

NOT_CAPTURING, RELAXED_CAPTURE, IMPLICIT_CAPTURE = 0, 2, 906
"""A status, a mode and an error code of the driver."""


class _Functions:
    """Functions of the driver that every call needs.

    `cuda.bindings` takes a microsecond for each, which is longer than the driver takes. They keep the interpreter lock.
    """

    def __init__(self) -> None:
        library = ctypes.PyDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self.get_context = library.cuCtxGetCurrent
        self.get_context.argtypes = [ctypes.c_void_p]
        self.is_capturing = library.cuStreamIsCapturing
        self.is_capturing.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.exchange_capture_mode = library.cuThreadExchangeStreamCaptureMode
        self.exchange_capture_mode.argtypes = [ctypes.c_void_p]


@cache
def _functions() -> _Functions:
    return _Functions()


def current_context() -> int | None:
    """The handle of this thread's current context, or None."""
    context = ctypes.c_void_p()
    _functions().get_context(ctypes.byref(context))
    return context.value


def capture_state(stream: int) -> int:
    """`NOT_CAPTURING`, or the driver's status of a stream that is capturing a CUDA graph.

    `IMPLICIT_CAPTURE` means that the legacy stream must not be used, because a stream that waits for it is capturing.
    """
    status = ctypes.c_int()
    code: int = _functions().is_capturing(stream, ctypes.byref(status))
    return code or status.value


def is_capturing(stream: int) -> bool:
    """Whether a stream is capturing a CUDA graph, or, for the legacy stream, must not be used during a capture."""
    return capture_state(stream) != NOT_CAPTURING


class allowed_in_capture:
    """Let this thread allocate, free, load code and wait although a CUDA graph is being captured on another stream."""

    __slots__ = ("_exchange", "_mode")

    def __enter__(self) -> None:
        self._exchange, self._mode = _functions().exchange_capture_mode, ctypes.byref(ctypes.c_int(RELAXED_CAPTURE))
        self._exchange(self._mode)

    def __exit__(self, *error: object) -> None:
        self._exchange(self._mode)  # the driver has put the earlier mode there
