"""Capture of CUDA graphs: whether a stream is capturing, and what a thread may do during a capture."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

NOT_CAPTURING, RELAXED_CAPTURE, IMPLICIT_CAPTURE = 0, 2, 906
"""A capture status, a capture mode and an error code of the driver."""


class _Functions:
    """Driver functions that every call needs.

    Through `cuda.bindings` each takes 1 us, longer than in the driver itself. These keep the interpreter lock.
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
    """The capture status of a stream in the driver; `NOT_CAPTURING` if it captures no CUDA graph.

    `IMPLICIT_CAPTURE` means that the legacy stream must not be used, because a stream that waits for it is capturing.
    """
    status = ctypes.c_int()
    code: int = _functions().is_capturing(stream, ctypes.byref(status))
    return code or status.value


def is_capturing(stream: int) -> bool:
    """Whether a stream is capturing a CUDA graph, or is the legacy stream and must not be used during a capture."""
    return capture_state(stream) != NOT_CAPTURING


class allowed_in_capture:
    """Let this thread allocate, free, load code and wait while another stream is capturing a CUDA graph."""

    __slots__ = ("_exchange", "_mode")

    def __enter__(self) -> None:
        self._exchange, self._mode = _functions().exchange_capture_mode, ctypes.byref(ctypes.c_int(RELAXED_CAPTURE))
        self._exchange(self._mode)

    def __exit__(self, *error: object) -> None:
        self._exchange(self._mode)  # the first exchange stored the earlier mode here
