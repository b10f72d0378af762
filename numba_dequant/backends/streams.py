"""The stream of a call, and its order with work before and after the call.

If the caller passes no stream and an array of the call belongs to PyTorch or CuPy, the stream is the current stream of
that library. Otherwise it is the legacy default stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from numba_dequant.arguments import after_writing
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.foreign import device_view, stream_handle
from numba_dequant.backends.gpu import Gpu, gpu_at
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.errors import DeviceError
from numba_dequant.interop import TORCH, Library, library_of, library_that_captures


@dataclass(slots=True)
class CallStream:
    """The stream of one call.

    Attributes:
        gpu: the GPU that computes.
        handle: the handle of the stream.
        framework: the library of which it is the current stream; None for a stream of the caller or the legacy stream.
        keeper: an object that keeps the stream alive.
        is_named: whether the caller passed the stream.
        returns_tensors: whether new results are tensors of PyTorch. The stream must then be PyTorch's current one.
    """

    gpu: Gpu
    handle: int = 0
    framework: Library | None = None
    keeper: Any = None
    is_named: bool = False
    returns_tensors: bool = False


def stream_for(stream: Any, gpu: Gpu, arrays: Iterable[Any]) -> CallStream:
    """The stream of a call that reads and writes `arrays`: data, outputs or None.

    Raises:
        DeviceError: `stream` is not a stream, or a library is capturing a CUDA graph that would miss this call.
    """
    if stream is not None:
        return CallStream(gpu, stream_handle(stream), None, stream, is_named=True)
    for array in arrays:
        library = owner_of(array)
        if library is not None:
            return CallStream(gpu, library.current_stream(gpu.index), library, library.keeper(gpu.index))
    capturing = library_that_captures()
    if capturing is not None:
        raise DeviceError(
            f"{capturing.name} is capturing a CUDA graph, but no array of this call is an array of {capturing.name}, "
            "so the graph would not contain it; pass stream= with the capturing stream"
        )
    return CallStream(gpu)


def of_torch(gpu: Gpu) -> CallStream:
    """PyTorch's current stream of a GPU, for a call that returns tensors. PyTorch must have initialized CUDA."""
    return CallStream(gpu, TORCH.current_stream(gpu.index), TORCH, TORCH.keeper(gpu.index), returns_tensors=True)


def owner_of(array: Any) -> Library | None:
    """The library of an array, or the library for whose arrays a `DeviceTensor` was computed."""
    if isinstance(array, DeviceTensor):
        return array.framework
    library = library_of(array)
    # PyTorch has no current stream before the program uses a GPU through it.
    return None if library is TORCH and not (TORCH.is_on_gpu(array) or TORCH.has_gpu) else library


def memory_of(array: Any, call: CallStream) -> DeviceBytes:
    """The device memory of an array; the stream of the call waits for pending writes to it.

    A strided array of PyTorch or CuPy is copied first.

    Raises:
        DataError: the array of another library is not contiguous.
    """
    if isinstance(array, DeviceTensor):
        if array.stream != call.handle:
            gpu = array.memory.gpu
            with gpu.active():
                gpu.stream_wait_stream(call.handle, array.stream)
        return array.memory
    library = library_of(array)
    if library is None:
        return device_view(array, call.handle)
    view = library.view(array)
    gpu = gpu_at(view.device)
    if library is not call.framework:
        with gpu.active():
            gpu.stream_wait_stream(call.handle, library.current_stream(view.device))
    if view.is_copy:
        # Only this call uses the copy, but the library owns its memory.
        let_go(view.array, library, replace(call, gpu=gpu))
    return DeviceBytes(view.pointer, view.n_bytes, gpu, view.array, view.dtype, view.shape)


def release(call: CallStream, *, data: Any = None, out: Any = None) -> None:
    """Order later uses of the arrays after the call, and also uses of their memory after the arrays are dropped."""
    for array in (data, out):
        if array is None:
            continue
        if isinstance(array, DeviceTensor):
            array.memory.owner.used_on(call.handle)
            continue
        library = library_of(array)
        if library is None:
            if call.is_named:
                call.gpu.keep_until_done(call.handle, array)
        elif library is not call.framework and library.is_on_gpu(array):
            let_go(array, library, call)
    if isinstance(out, DeviceTensor):
        if out.stream != call.handle:
            out.stream, out.framework = call.handle, call.framework
    else:
        after_writing(out)


def let_go(array: Any, library: Library, call: CallStream) -> None:
    """Tell a library that the call uses its array on a stream other than the current stream of the library."""
    current = library.current_stream(call.gpu.index)
    if current == call.handle:
        return
    if not call.is_named:
        # Two libraries share this call: the current stream of the second one waits for the call.
        call.gpu.stream_wait_stream(current, call.handle)
    elif library is TORCH:
        TORCH.record_stream(array, call.gpu.index, call.handle)
    else:
        call.gpu.keep_until_done(call.handle, array)
