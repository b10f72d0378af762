"""The GPU through `cuda.core`: devices, streams and memory. It compiles nothing and knows no format."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import (
    Buffer,
    Device,
    Event,
    EventOptions,
    Kernel,
    LaunchConfig,
    LegacyPinnedMemoryResource,
    Stream,
    launch,
)
from cuda.core.utils import StridedMemoryView
from numpy.typing import NDArray

from numba_dequant.backends.dlpack import patch_dlpack_dtype
from numba_dequant.errors import DataError, DeviceError, shown
from numba_dequant.interop import TORCH, libraries_with_streams, library_of, library_that_captures

LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
"""The names of the default streams in `__cuda_array_interface__` and DLPack."""

BYTES = np.dtype(np.uint8)


@dataclass(slots=True)
class DeviceBytes:
    """A contiguous piece of device memory, alive as long as its owner is.

    Attributes:
        pointer: its address.
        n_bytes: its length.
        device: ordinal of its GPU.
        owner: what keeps it alive; a `PoolMemory` or `TorchMemory` if this package allocated it.
        dtype: its element type, where it was given as an array.
        shape: shape of that array.
        is_readonly: whether it may only be read.
    """

    pointer: int
    n_bytes: int
    device: int
    owner: Any = field(repr=False)
    dtype: np.dtype[Any] = BYTES
    shape: tuple[int, ...] = ()
    is_readonly: bool = False


@cache
def n_devices() -> int:
    """GPUs that this process can use, at least one.

    Raises:
        DeviceError: there is no driver, or no GPU.
    """
    try:
        code, *_ = driver.cuInit(0)
        if code == driver.CUresult.CUDA_SUCCESS:
            code, count = driver.cuDeviceGetCount()
            if code == driver.CUresult.CUDA_SUCCESS and count:
                return int(count)
    except RuntimeError:  # cuda.bindings found no driver library
        raise DeviceError("no NVIDIA driver was found") from None
    raise DeviceError(f"no GPU can be used ({code.name})")


def check_index(index: int) -> None:
    """Check that there is a GPU of that ordinal.

    Raises:
        DeviceError: there is none.
    """
    count = n_devices()
    if not 0 <= index < count:
        raise DeviceError(f"there is no device cuda:{index}; this process sees {count}, from cuda:0 on")


class _Calls:
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
def _calls() -> _Calls:
    return _Calls()


def _current_context() -> int | None:
    found = ctypes.c_void_p()
    _calls().get_context(ctypes.byref(found))
    return found.value  # None for no context


class _GpusOfThread(threading.local):
    """By ordinal, a GPU that this thread has used, and the context that is current while it does."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int | None, Device]] = {}


_gpus = _GpusOfThread()


class active_gpu:
    """Make a GPU the current one, and put back what was.

    A class, because what `contextlib` makes of a generator takes as long as allocating memory.

    Raises:
        DeviceError: there is no such GPU.
    """

    __slots__ = ("_before", "_index")

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> Device:
        before = _current_context()
        known = _gpus.known.get(self._index)
        if known is not None and before is not None and before == known[0]:
            self._before = None
            return known[1]
        check_index(self._index)
        self._before = before
        device = Device(self._index)
        device.set_current()
        _gpus.known[self._index] = _current_context(), device
        return device

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            driver.cuCtxSetCurrent(driver.CUcontext(self._before))


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


@lru_cache(maxsize=64)
def stream_on(device: int, handle: int) -> Stream:
    """The stream of that handle, to launch kernels on and to record events on; it does not own the handle."""
    return Stream.from_handle(handle)


def create_stream(device: Device) -> Stream:
    """A stream of our own, which waits for no other unless it is told to."""
    return device.create_stream()


def record_event(device: int, handle: int) -> Event:
    """The point that a stream has been asked to get to so far."""
    return stream_on(device, handle).record()


def timed_event() -> EventOptions:
    """How to record an event that keeps time, which has another name before cuda-core 1."""
    try:
        return EventOptions(timing_enabled=True)
    except TypeError:
        return EventOptions(enable_timing=True)


def stream_wait_event(stream: int, event: Event) -> None:
    """Let a stream wait for an event, without stopping the host."""
    _check(driver.cuStreamWaitEvent(stream, int(event.handle), 0))


@lru_cache
def supports_stream_write(index: int) -> bool:
    """Whether a stream of a GPU can write to pinned memory: not every system's driver lets it."""
    with active_gpu(index) as device:
        flag, stream = pinned(4).view(np.uint32), create_stream(device)
        flag[0] = 0
        code, *_ = driver.cuStreamWriteValue32(int(stream.handle), flag.ctypes.data, 1, 0)
        stream.sync()
        return code == driver.CUresult.CUDA_SUCCESS and bool(flag[0])


def raise_if_failed(stream: int) -> None:
    """Check that a stream has not failed; it may be busy.

    Raises:
        DeviceError: it has.
    """
    code, *_ = driver.cuStreamQuery(stream)
    if code != driver.CUresult.CUDA_ERROR_NOT_READY:
        _check((code,))


def context_of(device: Device) -> int:
    """The handle of what a thread must make current before it can use a GPU."""
    return int(device.context.handle)


def message_of(code: int) -> str:
    """What the driver calls an error."""
    return f"the CUDA driver says {driver.CUresult(code).name}"


def device_view(thing: Any, stream: int) -> DeviceBytes:
    """The device memory of an array, which is not copied; work on `stream` will wait for what fills it.

    Raises:
        DataError: it is not one contiguous piece.
    """
    found = StridedMemoryView.from_any_interface(thing, stream_ptr=stream or LEGACY_STREAM)
    shape, dtype = tuple(found.shape), found.dtype
    if dtype is None:
        raise DataError(f"cannot tell the element type of a {type(thing).__name__}")
    if found.strides is not None and found.size:
        expected = 1
        for extent, stride in zip(reversed(shape), reversed(found.strides), strict=True):
            if extent != 1 and stride != expected:
                raise DataError(f"the array of shape {shape} is not one contiguous piece of memory; make it so")
            expected *= extent
    pointer = int(found.ptr)
    n_bytes = int(found.size) * dtype.itemsize
    return DeviceBytes(pointer, n_bytes, _device_at(pointer, found.device_id), thing, dtype, shape, found.readonly)


def device_of(thing: Any) -> int:
    """Ordinal of the GPU on which an array lies."""
    n_devices()
    library = library_of(thing)
    if library is not None:
        return library.device_of(thing)
    if hasattr(thing, "__dlpack_device__"):
        return int(thing.__dlpack_device__()[1])
    return _device_at(int(thing.__cuda_array_interface__["data"][0]), 0)


def _device_at(pointer: int, claimed: int) -> int:
    # __cuda_array_interface__ does not say which GPU it speaks of; the driver knows.
    if pointer:
        ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        code, device = driver.cuPointerGetAttribute(ordinal, pointer)
        if code == driver.CUresult.CUDA_SUCCESS:
            return int(device)
    return max(claimed, 0)


class PoolMemory:
    """Memory of the GPU's pool. It goes back in the order of its stream, once every stream that has used it is done.

    Args:
        buffer: the memory.
        device: ordinal of its GPU.
        stream: handle of the stream in whose order it was allocated.
        keeper: what keeps that stream from being destroyed.
    """

    __slots__ = ("__weakref__", "_keeper", "_others", "buffer", "device", "stream")

    def __init__(self, buffer: Buffer, device: int, stream: int, keeper: Any) -> None:
        self.buffer, self.device, self.stream = buffer, device, stream
        self._keeper = keeper
        self._others: dict[int, tuple[Event | None, Any]] | None = None

    def used_on(self, stream: int) -> None:
        """Note that what another stream has been asked so far uses this memory."""
        # A CUDA graph that is being captured will use it whenever it is launched: its owner keeps the memory.
        if stream != self.stream and not is_capturing(stream):
            with allowed_in_capture():
                self._note(stream, record_event(self.device, stream), None)

    def lend(self, stream: int, keeper: Any) -> None:
        """Note that somebody may use this memory on another stream until it is dropped."""
        if stream != self.stream:
            self._note(stream, None, keeper)

    def _note(self, stream: int, event: Event | None, keeper: Any) -> None:
        if self._others is None:
            self._others = {}
        # Who may use it until it is dropped does so beyond any event.
        before = self._others.get(stream)
        if before is None or before[0] is not None:
            self._others[stream] = event, keeper

    def __del__(self) -> None:
        try:
            if self._others is None and _may_free(self.stream):
                return  # the buffer frees itself
            # Somebody may be capturing a CUDA graph on another stream.
            with allowed_in_capture():
                if capture_state(self.stream) == NOT_CAPTURING:
                    if self._others is not None:
                        self._wait_for_others()
                    self.buffer.close()
                    return
            # Freeing it now would become part of the graph.
            later = PoolMemory(self.buffer, self.device, self.stream, self._keeper)
            later._others = self._others
            _freed_in_capture.append(later)
        except Exception:  # noqa: S110 the interpreter is ending, and the memory goes with it
            pass

    def _wait_for_others(self) -> None:
        assert self._others is not None
        with active_gpu(self.device):
            for stream, (event, _) in self._others.items():
                if event is not None:
                    stream_wait_event(self.stream, event)
                elif not is_capturing(stream):
                    stream_wait_stream(self.stream, stream)


def _may_free(stream: int) -> bool:
    """Whether memory may go back in the order of a stream, as far as CUDA graphs are concerned."""
    return library_that_captures() is None and (not stream or capture_state(stream) == NOT_CAPTURING)


_freed_in_capture: list[PoolMemory] = []


class TorchMemory:
    """Memory of PyTorch's caching allocator, which orders its reuse."""

    __slots__ = ("__weakref__", "device", "stream", "tensor")

    def __init__(self, tensor: Any, device: int, stream: int) -> None:
        self.tensor, self.device, self.stream = tensor, device, stream

    def used_on(self, stream: int) -> None:
        """Note that what another stream has been asked so far uses this memory."""
        if stream != self.stream:
            TORCH.record_stream(self.tensor, self.device, stream)

    def lend(self, stream: int, keeper: Any) -> None:
        """Note that somebody may use this memory on another stream until it is dropped."""
        self.used_on(stream)


def allocate(n_bytes: int, device: Device, stream: int, keeper: Any = None) -> DeviceBytes:
    """Device memory from the GPU's pool, in the order of a stream.

    Raises:
        DeviceError: there is not enough.
    """
    if _freed_in_capture:
        _freed_in_capture[:] = []  # those that cannot be freed yet put themselves back
    resource, queue = device.memory_resource, stream_on(device.device_id, stream)
    try:
        # On the legacy stream it has been asked before: see `streams.stream_for`.
        if not stream or library_that_captures() is None:
            buffer = resource.allocate(n_bytes or 1, stream=queue)
        else:
            with allowed_in_capture():
                buffer = resource.allocate(n_bytes or 1, stream=queue)
    except Exception as error:
        if "OUT_OF_MEMORY" not in str(error):
            raise _driver_error(error) from error
        raise _out_of_memory(n_bytes, device) from error
    owner = PoolMemory(buffer, device.device_id, stream, keeper)
    return DeviceBytes(int(buffer.handle), n_bytes, device.device_id, owner)


def allocate_by_torch(n_bytes: int, device: Device, stream: int) -> DeviceBytes:
    """Device memory from PyTorch's caching allocator, in the order of PyTorch's current stream.

    Raises:
        DeviceError: there is not enough.
    """
    try:
        tensor = TORCH.empty(max(n_bytes, 1), device.device_id)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise _out_of_memory(n_bytes, device) from error
    owner = TorchMemory(tensor, device.device_id, stream)
    return DeviceBytes(int(tensor.data_ptr()), n_bytes, device.device_id, owner)


def launch_kernel(stream: Stream, config: LaunchConfig, kernel: Kernel, *arguments: int) -> None:
    """Queue a kernel.

    Raises:
        DeviceError: the driver refuses it.
    """
    try:
        launch(stream, config, kernel, *arguments)
    except Exception as error:
        raise _driver_error(error) from error


def _driver_error(error: Exception) -> DeviceError:
    return DeviceError(f"the CUDA driver says {str(error).partition(':')[0] or type(error).__name__}")


def _out_of_memory(n_bytes: int, device: Device) -> DeviceError:
    _, free, total = driver.cuMemGetInfo()
    return DeviceError(
        f"cuda:{device.device_id} is out of memory: {n_bytes:,} bytes were asked for, "
        f"{int(free):,} of {int(total):,} are free"
    )


_kept: deque[tuple[Event, Any]] = deque()
"""Objects whose memory streams still use, and the point after which they do not, oldest first."""


_kept_lock = threading.Lock()


def _make_lock_anew() -> None:
    global _kept_lock  # noqa: PLW0603 whoever held it at a fork does not exist in the child
    _kept_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_lock_anew)


def keep_until_done(device: int, stream: int, thing: Any) -> None:
    """Keep an object alive until a stream has done what it was asked so far; a later call lets go of it."""
    if is_capturing(stream):
        return
    done = []
    with _kept_lock, allowed_in_capture():
        while _kept and _kept[0][0].is_done:
            done.append(_kept.popleft())
        _kept.append((record_event(device, stream), thing))
    done.clear()  # without the lock: what is dropped may call us


def keeper_of(stream: int, device: int) -> tuple[bool, Any]:
    """Whether a stream is known to live on, and what keeps it alive: a legacy stream, or a library's current one."""
    if stream <= PER_THREAD_STREAM:
        return True, None
    for library in libraries_with_streams():
        if library.current_stream(device) == stream:
            return True, library.keeper(device)
    return False, None


NOT_CAPTURING, RELAXED_CAPTURE, IMPLICIT_CAPTURE = 0, 2, 906
"""A status, a mode and an error code of the driver's."""


def capture_state(stream: int) -> int:
    """`NOT_CAPTURING`, or the driver's status of a stream that is capturing a CUDA graph.

    `IMPLICIT_CAPTURE` says of the legacy stream that one which waits for it is capturing: it must not be used then.
    """
    status = ctypes.c_int()
    code: int = _calls().is_capturing(stream, ctypes.byref(status))
    return code or status.value


def is_capturing(stream: int) -> bool:
    """Whether a stream is capturing a CUDA graph, or, for the legacy stream, must not be used during a capture."""
    return capture_state(stream) != NOT_CAPTURING


class allowed_in_capture:
    """Let this thread allocate, free, load code and wait although a CUDA graph is being captured on another stream."""

    __slots__ = ("_exchange", "_mode")

    def __enter__(self) -> None:
        self._exchange, self._mode = _calls().exchange_capture_mode, ctypes.byref(ctypes.c_int(RELAXED_CAPTURE))
        self._exchange(self._mode)

    def __exit__(self, *error: object) -> None:
        self._exchange(self._mode)  # the driver has put the earlier mode there


def refuse_capture(stream: int, what: str) -> None:
    """Check that a stream is not capturing a CUDA graph, before something that no graph can hold.

    Raises:
        DeviceError: it is. The capture goes on.
    """
    if is_capturing(stream):
        raise DeviceError(f"a CUDA graph is being captured on this stream, and {what}")


def is_pinned(host: NDArray[Any]) -> bool:
    """Whether host memory is known to the GPU, which then reads it in its own time."""
    # The plural asks without an error where the driver does not know the address.
    kinds = [driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE]
    code, found = driver.cuPointerGetAttributes(len(kinds), kinds, host.ctypes.data)
    return bool(code == driver.CUresult.CUDA_SUCCESS and int(found[0]))


def pinned(n_bytes: int) -> NDArray[np.uint8]:
    """Host memory that a GPU reads at full speed; expensive to get, cheap to reuse."""
    return np.from_dlpack(LegacyPinnedMemoryResource().allocate(n_bytes)).view(np.uint8)


def copy_to_device(pointer: int, host: NDArray[np.uint8], stream: int) -> None:
    """Queue a copy of host memory to a device address."""
    _check(driver.cuMemcpyHtoDAsync(pointer, host.ctypes.data, host.nbytes, stream))


def copy_to_host(host: NDArray[Any], pointer: int, stream: int) -> None:
    """Copy device memory to a contiguous host array, and wait until it has arrived."""
    if host.size:
        _check(driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer, host.nbytes, stream))
        synchronize(stream)


def copy_on_device(target: int, fmt: int, n_bytes: int, stream: int) -> None:
    """Queue a copy within device memory."""
    _check(driver.cuMemcpyDtoDAsync(target, fmt, n_bytes, stream))


def memset(memory: DeviceBytes, value: int, stream: int) -> None:
    """Queue setting every byte to the same value."""
    _check(driver.cuMemsetD8Async(memory.pointer, value, memory.n_bytes, stream))


def synchronize(stream: int) -> None:
    """Wait until a stream has done all that was asked of it."""
    _check(driver.cuStreamSynchronize(stream))


def stream_wait_stream(waiting: int, awaited: int) -> None:
    """Let one stream wait for what has been asked of another so far, without stopping the host.

    Raises:
        DeviceError: the other is capturing a CUDA graph that this one is not part of.
    """
    if waiting == awaited:
        return
    states = capture_state(waiting), capture_state(awaited)
    if IMPLICIT_CAPTURE in states:
        raise DeviceError(
            "the legacy default stream cannot be used while a CUDA graph is captured on a stream that waits for it; "
            "capture on a non-blocking stream, or compute the data on the capturing stream before"
        )
    if states[0] == NOT_CAPTURING and states[1] != NOT_CAPTURING:
        raise DeviceError("the values are part of a CUDA graph that is being captured; use the capturing stream")
    if states[0] != NOT_CAPTURING and states[1] == NOT_CAPTURING:
        # A graph cannot wait for what is outside of it, so that must be done before.
        with allowed_in_capture():
            synchronize(awaited)
        return
    Stream.from_handle(waiting).wait(Stream.from_handle(awaited))


def export(
    memory: DeviceBytes, shape: tuple[int, ...], dtype: np.dtype[Any], max_version: tuple[int, int] | None
) -> object:
    """A DLPack capsule that shares memory of ours and keeps it alive."""
    is_bf16 = dtype.name == "bfloat16"
    kind = np.dtype(np.uint16) if is_bf16 else dtype
    piece = Buffer.from_handle(memory.pointer, memory.n_bytes, owner=memory.owner)
    whole = StridedMemoryView.from_buffer(piece, shape, itemsize=kind.itemsize, dtype=kind)
    capsule = whole.__dlpack__(stream=-1, max_version=max_version)
    if is_bf16:
        patch_dlpack_dtype(capsule)
    return capsule


def _check(result: tuple[Any, ...]) -> None:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the CUDA driver says {result[0].name}")
