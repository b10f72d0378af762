"""The errors of native threads that load to a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from io import RawIOBase
from typing import Any

from numba_dequant.backends.gpu import Gpu, error_name
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.gguf.tensors import truncated
from numba_dequant.kernels.native.records import END_OF_FILE, FAULT_GPU
from numba_dequant.loading.chunks import Chunk
from numba_dequant.loading.files import changed, read_error
from numba_dequant.loading.native_threads import ReaderFaultError, ReaderThreads
from numba_dequant.loading.requests import Request


def start(threads: ReaderThreads, count: int) -> None:
    """Start native threads.

    Raises:
        DeviceError: the system cannot start any.
    """
    try:
        threads.start(count)
    except OSError as error:
        raise DeviceError(
            f"cannot start a reader thread: {error.strerror}; end other work of this user, or raise the limit "
            "(ulimit -u)"
        ) from error


def check(gpu: Gpu, streams: Iterable[Any]) -> None:
    """Check that the GPU has not failed; otherwise the threads would wait for buffers forever.

    Raises:
        DeviceError: it has failed.
    """
    try:
        for stream in streams:
            gpu.raise_if_failed(int(stream.handle))
    except DeviceError as error:
        raise DeviceError(f"cuda:{gpu.index}: {error}") from error


def error_of(
    fault: ReaderFaultError, chunk: Chunk, requests: Sequence[Request], file: RawIOBase, gpu: Gpu
) -> NumbaDequantError:
    """The error for a fault of a thread in a chunk of a file."""
    tensors = [requests[part.index].tensor for part in chunk.parts]
    if fault.place == FAULT_GPU:
        return requests[chunk.parts[0].index].blame(DeviceError(f"cuda:{gpu.index}: {error_name(fault.code)}"))
    if fault.code == END_OF_FILE:
        size = file.seek(0, 2)
        incomplete = next((tensor for tensor in tensors if tensor.offset + tensor.n_bytes > size), None)
        return truncated(incomplete, size) if incomplete is not None else changed(tensors[0])
    error = OSError(fault.code, os.strerror(fault.code))
    return read_error(requests[chunk.index_at(fault.offset)].tensor, fault.offset, error)
