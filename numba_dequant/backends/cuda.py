"""The backend for a GPU: checks, memory and the launch, all ordered on one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import Job, host_bytes, is_on_gpu
from numba_dequant.backends import streams
from numba_dequant.backends.batch import Backend, Batch
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.devices import gpu_device
from numba_dequant.backends.foreign import device_of
from numba_dequant.backends.gpu import OPEN, Gpu, gpu_at, stream_on, timed_event
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.backends.matmul import ProductJob
from numba_dequant.backends.streams import CallStream
from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.errors import DeviceError, DtypeError, OutputError
from numba_dequant.format import Format
from numba_dequant.interop import TORCH, library_of
from numba_dequant.kernels.compiler import dequantize_kernel, rows_kernel
from numba_dequant.kernels.launch_shape import LaunchShape, launch_shape

MAX_GRID = 2**31 - 1

NO_HOST_DATA = "data on the host cannot be part of the graph; copy the data to the GPU before the capture"


def backend_of(data: Any) -> CudaBackend:
    """The backend for the GPU of an array.

    Raises:
        DeviceError: no GPU can be used.
    """
    if isinstance(data, DeviceTensor):
        return CudaBackend(data.memory.gpu)
    index = device_of(data)
    return CudaBackend(OPEN.get(index) or gpu_at(gpu_device(index).index))


class CudaBackend(Backend):
    """Computes on a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def dequantize(self, job: Job, stream: Any, mapping: str) -> Any:
        """The result of one job; the host does not wait for it."""
        data, gpu = job.data, self.gpu
        call = streams.stream_for(stream, gpu, (data, job.out))
        if not isinstance(data, DeviceTensor) and not is_on_gpu(data):
            if not is_pinned_tensor(data):
                return load(host_bytes(data), job, call, mapping)
            gpu.refuse_capture(call.handle, NO_HOST_DATA)
            data = TORCH.to_gpu(data, gpu.index, call.handle)
        with gpu.active():
            memory = streams.memory_of(data, call)
            if memory.gpu is not gpu:
                raise elsewhere(memory, gpu)
            job.measure(memory.n_bytes)
            result, target = output(job, call, memory)
            dequantize_into(memory, job, target, call.handle, mapping)
            streams.release(call, data=data, out=job.out)
            return result

    def prepare(self, jobs: Sequence[Job], stream: Any) -> Batch[Any]:
        """A batch, each run of which is one launch per format on the current stream of the caller."""
        from numba_dequant.backends import cuda_batch

        return cuda_batch.prepare(jobs, self.gpu, stream)

    def dequantize_many(self, jobs: Sequence[Job], stream: Any) -> dict[Any, Any]:
        """The results of many jobs; the host does not wait for them."""
        from numba_dequant.backends import cuda_batch

        return cuda_batch.dequantize(jobs, self.gpu, stream)

    def dequantize_usual(self, tensors: dict[Any, Any], dtype: str, stream: Any) -> dict[Any, Any] | None:
        """The results of many tensors if all of them are usual; the host does not wait for them."""
        from numba_dequant.backends import cuda_usual

        return cuda_usual.dequantize(tensors, dtype, self.gpu, stream)

    def matmul(self, given: ProductJob, stream: Any) -> Any:
        """The product; the host does not wait for it."""
        from numba_dequant.backends import cuda_matmul

        return cuda_matmul.multiply(self.gpu, given, stream)


def load(host: NDArray[np.uint8], job: Job, call: CallStream, mapping: str = "tile") -> Any:
    """Dequantize bytes in host memory. Their copy on the GPU is freed in stream order after the kernel."""
    job.measure(host.nbytes)
    with call.gpu.active():
        call.gpu.refuse_capture(call.handle, NO_HOST_DATA)
        result, target = output(job, call)
        dequantize_into(sent(host, call), job, target, call.handle, mapping)
        streams.release(call, out=job.out)
        return result


def upload(host: NDArray[np.uint8], job: Job, call: CallStream) -> Any:
    """Copy bytes in host memory to the GPU: to `out`, or to new memory."""
    with call.gpu.active():
        result, target = output(job, call)
        if host.nbytes:
            call.gpu.send(target.pointer, host, call.handle)
        streams.release(call, out=job.out)
        return result


def sent(host: NDArray[np.uint8], call: CallStream) -> DeviceBytes:
    """Temporary memory on the GPU, to which bytes in host memory are copied."""
    memory = call.gpu.allocate(host.nbytes, call.handle, call.keeper)
    if host.nbytes:
        call.gpu.send(memory.pointer, host, call.handle)
    return memory


def is_pinned_tensor(data: Any) -> bool:
    """Whether data is a PyTorch tensor in pinned memory. PyTorch copies it without waiting (`Torch.to_gpu`)."""
    return library_of(data) is TORCH and TORCH.is_pinned(data)


def output(job: Job, call: CallStream, data: DeviceBytes | None = None) -> tuple[Any, DeviceBytes]:
    """The result to return, and the memory to write to: that of `out`, or new memory, after all checks."""
    check_capability(job.dtype, job.fmt, call.gpu)
    if job.out is not None:
        return job.out, checked_output(job, call, data)
    dtype = job.result_dtype
    if call.returns_tensors:
        tensor, target = call.gpu.new_tensor(job.shape, dtype, call.handle)
        return tensor, target
    target = new_memory(job.n_elements * dtype.itemsize, call)
    return DeviceTensor(target, job.shape, dtype, call.handle, call.framework), target


def new_memory(n_bytes: int, call: CallStream) -> DeviceBytes:
    """Memory for a result: from PyTorch's allocator on PyTorch's current stream, otherwise from the GPU's pool.

    Raises:
        DeviceError: there is not enough, or a CUDA graph is being captured without PyTorch.
    """
    if call.framework is TORCH:
        return call.gpu.allocate_by_torch(n_bytes, call.handle)
    if call.handle:
        call.gpu.refuse_capture(call.handle, "only PyTorch can allocate memory for the graph; pass out=")
    return call.gpu.allocate(n_bytes, call.handle, call.keeper)


def elsewhere(memory: DeviceBytes, gpu: Gpu) -> DeviceError:
    """The error for data on a different GPU from the one that computes."""
    return DeviceError(
        f"the data is on cuda:{memory.gpu.index}, but the device is cuda:{gpu.index}; copy it there first"
    )


def check_capability(dtype: str | None, fmt: Format, gpu: Gpu) -> None:
    """Raise DtypeError if the GPU does not support the output type of a format."""
    if dtype is None:
        return
    needed = OUTPUT_TYPES[dtype].capability
    if needed[0] and fmt.decode is not None and gpu.capability < needed:
        least, actual = (".".join(map(str, version)) for version in (needed, gpu.capability))
        raise DtypeError(
            f"{dtype} needs a GPU of compute capability {least} or later, but this GPU has {actual}; use float16"
        )


def checked_output(job: Job, call: CallStream, data: DeviceBytes | None = None) -> DeviceBytes:
    """The memory of the caller's `out`, after all checks.

    Raises:
        OutputError: the result cannot be written to `out`, or `out` overlaps `data`.
    """
    out, index = job.out, call.gpu.index
    if not isinstance(out, DeviceTensor):
        library = library_of(out)
        if not (is_on_gpu(out) if library is None else library.is_on_gpu(out)):
            raise OutputError(
                f"out is a {type(out).__name__} on the host, but the device is cuda:{index}; pass an array on that GPU"
            )
        if library is not None and not library.is_contiguous(out):
            raise OutputError("out is not C-contiguous; pass a C-contiguous array")
        problem = library.why_not_written(out) if library is not None else None
        if problem is not None:
            raise OutputError(f"cannot write to out: {problem}")
    target = streams.memory_of(out, call)
    if target.gpu is not call.gpu:
        raise OutputError(
            f"out is on cuda:{target.gpu.index}, but the device is cuda:{index}; pass an array on that GPU"
        )
    if target.is_readonly:
        raise OutputError("out is read-only; pass a writable array")
    job.check_output(target.dtype, target.shape)
    if data is not None and not (
        target.pointer + target.n_bytes <= data.pointer or data.pointer + data.n_bytes <= target.pointer
    ):
        raise OutputError("out shares memory with data; pass another array")
    return target


def dequantize_into(data: DeviceBytes, job: Job, out: DeviceBytes, stream: int, mapping: str = "tile") -> None:
    """Queue the kernel that writes the values of `data` to `out`; both are on the current GPU."""
    if not job.n_elements:
        return
    fmt, gpu = job.fmt, data.gpu
    if fmt.stored_dtype is not None:
        gpu.copy_on_device(out.pointer, data.pointer, out.n_bytes, stream)
        return
    target = out
    if out.pointer % 16:
        # The kernel stores 16 bytes at a time, so a misaligned output is written through temporary memory.
        gpu.refuse_capture(stream, "the address of out is not a multiple of 16; pass an aligned array")
        target = gpu.allocate(out.n_bytes, stream)
    assert job.dtype is not None
    launch_kernel(gpu, fmt, job.dtype, (data.pointer, job.n_elements, target.pointer), stream, mapping)
    if target is not out:
        gpu.copy_on_device(out.pointer, target.pointer, out.n_bytes, stream)


def launch_kernel(
    gpu: Gpu, fmt: Format, dtype: str, arguments: tuple[int, int, int], stream: int, mapping: str = "tile"
) -> None:
    """Queue the kernel of a format on the current GPU.

    Args:
        gpu: the current GPU.
        fmt: a format with a kernel.
        dtype: the output type.
        arguments: address of the blocks, number of elements, and address of the output, a multiple of 16.
        stream: the handle of the stream.
        mapping: as for `numba_dequant.dequantize`.
    """
    kernel, shape = gpu.kernels.get((fmt, dtype, mapping)) or kernel_for(fmt, dtype, gpu, mapping)
    data, n_elements, out = arguments
    step = MAX_GRID * shape.tile_elements
    if n_elements <= step:
        gpu.launch(kernel, shape.thread_blocks(n_elements), shape.threads, arguments, stream)
        return
    for first in range(0, n_elements, step):
        count = min(step, n_elements - first)
        start = data + first // fmt.block_size * fmt.type_size
        end = out + first * fmt.result_dtype(dtype).itemsize
        gpu.launch(kernel, shape.thread_blocks(count), shape.threads, (start, count, end), stream)


def launch_rows(
    gpu: Gpu, fmt: Format, dtype: str, arguments: tuple[int, int, int, int, int], n: int, stream: int
) -> None:
    """Queue the kernel that writes the values of some rows, on the current GPU.

    Args:
        gpu: the current GPU.
        fmt: a format with a kernel.
        dtype: the output type.
        arguments: address of the blocks, number of rows, address of the indices (int64), elements of a row (a multiple
            of 8), and address of the output, a multiple of 16.
        n: the number of indices, at least 1.
        stream: the handle of the stream.
    """
    kernel: tuple[Any, LaunchShape] | None = gpu.kernels.get((fmt, dtype, "rows"))
    if kernel is None:
        check_capability(dtype, fmt, gpu)
        kernel = gpu.kernels[fmt, dtype, "rows"] = gpu.load_kernel(rows_kernel(fmt, dtype)), launch_shape("tile", fmt)
    loaded, shape = kernel
    gpu.launch(loaded, (n, shape.thread_blocks(arguments[3])), shape.threads, arguments, stream)


def kernel_for(fmt: Format, dtype: str, gpu: Gpu, mapping: str = "tile") -> tuple[Any, LaunchShape]:
    """The kernel of a format, ready to launch, and its launch shape.

    Raises:
        DtypeError: the GPU does not support the output type.
    """
    kernel: tuple[Any, LaunchShape] | None = gpu.kernels.get((fmt, dtype, mapping))
    if kernel is None:
        check_capability(dtype, fmt, gpu)
        kernel = gpu.load_kernel(dequantize_kernel(fmt, dtype, mapping)), launch_shape(mapping, fmt)
        gpu.kernels[fmt, dtype, mapping] = kernel
    return kernel


def time_kernel(data: NDArray[np.uint8], job: Job, gpu: Gpu) -> tuple[NDArray[Any], float]:
    """The values, copied to the host, and the time of the kernel on the GPU in seconds, the median of five runs."""
    from statistics import median  # takes longer to import than this module

    job.measure(data.nbytes)
    with gpu.active():
        call = CallStream(gpu)
        result, target = output(job, call)
        memory = sent(data, call)
        stream = stream_on(gpu.index, 0)
        seconds = []
        for _ in range(6):  # the first one compiles
            start = stream.record(options=timed_event())
            dequantize_into(memory, job, target, 0)
            end = stream.record(options=timed_event())
            end.sync()
            seconds.append((end - start) / 1e3)
        return result.copy_to_host(), median(seconds[1:])
