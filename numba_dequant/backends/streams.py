"""The stream that a call runs on, and its order with what ran before and what comes after.

Where an array of the call is PyTorch's or CuPy's and the caller names no stream, it is that library's current stream,
as for the library's own functions. Otherwise it is the legacy default stream.
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
        handle: of the stream.
        framework: whose current stream it is; None for a stream that the caller named, and for the legacy stream.
        keeper: what keeps the stream from being destroyed.
        is_named: whether the caller named it.
    """

    gpu: Gpu
    handle: int = 0
    framework: Library | None = None
    keeper: Any = None
    is_named: bool = False


def stream_for(stream: Any, gpu: Gpu, things: Iterable[Any]) -> CallStream:
    """The stream of a call that reads and writes `things`: data, outputs, None.

    Raises:
        DeviceError: `stream` is not a stream, or a library is capturing a CUDA graph that would miss this call.
    """
    if stream is not None:
        return CallStream(gpu, stream_handle(stream), None, stream, is_named=True)
    for thing in things:
        library = owner_of(thing)
        if library is not None:
            return CallStream(gpu, library.current_stream(gpu.index), library, library.keeper(gpu.index))
    capturing = library_that_captures()
    if capturing is not None:
        raise DeviceError(
            f"{capturing.name} is capturing a CUDA graph, but no array of this call is an array of {capturing.name}, "
            "so the graph would not contain it; pass stream= with the capturing stream"
        )
    return CallStream(gpu)


def owner_of(thing: Any) -> Library | None:
    """The library whose array this is, or for whose arrays a `DeviceTensor` was computed."""
    if isinstance(thing, DeviceTensor):
        return thing.framework
    library = library_of(thing)
    # A tensor on the host says nothing about streams until the program uses a GPU through PyTorch.
    return None if library is TORCH and not (TORCH.is_on_gpu(thing) or TORCH.has_gpu) else library


def memory_of(thing: Any, call: CallStream) -> DeviceBytes:
    """The device memory of an array; work on the call's stream waits for what fills it.

    A strided array of PyTorch or CuPy is copied first.

    Raises:
        DataError: it is not one contiguous piece, and its library is neither PyTorch nor CuPy.
    """
    if isinstance(thing, DeviceTensor):
        if thing.stream != call.handle:
            gpu = thing.memory.gpu
            with gpu.active():
                gpu.stream_wait_stream(call.handle, thing.stream)
        return thing.memory
    library = library_of(thing)
    if library is None:
        return device_view(thing, call.handle)
    view = library.view(thing)
    gpu = gpu_at(view.device)
    if library is not call.framework:
        with gpu.active():
            gpu.stream_wait_stream(call.handle, library.current_stream(view.device))
    if view.is_copy:
        # The copy is this call's alone, and its memory is the library's.
        let_go(view.array, library, replace(call, gpu=gpu))
    return DeviceBytes(view.pointer, view.n_bytes, gpu, view.array, view.dtype, view.shape)


def release(call: CallStream, *, data: Any = None, out: Any = None) -> None:
    """Order what comes after a call with it: whoever uses its arrays next, or their memory once they are dropped."""
    for thing in (data, out):
        if thing is None:
            continue
        if isinstance(thing, DeviceTensor):
            thing.memory.owner.used_on(call.handle)
            continue
        library = library_of(thing)
        if library is None:
            if call.is_named:
                call.gpu.keep_until_done(call.handle, thing)
        elif library is not call.framework and library.is_on_gpu(thing):
            let_go(thing, library, call)
    if isinstance(out, DeviceTensor):
        if out.stream != call.handle:
            out.stream, out.framework = call.handle, call.framework
    else:
        after_writing(out)


def let_go(array: Any, library: Library, call: CallStream) -> None:
    """Let a library know that its array is in use on a stream other than its current one."""
    current = library.current_stream(call.gpu.index)
    if current == call.handle:
        return
    if not call.is_named:
        # Two libraries share this call. The one whose stream it is not goes on only when the call is done.
        call.gpu.stream_wait_stream(current, call.handle)
    elif library is TORCH:
        TORCH.record_stream(array, call.gpu.index, call.handle)
    else:
        call.gpu.keep_until_done(call.handle, array)
