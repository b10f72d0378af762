"""Arrays and streams of other libraries: what they are to a GPU, and an array as they take it."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Buffer
from cuda.core.utils import StridedMemoryView

from numba_dequant.backends.dlpack import patch_dlpack_dtype
from numba_dequant.backends.gpu import gpu_at, n_devices
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.errors import DataError, DeviceError, shown
from numba_dequant.interop import library_of

LEGACY_STREAM = 1
"""The name of the legacy default stream in `__cuda_array_interface__` and DLPack."""


def stream_handle(stream: Any) -> int:
    """The handle of a stream; None, 0 and 1 are the legacy default stream.

    Raises:
        DeviceError: it is not a stream.
    """
    if stream is None:
        return 0
    if isinstance(stream, int) and not isinstance(stream, bool):
        handle: int | None = stream
    else:
        try:
            handle = _handle_of(stream)
        except Exception:  # a foreign object may fail in any way
            handle = None
    if handle is None or not 0 <= handle < 2**64:
        raise DeviceError(
            f"expected a stream, got {shown(stream)}; pass None, an int, a stream of PyTorch, CuPy or Numba, or an "
            "object with __cuda_stream__"
        )
    return 0 if handle == LEGACY_STREAM else handle


def _handle_of(stream: Any) -> int | None:
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0)
    return None


def device_view(thing: Any, stream: int) -> DeviceBytes:
    """The device memory of an array, which is not copied; work on `stream` will wait for what fills it.

    Raises:
        DataError: it is not one contiguous piece.
    """
    view = StridedMemoryView.from_any_interface(thing, stream_ptr=stream or LEGACY_STREAM)
    shape, dtype = tuple(view.shape), view.dtype
    if dtype is None:
        raise DataError(f"cannot tell the element type of a {type(thing).__name__}")
    if view.strides is not None and view.size:
        expected = 1
        for extent, stride in zip(reversed(shape), reversed(view.strides), strict=True):
            if extent != 1 and stride != expected:
                raise DataError(f"the array of shape {shape} is not one contiguous piece of memory; make it so")
            expected *= extent
    pointer, n_bytes = int(view.ptr), int(view.size) * dtype.itemsize
    return DeviceBytes(
        pointer, n_bytes, gpu_at(_device_at(pointer, view.device_id)), thing, dtype, shape, view.readonly
    )


def device_of(thing: Any) -> int:
    """Ordinal of the GPU on which an array lies."""
    library = library_of(thing)
    if library is not None:
        return library.device_of(thing)
    if hasattr(thing, "__dlpack_device__"):
        return int(thing.__dlpack_device__()[1])
    n_devices()  # says why, where there is no driver
    return _device_at(int(thing.__cuda_array_interface__["data"][0]), 0)


def _device_at(pointer: int, claimed: int) -> int:
    # __cuda_array_interface__ does not say which GPU it speaks of; the driver knows.
    if pointer:
        ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        code, device = driver.cuPointerGetAttribute(ordinal, pointer)
        if code == driver.CUresult.CUDA_SUCCESS:
            return int(device)
    return max(claimed, 0)


def export(
    memory: DeviceBytes, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None
) -> object:
    """A DLPack capsule that shares memory and keeps it alive."""
    is_bf16 = dtype.name == "bfloat16"
    code = np.dtype(np.uint16) if is_bf16 else dtype
    piece = Buffer.from_handle(memory.pointer, memory.n_bytes, owner=memory.owner)
    whole = StridedMemoryView.from_buffer(piece, shape, itemsize=code.itemsize, dtype=code)
    capsule = whole.__dlpack__(stream=-1, max_version=max_version)
    if is_bf16:
        patch_dlpack_dtype(capsule)
    return capsule
