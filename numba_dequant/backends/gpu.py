"""One GPU through `cuda.core`: memory, streams, events and launches."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
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

from numba_dequant.arguments import BYTES
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

FORKED = (
    "this process was forked after CUDA had started, and CUDA does not work in such a process; start it by the method "
    "'spawn' or 'forkserver' of multiprocessing"
)
_is_forked = False


@cache
def n_devices() -> int:
    """The number of GPUs that this process can use, at least one.

    Raises:
        DeviceError: there is no driver, no GPU, or the process was forked after CUDA had started.
    """
    if _is_forked:
        raise DeviceError(FORKED)
    try:
        code, *_ = driver.cuInit(0)
        if code == driver.CUresult.CUDA_SUCCESS:
            code, count = driver.cuDeviceGetCount()
            if code == driver.CUresult.CUDA_SUCCESS and count:
                return int(count)
    except RuntimeError:  # cuda.bindings found no driver library
        raise DeviceError("no NVIDIA driver was found") from None
    if code == driver.CUresult.CUDA_ERROR_NOT_INITIALIZED:  # another library had started CUDA
        raise DeviceError(FORKED)
    raise DeviceError(f"no GPU can be used ({code.name})")


class Gpu:
    """One GPU. Tests replace it in `OPEN` with an object that has the same methods.

    Streams are handles. Methods that take a stream require that this GPU is current: ``with gpu.active()``.

    Attributes:
        index: ordinal of the GPU.
        kernels: loaded kernels, stored here by the backend.
        idle_buffers: buffers of earlier loads, stored here by the loader.
    """

    def __init__(self, index: int) -> None:
        count = n_devices()
        if not 0 <= index < count:
            raise DeviceError(f"there is no device cuda:{index}; the number of GPUs is {count}, counted from cuda:0")
        self.index = index
        self.kernels: dict[Any, Any] = {}
        self.idle_buffers: list[Any] = []
        self._open_to: set[int] = set()

    def active(self) -> _Active:
        """Make this GPU current in this thread within a ``with`` block."""
        return _Active(self.index)

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Compute capability."""
        with self.active() as device:
            return device.compute_capability.major, device.compute_capability.minor

    @cached_property
    def processors(self) -> int:
        """The number of multiprocessors."""
        return self._attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)

    @cached_property
    def shared_memory(self) -> int:
        """Maximum bytes of shared memory of a thread block."""
        return self._attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)

    def _attribute(self, attribute: Any) -> int:
        result = driver.cuDeviceGetAttribute(attribute, self.index)
        _check(result)
        return int(result[1])

    @property
    def context(self) -> int:
        """The handle of the CUDA context of this GPU."""
        return int(Device(self.index).context.handle)

    @cached_property
    def thread_functions(self) -> Mapping[str, Any] | None:
        """Driver functions for native threads; None unless this is Linux and streams can write to pinned memory."""
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
        """Device memory from the GPU's pool, in stream order. `keeper` is an object that keeps the stream alive.

        Raises:
            DeviceError: there is not enough memory.
        """
        gpu_memory.free_deferred()
        pool, queue = self._pool, stream_on(self.index, stream)
        try:
            # `streams.stream_for` has checked this for the legacy stream.
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
            DeviceError: there is not enough memory.
        """
        memory: DeviceBytes = self.new_tensor((max(n_bytes, 1),), BYTES, stream)[1]
        memory.n_bytes = n_bytes
        return memory

    def new_tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: int) -> tuple[Any, DeviceBytes]:
        """A tensor of PyTorch, and its memory, in the order of PyTorch's current stream.

        Raises:
            DeviceError: there is not enough memory.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        try:
            tensor = TORCH.empty(shape, dtype.name, self.index)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise self._out_of_memory(n_bytes) from error
        return tensor, DeviceBytes(int(tensor.data_ptr()), n_bytes, self, TorchMemory(tensor, self, stream))

    def _out_of_memory(self, n_bytes: int) -> DeviceError:
        _, free, total = driver.cuMemGetInfo()
        return DeviceError(
            f"cuda:{self.index} is out of memory: {n_bytes:,} bytes are needed, "
            f"{int(free):,} of {int(total):,} are free"
        )

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Pinned host memory, which a GPU reads at full speed. Allocation is slow."""
        return np.from_dlpack(LegacyPinnedMemoryResource().allocate(n_bytes)).view(np.uint8)

    def copy_to_device(self, pointer: int, host: NDArray[np.uint8], stream: int) -> None:
        """Queue a copy of host memory to a device address."""
        _check(driver.cuMemcpyHtoDAsync(pointer, host.ctypes.data, host.nbytes, stream))

    def send(self, pointer: int, host: NDArray[np.uint8], stream: int) -> None:
        """Queue a copy of host memory to a device address; the caller may change the host memory afterwards.

        If the memory is pinned, the driver copies it later, so this method waits for the copy.
        """
        self.copy_to_device(pointer, host, stream)
        # Unlike cuPointerGetAttribute, this call accepts an address that is unknown to the driver.
        attributes = [driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE]
        code, values = driver.cuPointerGetAttributes(len(attributes), attributes, host.ctypes.data)
        if code == driver.CUresult.CUDA_SUCCESS and int(values[0]):
            self.synchronize(stream)

    def copy_to_host(self, host: NDArray[Any], pointer: int, stream: int) -> None:
        """Copy device memory to a contiguous host array, and wait for the copy."""
        if host.size:
            _check(driver.cuMemcpyDtoHAsync(host.ctypes.data, pointer, host.nbytes, stream))
            self.synchronize(stream)

    def copy_on_device(self, target: int, pointer: int, n_bytes: int, stream: int) -> None:
        """Queue a copy from `pointer` to `target` in device memory; `pointer` may be on another GPU."""
        _check(driver.cuMemcpyDtoDAsync(target, pointer, n_bytes, stream))

    def copy_columns(self, target: int, width: int, pointer: int, step: int, n_rows: int, stream: int) -> None:
        """Queue a copy of `width` bytes of each of `n_rows` rows to `target`, where they follow one another.

        The rows are `step` bytes long and may be on another GPU. The bytes of the first row start at `pointer`.
        """
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        copy.srcDevice, copy.srcPitch, copy.dstDevice, copy.dstPitch = pointer, step, target, width
        copy.WidthInBytes, copy.Height = width, n_rows
        _check(driver.cuMemcpy2DAsync(copy, stream))

    def open_to(self, other: Gpu) -> None:
        """Let another GPU copy directly from this one, if the machine can do that.

        Otherwise, the copies go through the host.
        """
        if other is self or other.index in self._open_to:
            return
        code, is_possible = driver.cuDeviceCanAccessPeer(other.index, self.index)
        _check((code,))
        if is_possible:
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = other.index
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            code, pool = driver.cuDeviceGetMemPool(self.index)
            _check((code,))
            _check(driver.cuMemPoolSetAccess(pool, [access], 1))
        self._open_to.add(other.index)

    def memset(self, memory: DeviceBytes, value: int, stream: int) -> None:
        """Queue a fill of all bytes with one value."""
        _check(driver.cuMemsetD8Async(memory.pointer, value, memory.n_bytes, stream))

    # Kernels

    def load_kernel(self, spec: KernelSpec, shared_memory: int = 0) -> Kernel:
        """The kernel, ready to launch; it is compiled if necessary.

        Args:
            spec: the kernel.
            shared_memory: the number of bytes of dynamic shared memory that a launch may have.
        """
        kernel = _load_kernel(spec, self.capability)
        if shared_memory:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuKernelSetAttribute(attribute, shared_memory, int(kernel.handle), self.index))
        return kernel

    def launch(
        self,
        kernel: Kernel,
        thread_blocks: int | tuple[int, int],
        threads: int,
        arguments: tuple[int, ...],
        stream: int,
        shared_bytes: int = 0,
        overlaps: bool = False,
    ) -> None:
        """Queue a kernel.

        Args:
            kernel: the kernel.
            thread_blocks: the number of thread blocks, or their numbers in two dimensions.
            threads: threads per thread block.
            arguments: addresses and numbers.
            stream: the handle of the stream.
            shared_bytes: bytes of dynamic shared memory per thread block.
            overlaps: let the kernel start before the preceding kernel has ended. It must wait by itself.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        try:
            config = _launch_config(thread_blocks, threads, shared_bytes, overlaps)
            launch(stream_on(self.index, stream), config, kernel, *arguments)
        except Exception as error:
            raise _driver_error(error) from error

    def launcher(
        self, kernel: Kernel, thread_blocks: int, threads: int, arguments: tuple[int, ...]
    ) -> Callable[[int], None]:
        """A function that queues one kernel again and again, on the stream that it is given; faster than `launch`."""
        index, config = self.index, _launch_config(thread_blocks, threads)

        def launch_again(stream: int) -> None:
            try:
                launch(stream_on(index, stream), config, kernel, *arguments)
            except Exception as error:
                raise _driver_error(error) from error

        return launch_again

    # Streams

    def create_stream(self) -> Stream:
        """A new non-blocking stream."""
        return Device(self.index).create_stream()

    def synchronize(self, stream: int) -> None:
        """Wait until a stream has done all queued work."""
        _check(driver.cuStreamSynchronize(stream))

    def raise_if_failed(self, stream: int) -> None:
        """Raise DeviceError if a stream has failed. This does not wait."""
        code, *_ = driver.cuStreamQuery(stream)
        if code != driver.CUresult.CUDA_ERROR_NOT_READY:
            _check((code,))

    def record_event(self, stream: int) -> Event:
        """An event after the work now queued on a stream."""
        return stream_on(self.index, stream).record()

    def stream_wait_event(self, stream: int, event: Event) -> None:
        """Let a stream wait for an event. The host does not wait."""
        _check(driver.cuStreamWaitEvent(stream, int(event.handle), 0))

    def wait_for_event(self, event: Event) -> None:
        """Let the host wait for an event, also while a CUDA graph is being captured."""
        with allowed_in_capture():
            event.sync()

    def stream_wait_stream(self, waiting: int, awaited: int) -> None:
        """Let one stream wait for the work now queued on another. The host waits only during a capture.

        Raises:
            DeviceError: `awaited` is capturing a CUDA graph, and `waiting` is not part of it; or one of them is the
                legacy default stream, and a blocking stream is capturing.
        """
        if waiting == awaited:
            return
        states = capture_state(waiting), capture_state(awaited)
        if IMPLICIT_CAPTURE in states:
            raise DeviceError(
                "the legacy default stream cannot be used while a blocking stream captures a CUDA graph; capture on a "
                "non-blocking stream, or compute the data on the capturing stream"
            )
        if states[0] == NOT_CAPTURING and states[1] != NOT_CAPTURING:
            raise DeviceError("the values are part of a CUDA graph that is being captured; use the capturing stream")
        if states[0] != NOT_CAPTURING and states[1] == NOT_CAPTURING:
            # A graph cannot wait for work outside of it, so the host waits before.
            with allowed_in_capture():
                self.synchronize(awaited)
            return
        Stream.from_handle(waiting).wait(Stream.from_handle(awaited))

    def refuse_capture(self, stream: int, reason: str) -> None:
        """Raise DeviceError before an operation that a CUDA graph cannot contain. The capture continues."""
        if is_capturing(stream):
            raise DeviceError(f"a CUDA graph is being captured on this stream, and {reason}")

    def keep_until_done(self, stream: int, array: Any) -> None:
        """Keep an array alive until a stream has done the work now queued. A later call of this method drops it.

        During a capture, this does nothing: the owner of the graph must keep the array.
        """
        if is_capturing(stream):
            return
        done = []
        with _kept_lock, allowed_in_capture():
            while _kept and _kept[0][0].is_done:
                done.append(_kept.popleft())
            _kept.append((self.record_event(stream), array))
        done.clear()  # after the lock is released, because dropping an array may call this method

    def keeper_of(self, stream: int) -> tuple[bool, Any]:
        """Whether it is known that a stream will not be destroyed, and the object that keeps it alive, if any."""
        if stream <= 2:  # the legacy and the per-thread default stream
            return True, None
        for library in libraries_with_streams():
            if library.current_stream(self.index) == stream:
                return True, library.keeper(self.index)
        return False, None


OPEN: dict[int, Gpu] = {}
"""The GPUs that this process has used, by ordinal."""


def gpu_at(index: int) -> Gpu:
    """The GPU with an ordinal. Raises DeviceError if there is no such GPU."""
    gpu = OPEN.get(index)
    return OPEN.setdefault(index, Gpu(index)) if gpu is None else gpu


class _ContextsOfThread(threading.local):
    """The context and the device object of each GPU that this thread has used, by ordinal."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int | None, Device]] = {}


_contexts = _ContextsOfThread()


class _Active:
    """The context manager of `Gpu.active`. `contextlib` would take as long as allocating memory."""

    __slots__ = ("_before", "_index")

    def __init__(self, index: int) -> None:
        self._index = index

    def __enter__(self) -> Device:
        if _is_forked:
            raise DeviceError(FORKED)
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
    """The `cuda.core` stream for a handle, which it does not own."""
    return Stream.from_handle(handle)


@lru_cache(maxsize=1024)
def _launch_config(
    thread_blocks: int | tuple[int, int], threads: int, shared_bytes: int = 0, overlaps: bool = False
) -> LaunchConfig:
    # Cached: creating one takes a fifth of the time of a launch.
    if overlaps:
        with suppress(TypeError):  # cuda-core before version 1.1 cannot launch kernels that overlap
            return LaunchConfig(
                grid=thread_blocks, block=threads, shmem_size=shared_bytes, programmatic_stream_serialization=True
            )
    return LaunchConfig(grid=thread_blocks, block=threads, shmem_size=shared_bytes)


@compiled_once
def _load_kernel(spec: KernelSpec, capability: tuple[int, int]) -> Kernel:
    with allowed_in_capture():
        name, code = compiler.cubin(spec, capability)
        return ObjectCode.from_cubin(code).get_kernel(name)


def timed_event() -> EventOptions:
    """Options for an event with timing; cuda-core before version 1 uses another name."""
    try:
        return EventOptions(timing_enabled=True)
    except TypeError:
        return EventOptions(enable_timing=True)


_kept: deque[tuple[Event, Any]] = deque()
"""Arrays that streams may still use, oldest first. After the event of an array, no stream uses it."""

_kept_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _is_forked, _kept_lock  # noqa: PLW0603 a thread that held the lock does not exist in the forked child
    _kept_lock = threading.Lock()
    _is_forked = _is_forked or n_devices.cache_info().currsize > 0
    n_devices.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def error_name(code: int) -> str:
    """The name of a driver error, for a message."""
    return f"the CUDA driver returned {driver.CUresult(code).name}"


def _driver_error(error: Exception) -> DeviceError:
    return DeviceError(f"the CUDA driver returned {str(error).partition(':')[0] or type(error).__name__}")


def _check(result: tuple[Any, ...]) -> None:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the CUDA driver returned {result[0].name}")
