"""One GPU through `cuda.core`: its memory, streams, events and launches. It knows no format."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import (
    Device,
    Event,
    EventOptions,
    Kernel,
    LaunchConfig,
    LegacyPinnedMemoryResource,
    ObjectCode,
    Stream,
    launch,
)
from numpy.typing import NDArray

from numba_dequant.backends import gpu_memory
from numba_dequant.backends.capture import (
    IMPLICIT_CAPTURE,
    NOT_CAPTURING,
    allowed_in_capture,
    capture_state,
    current_context,
    is_capturing,
)
from numba_dequant.backends.gpu_memory import DeviceBytes, PoolMemory, TorchMemory
from numba_dequant.errors import DeviceError
from numba_dequant.interop import TORCH, libraries_with_streams, library_that_captures
from numba_dequant.kernels import compiler
from numba_dequant.kernels.compiler import KernelSpec
from numba_dequant.locks import compiled_once


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


class Gpu:
    """One GPU. Tests put an object with the same methods in its place, by `OPEN`.

    A stream is given by its handle. Methods that take one expect this GPU to be current: ``with gpu.active()``.

    Attributes:
        index: ordinal of the GPU.
        kernels: those that have been used, kept here by the backend.
        idle_buffers: those of earlier loads, kept here by the loader.
    """

    def __init__(self, index: int) -> None:
        count = n_devices()
        if not 0 <= index < count:
            raise DeviceError(f"there is no device cuda:{index}; this process sees {count}, from cuda:0 on")
        self.index = index
        self.kernels: dict[Any, Any] = {}
        self.idle_buffers: list[Any] = []

    def active(self) -> _Active:
        """Make this GPU the current one of this thread within a ``with`` block, and restore the previous one."""
        return _Active(self.index)

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        with self.active() as device:
            return device.compute_capability.major, device.compute_capability.minor

    @property
    def context(self) -> int:
        """The handle of what a thread must make current before it can use this GPU."""
        return int(Device(self.index).context.handle)

    @cached_property
    def thread_functions(self) -> Mapping[str, Any] | None:
        """Functions of the driver for threads without Python; None where the system or the driver lacks what they need.

        That is Linux, and a driver by which a stream can write to pinned memory.
        """
        if sys.platform != "linux":
            return None
        with self.active():
            flag, stream = self.pinned(4).view(np.uint32), self.create_stream()
            flag[0] = 0
            code, *_ = driver.cuStreamWriteValue32(int(stream.handle), flag.ctypes.data, 1, 0)
            stream.sync()
        if code != driver.CUresult.CUDA_SUCCESS or not flag[0]:
            return None
        library = ctypes.CDLL("libcuda.so.1")
        return {
            "set_context": library.cuCtxSetCurrent,
            "let_gpu_wait": library.cuStreamWaitEvent,
            "copy": library.cuMemcpyHtoDAsync_v2,
            "launch": library.cuLaunchKernel,
            "signal": library.cuStreamWriteValue32_v2,
        }

    # Memory

    @cached_property
    def _pool(self) -> Any:
        return Device(self.index).memory_resource

    def allocate(self, n_bytes: int, stream: int, keeper: Any = None) -> DeviceBytes:
        """Device memory from the GPU's pool, in the order of a stream, which `keeper` keeps from being destroyed.

        Raises:
            DeviceError: there is not enough.
        """
        gpu_memory.free_deferred()
        pool, queue = self._pool, stream_on(self.index, stream)
        try:
            # For the legacy stream `streams.stream_for` has checked it.
            if not stream or library_that_captures() is None:
                buffer = pool.allocate(n_bytes or 1, stream=queue)
            else:
                with allowed_in_capture():
                    buffer = pool.allocate(n_bytes or 1, stream=queue)
        except Exception as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise _driver_error(error) from error
            raise self._out_of_memory(n_bytes) from error
        return DeviceBytes(int(buffer.handle), n_bytes, self, PoolMemory(buffer, self, stream, keeper))

    def allocate_by_torch(self, n_bytes: int, stream: int) -> DeviceBytes:
        """Device memory from PyTorch's caching allocator, in the order of PyTorch's current stream.

        Raises:
            DeviceError: there is not enough.
        """
        try:
            tensor = TORCH.empty(max(n_bytes, 1), self.index)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise self._out_of_memory(n_bytes) from error
        return DeviceBytes(int(tensor.data_ptr()), n_bytes, self, TorchMemory(tensor, self, stream))

    def _out_of_memory(self, n_bytes: int) -> DeviceError:
        _, free, total = driver.cuMemGetInfo()
        return DeviceError(
            f"cuda:{self.index} is out of memory: {n_bytes:,} bytes were asked for, "
            f"{int(free):,} of {int(total):,} are free"
        )

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Host memory that a GPU reads at full speed; expensive to get, cheap to reuse."""
        return np.from_dlpack(LegacyPinnedMemoryResource().allocate(n_bytes)).view(np.uint8)

    def copy_to_device(self, pointer: int, host: NDArray[np.uint8], stream: int) -> None:
        """Queue a copy of host memory to a device address."""
        _check(driver.cuMemcpyHtoDAsync(pointer, host.ctypes.data, host.nbytes, stream))

    def send(self, pointer: int, host: NDArray[np.uint8], stream: int) -> None:
        """Queue a copy of host memory to a device address; the caller may change the host memory afterwards.

        So this waits for the copy where the memory is pinned, which a GPU reads in its own time: nothing tells the
        owner of a NumPy array that it is still being read.
        """
        self.copy_to_device(pointer, host, stream)
        # The plural asks without an error where the driver does not know the address.
        kinds = [driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE]
        code, values = driver.cuPointerGetAttributes(len(kinds), kinds, host.ctypes.data)
        if code == driver.CUresult.CUDA_SUCCESS and int(values[0]):
            self.synchronize(stream)

    def copy_to_host(self, host: NDArray[Any], pointer: int, stream: int) -> None:
        """Copy device memory to a contiguous host array, and wait until it has arrived."""
        if host.size:
            _check(driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer, host.nbytes, stream))
            self.synchronize(stream)

    def copy_on_device(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        """Queue a copy within device memory."""
        _check(driver.cuMemcpyDtoDAsync(target, source, n_bytes, stream))

    def memset(self, memory: DeviceBytes, value: int, stream: int) -> None:
        """Queue setting every byte to the same value."""
        _check(driver.cuMemsetD8Async(memory.pointer, value, memory.n_bytes, stream))

    # Kernels

    def load_kernel(self, spec: KernelSpec) -> Kernel:
        """A kernel that is ready to launch, compiled if it must be."""
        return _load_kernel(spec, self.capability)

    def launch(self, kernel: Kernel, thread_blocks: int, threads: int, arguments: tuple[int, ...], stream: int) -> None:
        """Queue a kernel.

        Raises:
            DeviceError: the driver refuses it.
        """
        try:
            launch(stream_on(self.index, stream), _launch_config(thread_blocks, threads), kernel, *arguments)
        except Exception as error:
            raise _driver_error(error) from error

    # Streams

    def create_stream(self) -> Stream:
        """A new stream, which waits for no other unless it is told to."""
        return Device(self.index).create_stream()

    def synchronize(self, stream: int) -> None:
        """Wait until a stream has done all its work."""
        _check(driver.cuStreamSynchronize(stream))

    def raise_if_failed(self, stream: int) -> None:
        """Check that a stream has not failed; it may be busy.

        Raises:
            DeviceError: it has.
        """
        code, *_ = driver.cuStreamQuery(stream)
        if code != driver.CUresult.CUDA_ERROR_NOT_READY:
            _check((code,))

    def record_event(self, stream: int) -> Event:
        """The point that the work queued so far on a stream ends at."""
        return stream_on(self.index, stream).record()

    def stream_wait_event(self, stream: int, event: Event) -> None:
        """Let a stream wait for an event, without stopping the host."""
        _check(driver.cuStreamWaitEvent(stream, int(event.handle), 0))

    def wait_for_event(self, event: Event) -> None:
        """Stop the host until an event has happened, even while a CUDA graph is being captured."""
        with allowed_in_capture():
            event.sync()

    def stream_wait_stream(self, waiting: int, awaited: int) -> None:
        """Let one stream wait for the work queued so far on another, without stopping the host.

        Raises:
            DeviceError: the other is capturing a CUDA graph that this one is not part of.
        """
        if waiting == awaited:
            return
        states = capture_state(waiting), capture_state(awaited)
        if IMPLICIT_CAPTURE in states:
            raise DeviceError(
                "the legacy default stream cannot be used while a CUDA graph is captured on a stream that waits for "
                "it; capture on a non-blocking stream, or compute the data on the capturing stream before"
            )
        if states[0] == NOT_CAPTURING and states[1] != NOT_CAPTURING:
            raise DeviceError("the values are part of a CUDA graph that is being captured; use the capturing stream")
        if states[0] != NOT_CAPTURING and states[1] == NOT_CAPTURING:
            # A graph cannot wait for what is outside of it, so that must be done before.
            with allowed_in_capture():
                self.synchronize(awaited)
            return
        Stream.from_handle(waiting).wait(Stream.from_handle(awaited))

    def refuse_capture(self, stream: int, what: str) -> None:
        """Check that a stream is not capturing a CUDA graph, before something that no graph can hold.

        Raises:
            DeviceError: it is. The capture goes on.
        """
        if is_capturing(stream):
            raise DeviceError(f"a CUDA graph is being captured on this stream, and {what}")

    def keep_until_done(self, stream: int, thing: Any) -> None:
        """Keep an object alive until a stream has done the work queued so far; a later call lets go of it."""
        if is_capturing(stream):
            return
        done = []
        with _kept_lock, allowed_in_capture():
            while _kept and _kept[0][0].is_done:
                done.append(_kept.popleft())
            _kept.append((self.record_event(stream), thing))
        done.clear()  # without the lock: what is dropped may call us

    def keeper_of(self, stream: int) -> tuple[bool, Any]:
        """Whether a stream is known to live on, and what keeps it alive: a legacy one, or a library's current one."""
        if stream <= 2:  # the legacy and the per-thread default stream
            return True, None
        for library in libraries_with_streams():
            if library.current_stream(self.index) == stream:
                return True, library.keeper(self.index)
        return False, None


OPEN: dict[int, Gpu] = {}
"""The GPUs that this process has used, by ordinal."""


def gpu_at(index: int) -> Gpu:
    """The GPU of that ordinal.

    Raises:
        DeviceError: there is none.
    """
    gpu = OPEN.get(index)
    return OPEN.setdefault(index, Gpu(index)) if gpu is None else gpu


class _ContextsOfThread(threading.local):
    """By ordinal, a GPU that this thread has used, and the context that is current while it does."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int | None, Device]] = {}


_contexts = _ContextsOfThread()


class _Active:
    """What `Gpu.active` returns: a class, because `contextlib` takes as long as allocating memory."""

    __slots__ = ("_before", "_index")

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> Device:
        before = current_context()
        known = _contexts.known.get(self._index)
        if known is not None and before is not None and before == known[0]:
            self._before = None
            return known[1]
        self._before = before
        device = Device(self._index)
        device.set_current()
        _contexts.known[self._index] = current_context(), device
        return device

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            driver.cuCtxSetCurrent(driver.CUcontext(self._before))


@lru_cache(maxsize=64)
def stream_on(index: int, handle: int) -> Stream:
    """The stream of that handle as `cuda.core` has it; it does not own the handle."""
    return Stream.from_handle(handle)


@lru_cache(maxsize=256)
def _launch_config(thread_blocks: int, threads: int) -> LaunchConfig:
    # Making one takes a fifth of the time that launching does.
    return LaunchConfig(grid=thread_blocks, block=threads)


@compiled_once
def _load_kernel(spec: KernelSpec, capability: tuple[int, int]) -> Kernel:
    with allowed_in_capture():
        name, code = compiler.cubin(spec, capability)
        return ObjectCode.from_cubin(code).get_kernel(name)


def timed_event() -> EventOptions:
    """How to record an event that keeps time, which has another name before cuda-core 1."""
    try:
        return EventOptions(timing_enabled=True)
    except TypeError:
        return EventOptions(enable_timing=True)


_kept: deque[tuple[Event, Any]] = deque()
"""Objects whose memory streams still use, and the point after which they do not, oldest first."""

_kept_lock = threading.Lock()


def _renew_lock() -> None:
    global _kept_lock  # noqa: PLW0603 whoever held it at a fork does not exist in the child
    _kept_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def error_name(code: int) -> str:
    """What the driver calls an error."""
    return f"the CUDA driver says {driver.CUresult(code).name}"


def _driver_error(error: Exception) -> DeviceError:
    return DeviceError(f"the CUDA driver says {str(error).partition(':')[0] or type(error).__name__}")


def _check(result: tuple[Any, ...]) -> None:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the CUDA driver says {result[0].name}")
