"""Arrays and streams of other libraries, and export through DLPack."""

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
"""The number of the legacy default stream in `__cuda_array_interface__` and DLPack."""


def stream_handle(stream: Any) -> int:
    """The handle of a stream; None, 0 and 1 are the legacy default stream.

    Raises:
        DeviceError: `stream` is not a stream.
    """
    if stream is None:
        return 0
    if isinstance(stream, int) and not isinstance(stream, bool):
        handle: int | None = stream
    else:
        try:
            handle = _handle_of(stream)
        except Exception:  # a foreign object may raise any exception
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


def device_view(array: Any, stream: int) -> DeviceBytes:
    """The device memory of an array, without a copy; `stream` waits for pending writes to it.

    Raises:
        DataError: the array is not contiguous, or its dtype is unknown.
    """
    view = StridedMemoryView.from_any_interface(array, stream_ptr=stream or LEGACY_STREAM)
    shape, dtype = tuple(view.shape), view.dtype
    if dtype is None:
        raise DataError(f"cannot read the dtype of a {type(array).__name__}; pass an array of uint8")
    if view.strides is not None and view.size:
        expected = 1
        for extent, stride in zip(reversed(shape), reversed(view.strides), strict=True):
            if extent != 1 and stride != expected:
                raise DataError(f"the array of shape {shape} is not contiguous; pass a contiguous array")
            expected *= extent
    pointer, n_bytes = int(view.ptr), int(view.size) * dtype.itemsize
    return DeviceBytes(
        pointer, n_bytes, gpu_at(_device_at(pointer, view.device_id)), array, dtype, shape, view.readonly
    )


def device_of(array: Any) -> int:
    """The ordinal of the GPU of an array."""
    library = library_of(array)
    if library is not None:
        return library.device_of(array)
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    n_devices()  # raises an error if there is no driver
    return _device_at(int(array.__cuda_array_interface__["data"][0]), 0)


def _device_at(pointer: int, claimed: int) -> int:
    # __cuda_array_interface__ does not name the GPU; the driver knows it.
    if pointer:
        ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        code, device = driver.cuPointerGetAttribute(ordinal, pointer)
        if code == driver.CUresult.CUDA_SUCCESS:
            return int(device)
    return max(claimed, 0)


def export(
    memory: DeviceBytes, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None
) -> object:
    """A DLPack capsule that shares the memory and keeps it alive."""
    is_bf16 = dtype.name == "bfloat16"
    code = np.dtype(np.uint16) if is_bf16 else dtype
    buffer = Buffer.from_handle(memory.pointer, memory.n_bytes, owner=memory.owner)
    view = StridedMemoryView.from_buffer(buffer, shape, itemsize=code.itemsize, dtype=code)
    capsule = view.__dlpack__(stream=-1, max_version=max_version)
    if is_bf16:
        patch_dlpack_dtype(capsule)
    return capsule
