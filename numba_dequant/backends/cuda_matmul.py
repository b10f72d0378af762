"""`matmul` on a GPU: with the tensor cores, or with dequantized pieces of the weight and PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import Job, flat_bytes, is_on_gpu
from numba_dequant.backends import cuda, cuda_product, streams
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.foreign import export
from numba_dequant.backends.gpu import Gpu
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.backends.matmul import ProductJob, float_type, host_argument, with_argument_name
from numba_dequant.backends.streams import CallStream
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DataError, DeviceError, OutputError
from numba_dequant.formats import FORMATS
from numba_dequant.interop import TORCH

PIECE = 1 << 28
"""Elements of the weight that are dequantized together for PyTorch."""

FORMAT_OF = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""The formats of the output types: their kernels convert one type to another."""


@dataclass(slots=True)
class _Operand:
    """An array of the call.

    Attributes:
        name: the name of the argument.
        array: the array. None after a NumPy array or another buffer on the host has been copied to the GPU.
        host: the elements, if they are on the host and must be copied to the GPU.
        on_gpu: the memory on the GPU; None until the elements are there.
    """

    name: str
    array: Any
    host: NDArray[Any] | None
    on_gpu: DeviceBytes | None

    @property
    def layout(self) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """The shape, the dtype and the size in bytes."""
        if self.on_gpu is not None:
            return self.on_gpu.shape, self.on_gpu.dtype, self.on_gpu.n_bytes
        assert self.host is not None
        return self.host.shape, self.host.dtype, self.host.nbytes

    def sent(self, call: CallStream) -> DeviceBytes:
        """The memory on the GPU; an array on the host is copied to it."""
        if self.on_gpu is None:
            assert self.host is not None
            if cuda.is_pinned_tensor(self.array):
                self.array = TORCH.to_gpu(self.array, call.gpu.index, call.handle)
                self.on_gpu = streams.memory_of(self.array, call)
            else:
                self.array, self.on_gpu = None, cuda.sent(flat_bytes(self.host), call)
            self.host = None
        return self.on_gpu


def multiply(gpu: Gpu, given: ProductJob, stream: Any) -> Any:
    """The product; see `numba_dequant.matmul`. The host does not wait for it."""
    call = streams.stream_for(stream, gpu, (given.x, given.weight, given.bias, given.out))
    with gpu.active():
        x, weight = _operand("x", given.x, call), _operand("weight", given.weight, call)
        bias = None if given.bias is None else _operand("bias", given.bias, call)
        (x_shape, x_dtype, _), n_bytes = x.layout, weight.layout[2]
        x_type, bias_type = float_type(x_dtype, "x"), None if bias is None else float_type(bias.layout[1], "bias")
        job = given.measure(x_shape, x_type, n_bytes, None if bias is None else bias.layout[0])
        operands = [each for each in (x, weight, bias) if each is not None]
        is_empty = not job.n_elements or not given.n_elements
        address = 0 if weight.on_gpu is None else weight.on_gpu.pointer
        reason = None if is_empty else cuda_product.why_not(gpu, given.fmt, x_type, address)
        # cuBLAS would round a result of another type than x twice.
        is_slower = given.dtype == x_type and cuda_product.is_slower(gpu, given.n_rows, given.n_columns)
        if reason is not None:
            _check_fallback(gpu, given, x_type, reason)
        result, target = cuda.output(job, call)
        if given.out is not None:
            _check_output(target, operands)
        if job.n_elements:
            task = _Task(given, job, call, target, x_type, bias_type)
            if is_empty:
                task.write_bias(bias)
            elif reason is None and not (is_slower and TORCH.can_compute()):
                task.multiply(x, weight, bias)
            else:
                task.multiply_by_torch(x, weight, bias)
        for each in operands:
            if each.array is not None and each.on_gpu is not None:
                streams.release(call, data=each.array)
        streams.release(call, out=given.out)
        return result


def _operand(name: str, array: Any, call: CallStream) -> _Operand:
    if not isinstance(array, DeviceTensor) and not is_on_gpu(array):
        host = host_argument(array, name)
        call.gpu.refuse_capture(call.handle, cuda.NO_HOST_DATA)
        return _Operand(name, array, host, None)
    try:
        memory = streams.memory_of(array, call)
    except DataError as error:
        raise with_argument_name(error, name) from error
    if memory.gpu is not call.gpu:
        index = call.gpu.index
        raise DeviceError(f"{name} is on cuda:{memory.gpu.index}, but the device is cuda:{index}; copy it there first")
    return _Operand(name, array, None, memory)


def _check_fallback(gpu: Gpu, given: ProductJob, x_type: str, reason: str) -> None:
    """Raise an error if PyTorch cannot multiply dequantized pieces instead.

    Raises:
        DeviceError: the program has not imported PyTorch, or PyTorch cannot use a GPU.
        DtypeError: the GPU does not support the type in which PyTorch would multiply.
    """
    if not TORCH.can_compute():
        convert = "convert x to float16, or " if x_type == "float32" else ""
        raise DeviceError(
            f"cuda:{gpu.index} cannot multiply this weight while it is compressed, because {reason}; {convert}import "
            "PyTorch with CUDA before this call, which then multiplies dequantized pieces"
        )
    assert given.dtype is not None
    cuda.check_capability(_computing_type(x_type, given.dtype), given.fmt, gpu)


def _check_output(target: DeviceBytes, operands: list[_Operand]) -> None:
    for each in operands:
        memory = each.on_gpu
        if memory is None or memory.pointer >= target.pointer + target.n_bytes:
            continue
        if target.pointer < memory.pointer + memory.n_bytes:
            raise OutputError(f"out shares memory with {each.name}; pass another array")
    if target.pointer % target.dtype.itemsize:
        raise OutputError(f"the address of out is not a multiple of {target.dtype.itemsize}; pass an aligned array")


def _computing_type(x_type: str, dtype: str) -> str:
    """The type in which PyTorch multiplies: that of `x` if the result has it too, otherwise float32."""
    return x_type if x_type == dtype else "float32"


class _Task:
    """A product whose arguments are checked, on the current GPU.

    Args:
        given: the job, with its sizes.
        job: the job that describes the result.
        call: the stream.
        target: the memory for the result.
        x_type: the type of the columns.
        bias_type: the type of the bias, if there is one.
    """

    def __init__(
        self, given: ProductJob, job: Job, call: CallStream, target: DeviceBytes, x_type: str, bias_type: str | None
    ) -> None:
        assert job.dtype is not None
        self.given, self.call, self.target, self.dtype = given, call, target, job.dtype
        self.x_type, self.bias_type = x_type, bias_type
        self._memory: list[DeviceBytes] = []  # freed in the order of the stream

    def multiply(self, x: _Operand, weight: _Operand, bias: _Operand | None) -> None:
        """Queue the kernels that multiply the compressed weight."""
        given, call = self.given, self.call
        columns = self._aligned(x.sent(call), 16)
        added = 0
        if bias is not None and self.bias_type is not None:
            added = self._aligned(bias.sent(call), numpy_dtype(self.bias_type).itemsize)
        operands = cuda_product.Operands(
            given.fmt, weight.sent(call).pointer, given.n_rows, given.n_elements, columns, self.x_type, given.n_columns,
            self.target.pointer, self.dtype, added, self.bias_type,
        )  # fmt: skip
        cuda_product.multiply(call.gpu, operands, lambda n_bytes: self._allocate(n_bytes).pointer, call.handle)

    def multiply_by_torch(self, x: _Operand, weight: _Operand, bias: _Operand | None) -> None:
        """Queue kernels that dequantize pieces of the weight, each followed by its product, which PyTorch computes."""
        given, call, gpu = self.given, self.call, self.call.gpu
        n_rows, n_elements, dtype = given.n_rows, given.n_elements, _computing_type(self.x_type, self.dtype)
        blocks = weight.sent(call).pointer
        # The kernel that dequantizes is fastest if each piece starts at a multiple of 16 bytes.
        step = min(max(PIECE // n_elements // 16, 1) * 16, n_rows)
        piece = self._allocate(step * n_elements * numpy_dtype(dtype).itemsize)
        with TORCH.computing_on(gpu.index, call.handle):
            out = _tensor(self.target, (given.n_columns, n_rows), self.dtype)
            columns = TORCH.converted(_tensor(x.sent(call), (given.n_columns, n_elements), self.x_type), dtype)
            added = None
            if bias is not None and self.bias_type is not None:
                added = TORCH.converted(_tensor(bias.sent(call), (n_rows,), self.bias_type), dtype)
            for first in range(0, n_rows, step):
                last = min(first + step, n_rows)
                arguments = blocks + first * given.row_bytes, (last - first) * n_elements, piece.pointer
                cuda.launch_kernel(gpu, given.fmt, dtype, arguments, call.handle)
                values = _tensor(piece, (last - first, n_elements), dtype)
                some = None if added is None else added[first:last]
                TORCH.write_product(out[:, first:last], columns, values, some)

    def write_bias(self, bias: _Operand | None) -> None:
        """Queue the result for a weight whose rows have no elements: the bias, or zeros."""
        given, call = self.given, self.call
        if bias is None or self.bias_type is None:
            call.gpu.memset(self.target, 0, call.handle)
            return
        column = self._allocate(self.target.n_bytes // given.n_columns)
        job = Job(None, FORMATS[FORMAT_OF[self.bias_type]], self.dtype, n_elements=given.n_rows)
        cuda.dequantize_into(bias.sent(call), job, column, call.handle)
        for number in range(given.n_columns):
            start = self.target.pointer + number * column.n_bytes
            call.gpu.copy_on_device(start, column.pointer, column.n_bytes, call.handle)

    def _allocate(self, n_bytes: int) -> DeviceBytes:
        """Temporary memory."""
        call = self.call
        if call.framework is TORCH:
            memory = call.gpu.allocate_by_torch(n_bytes, call.handle)
        else:
            if call.handle:
                call.gpu.refuse_capture(
                    call.handle,
                    "this product needs temporary memory; capture with PyTorch, and pass tensors of PyTorch",
                )
            memory = call.gpu.allocate(n_bytes, call.handle, call.keeper)
        self._memory.append(memory)
        return memory

    def _aligned(self, memory: DeviceBytes, alignment: int) -> int:
        """The address of an array, or of a copy if the array is not aligned."""
        if memory.pointer % alignment == 0:
            return memory.pointer
        copy = self._allocate(memory.n_bytes)
        self.call.gpu.copy_on_device(copy.pointer, memory.pointer, memory.n_bytes, self.call.handle)
        return copy.pointer


def _tensor(memory: DeviceBytes, shape: tuple[int, ...], dtype: str) -> Any:
    """The memory as a tensor of PyTorch's, on the current stream."""
    size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
    return TORCH.from_dlpack(export(replace(memory, n_bytes=size), shape, numpy_dtype(dtype), None))
