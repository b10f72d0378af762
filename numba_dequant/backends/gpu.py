"""Dequantizing on a GPU: checks, memory and the launch, in the order of one stream."""

from __future__ import annotations

from functools import cache, lru_cache
from statistics import median
from typing import Any

import numpy as np
from cuda.core import Device, Kernel, LaunchConfig, ObjectCode, Stream
from numpy.typing import NDArray

from numba_dequant.arguments import check_output, host_bytes, is_on_gpu, result_shape
from numba_dequant.backends import cuda_driver, streams
from numba_dequant.backends.cuda_driver import DeviceBytes
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.streams import CallStream
from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.errors import DeviceError, DtypeError, OutputError
from numba_dequant.format import Format
from numba_dequant.interop import TORCH, library_of
from numba_dequant.kernels import compiler
from numba_dequant.kernels.compiler import KernelSpec
from numba_dequant.kernels.launch_shape import LaunchShape, launch_shape
from numba_dequant.locks import compiled_once

MAX_GRID = 2**31 - 1

NO_HOST_DATA = "data on the host cannot be part of it; copy the data to the GPU before the capture"


def dequantize(data: Any, fmt: Format, dtype: str, shape: Any, index: int, out: Any, stream: Any, mapping: str) -> Any:
    """What `numba_dequant.dequantize` does on CUDA device `index`."""
    call = streams.stream_for(stream, index, (data, out))
    if not isinstance(data, DeviceTensor) and not is_on_gpu(data):
        if not is_pinned_tensor(data):
            return load(host_bytes(data), fmt, dtype, shape, index, out, call, mapping)
        cuda_driver.refuse_capture(call.handle, NO_HOST_DATA)
        data = TORCH.to_gpu(data, index, call.handle)
    with cuda_driver.active_gpu(index) as device:
        memory = streams.memory_of(data, call)
        check_place(memory, device)
        n_elements = fmt.n_elements(memory.n_bytes)
        result, target = target_for(fmt, dtype, n_elements, shape, device, out, call, memory)
        dequantize_into(memory, fmt, dtype, n_elements, target, call.handle, mapping)
        streams.release(call, index, data, out)
        return result


def load(
    host: NDArray[np.uint8],
    fmt: Format,
    dtype: str,
    shape: Any,
    index: int,
    out: Any,
    call: CallStream,
    mapping: str = "tile",
) -> Any:
    """Dequantize bytes that lie on the host; their copy on the GPU is freed behind the kernel."""
    n_elements = fmt.n_elements(host.nbytes)
    with cuda_driver.active_gpu(index) as device:
        cuda_driver.refuse_capture(call.handle, NO_HOST_DATA)
        result, target = target_for(fmt, dtype, n_elements, shape, device, out, call)
        memory = _sent(host, device, call)
        dequantize_into(memory, fmt, dtype, n_elements, target, call.handle, mapping)
        streams.release(call, index, None, out)
        return result


def upload(host: NDArray[np.uint8], index: int, call: CallStream) -> DeviceTensor:
    """Bytes that lie on the host, as they are, on the GPU."""
    with cuda_driver.active_gpu(index) as device:
        memory = _sent(host, device, call)
        return DeviceTensor(memory, (host.nbytes,), cuda_driver.BYTES, call.handle, call.framework)


def _sent(host: NDArray[np.uint8], device: Device, call: CallStream) -> DeviceBytes:
    memory = cuda_driver.allocate(host.nbytes, device, call.handle, call.keeper)
    if host.nbytes:
        send(host, memory.pointer, call.handle)
    return memory


def is_pinned_tensor(data: Any) -> bool:
    """Whether data is a PyTorch tensor in pinned host memory."""
    return library_of(data) is TORCH and TORCH.is_pinned(data)


def send(host: NDArray[np.uint8], pointer: int, stream: int) -> None:
    """Queue the copy of host memory to a device address; the caller may change it afterwards.

    So this waits for the copy where the memory is pinned, which a GPU reads in its own time: nothing tells the owner
    of a NumPy array that it is still being read. A PyTorch tensor in pinned memory is copied by PyTorch, which does not
    wait (`Torch.to_gpu`).
    """
    cuda_driver.copy_to_device(pointer, host, stream)
    if cuda_driver.is_pinned(host):
        cuda_driver.synchronize(stream)


def target_for(
    fmt: Format,
    dtype: str,
    n_elements: int,
    shape: Any,
    device: Device,
    out: Any,
    call: CallStream,
    memory: DeviceBytes | None = None,
) -> tuple[Any, DeviceBytes]:
    """What to return, and the memory to write: those of `out`, or new ones once all is checked."""
    asked = result_shape(shape, n_elements, out)
    kind = fmt.result_dtype(dtype)
    check_capability(fmt, dtype, device.device_id)
    if out is not None:
        return out, checked_output(out, memory, kind, asked, n_elements, device, call)
    target = new_memory(n_elements * kind.itemsize, device, call)
    return DeviceTensor(target, asked, kind, call.handle, call.framework), target


def new_memory(n_bytes: int, device: Device, call: CallStream) -> DeviceBytes:
    """Memory for a result: from PyTorch's allocator on PyTorch's current stream, else from the GPU's pool.

    Raises:
        DeviceError: there is not enough, or a CUDA graph is being captured by somebody other than PyTorch.
    """
    if call.framework is TORCH:
        return cuda_driver.allocate_by_torch(n_bytes, device, call.handle)
    if call.handle:
        cuda_driver.refuse_capture(call.handle, "only PyTorch can allocate memory for it; pass out=")
    return cuda_driver.allocate(n_bytes, device, call.handle, call.keeper)


def check_place(memory: DeviceBytes, device: Device) -> None:
    """Check that data lies on the GPU that is to read it.

    Raises:
        DeviceError: it does not.
    """
    if memory.device != device.device_id:
        raise DeviceError(
            f"the data lies on cuda:{memory.device}, the device is cuda:{device.device_id}; copy it there first"
        )


def check_capability(fmt: Format, dtype: str, index: int) -> None:
    """Check that a GPU can convert to an output type.

    Raises:
        DtypeError: it cannot.
    """
    needed = OUTPUT_TYPES[dtype].capability
    if needed[0] and fmt.decode is not None and capability_of(index) < needed:
        least, found = (".".join(map(str, each)) for each in (needed, capability_of(index)))
        raise DtypeError(
            f"{dtype} needs a GPU of compute capability {least} or later, this one has {found}; use float16"
        )


def checked_output(
    out: Any,
    memory: DeviceBytes | None,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    n_elements: int,
    device: Device,
    call: CallStream,
) -> DeviceBytes:
    """The memory of the caller's `out`, which is right in every way for the result of reading `memory`.

    Raises:
        OutputError: it is not.
    """
    index = device.device_id
    if not isinstance(out, DeviceTensor):
        library = library_of(out)
        if not (is_on_gpu(out) if library is None else library.is_on_gpu(out)):
            raise OutputError(f"out is a {type(out).__name__} on the host, the device is cuda:{index}")
        if library is not None and not library.is_contiguous(out):
            raise OutputError("out is not contiguous; pass a contiguous array")
    target = streams.memory_of(out, call)
    if target.device != index:
        raise OutputError(f"out lies on cuda:{target.device}, the device is cuda:{index}")
    if target.is_readonly:
        raise OutputError("out is read-only")
    check_output(target.dtype, target.shape, dtype, shape, n_elements)
    if memory is not None and not (
        target.pointer + target.n_bytes <= memory.pointer or memory.pointer + memory.n_bytes <= target.pointer
    ):
        raise OutputError("out shares memory with data")
    return target


def dequantize_into(
    data: DeviceBytes, fmt: Format, dtype: str, n_elements: int, out: DeviceBytes, stream: int, mapping: str = "tile"
) -> None:
    """Queue the work that writes the values of `data` to `out`, both on the current device."""
    if not n_elements:
        return
    if fmt.stored_dtype is not None:
        cuda_driver.copy_on_device(out.pointer, data.pointer, out.n_bytes, stream)
        return
    target = out
    if out.pointer % 16:
        # The kernel stores 16 bytes at a time: an odd address gets its values by way of other memory.
        cuda_driver.refuse_capture(stream, "out lies at an address that is not a multiple of 16; pass one that does")
        target = cuda_driver.allocate(out.n_bytes, Device(data.device), stream)
    queue, kernel, shape = launcher(fmt, dtype, mapping, data.device, stream)
    step = MAX_GRID * shape.tile_elements
    for first in range(0, n_elements, step):
        count = min(step, n_elements - first)
        start = data.pointer + first // fmt.block_size * fmt.type_size
        place = target.pointer + first * (out.n_bytes // n_elements)
        cuda_driver.launch_kernel(
            queue, launch_config(shape.thread_blocks(count), shape.threads), kernel, start, count, place
        )
    if target is not out:
        cuda_driver.copy_on_device(out.pointer, target.pointer, out.n_bytes, stream)


@cache
def capability_of(index: int) -> tuple[int, int]:
    """Compute capability of a GPU."""
    with cuda_driver.active_gpu(index) as device:
        return device.compute_capability.major, device.compute_capability.minor


@lru_cache(maxsize=1024)
def launcher(fmt: Format, dtype: str, mapping: str, device: int, stream: int) -> tuple[Stream, Kernel, LaunchShape]:
    """What every launch of a kernel on a stream has in common."""
    kernel = load_kernel(compiler.dequantize_kernel(fmt, dtype, mapping), capability_of(device))
    return cuda_driver.stream_on(device, stream), kernel, launch_shape(mapping, fmt)


@lru_cache(maxsize=256)
def launch_config(thread_blocks: int, threads: int) -> LaunchConfig:
    """The shape of a launch; making one takes a fifth of the time that launching does."""
    return LaunchConfig(grid=thread_blocks, block=threads)


@compiled_once
def load_kernel(kernel: KernelSpec, capability: tuple[int, int]) -> Kernel:
    """A kernel ready to launch on GPUs of a compute capability, compiled if it must be."""
    with cuda_driver.allowed_in_capture():
        name, code = compiler.cubin(kernel, capability)
        return ObjectCode.from_cubin(code).get_kernel(name)


def time_kernel(
    data: NDArray[np.uint8], fmt: Format, dtype: str, shape: tuple[int, ...], index: int
) -> tuple[NDArray[Any], float]:
    """The values, on the host, and the seconds that the kernel took by the GPU's clock: the median of five."""
    with cuda_driver.active_gpu(index) as device:
        kind = fmt.result_dtype(dtype)
        n_elements = fmt.n_elements(data.nbytes)
        memory = cuda_driver.allocate(data.nbytes, device, 0)
        target = cuda_driver.allocate(n_elements * kind.itemsize, device, 0)
        if data.nbytes:
            send(data, memory.pointer, 0)
        stream = cuda_driver.stream_on(index, 0)
        seconds = []
        for _ in range(6):  # the first one compiles
            start = stream.record(options=cuda_driver.timed_event())
            dequantize_into(memory, fmt, dtype, n_elements, target, 0)
            end = stream.record(options=cuda_driver.timed_event())
            end.sync()
            seconds.append((end - start) / 1e3)
        return DeviceTensor(target, shape, kind, 0).copy_to_host(), median(seconds[1:])
