"""The operators ``torch.ops.numba_dequant``: schemas, gradients, and implementations for CPU, CUDA and fake tensors.

Data has the dtype uint8. A row of a tensor is the last dimension of its data, in bytes. `format` is the name of a
registered format. The functions of `functional` check their arguments and call these operators.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from numba_dequant import api
from numba_dequant.bits import RUN
from numba_dequant.errors import DeviceError, OutputError
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_named
from numba_dequant.interop import TORCH
from numba_dequant.torch.checks import (
    DTYPES,
    check_dtype,
    check_experts,
    check_numbers,
    check_product,
    check_same_device,
    result_shape,
)

PIECE = 1 << 28
"""Number of weights that `linear` dequantizes at a time on a GPU; it bounds the temporary memory."""

CPU_PIECE = 1 << 20
"""Number of weights that `linear` dequantizes at a time on the CPU: they stay in its cache."""

MOST_COLUMNS = 128
"""Maximum number of columns that a kernel for blocks multiplies; for fewer, `cuda_product.is_slower` decides."""

LIBRARY = torch.library.Library("numba_dequant", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def _define(schema: str) -> None:
    LIBRARY.define(schema, tags=_TAGS)


_define("dequantize(Tensor data, str format, ScalarType dtype) -> Tensor")
_define("dequantize.out(Tensor data, str format, *, Tensor(a!) out) -> ()")
_define("get_rows(Tensor data, Tensor indices, str format, ScalarType dtype) -> Tensor")
_define("linear(Tensor input, Tensor weight, str format, Tensor? bias, bool weight_is_constant=False) -> Tensor")

_define("mul_mat_id(Tensor input, Tensor weight, Tensor ids, str format) -> Tensor")


def _format(name: str) -> Format:
    return FORMATS.get(name) or format_named(name)


@cache
def _cuda() -> Any:
    # Cached: an import statement takes as long as launching a kernel.
    from numba_dequant.backends import cuda

    return cuda


@cache
def _cuda_product() -> Any:
    from numba_dequant.backends import cuda_product

    return cuda_product


def _write(data: Tensor, fmt: Format, out: Tensor) -> None:
    """Write the values of `data` to a contiguous tensor on the same device."""
    if fmt.stored_dtype is not None:
        out.view(-1).view(torch.uint8).copy_(data.reshape(-1))
    elif not data.is_cuda:
        api.dequantize(data, fmt, device="cpu", dtype=DTYPES[out.dtype], out=out)
    else:
        pointer = out.data_ptr()
        if pointer % 16:
            # The kernel stores 16 bytes at a time.
            aligned = torch.empty_like(out)
            _launch(data, fmt, DTYPES[out.dtype], aligned.numel(), aligned.data_ptr())
            out.copy_(aligned)
        else:
            _launch(data, fmt, DTYPES[out.dtype], out.numel(), pointer)


class _ThisThread(threading.local):
    """The GPUs whose contexts this thread has made current."""

    def __init__(self) -> None:
        self.gpus: set[int] = set()


_this_thread = _ThisThread()


def _launch(data: Tensor, fmt: Format, dtype: str, n_elements: int, out: int) -> None:
    """Queue the kernel on PyTorch's current stream."""
    if not n_elements:
        return
    cuda, index = _cuda(), data.get_device()
    gpu = cuda.OPEN.get(index) or cuda.backend_of(data).gpu
    blocks = data if data.is_contiguous() else data.contiguous()
    arguments = blocks.data_ptr(), n_elements, out
    # Asking the driver for the current context takes a fifth of the time of a launch; PyTorch knows its device.
    if index in _this_thread.gpus and torch._C._cuda_getDevice() == index:
        with suppress(DeviceError):  # the program may have changed the context without PyTorch
            cuda.launch_kernel(gpu, fmt, dtype, arguments, TORCH.current_stream(index))
            return
    with gpu.active():
        cuda.launch_kernel(gpu, fmt, dtype, arguments, TORCH.current_stream(index))
    _this_thread.gpus.add(index)


def _dequantize(data: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    fmt, name = _format(format), DTYPES.get(dtype)
    if name is None or fmt.decode is None:
        check_dtype(fmt, dtype)
    out = data.new_empty(result_shape(data, fmt), dtype=dtype)
    if name is not None and fmt.decode is not None and data.is_cuda:
        _launch(data, fmt, name, out.numel(), out.data_ptr())
    else:
        _write(data, fmt, out)
    return out


def _dequantize_out(data: Tensor, format: str, *, out: Tensor) -> None:
    fmt, data = _format(format), data.contiguous()
    check_dtype(fmt, out.dtype)
    if out.numel() != data.numel() // fmt.type_size * fmt.block_size:
        raise OutputError(
            f"out has {out.numel()} elements, the result has {fmt.n_elements(data.numel())}; pass a tensor of that size"
        )
    if not out.is_contiguous():
        raise OutputError("out is not contiguous; pass a contiguous tensor")
    check_same_device(data, out)
    first, start = data.data_ptr(), out.data_ptr()
    if first < start + out.nbytes and start < first + data.nbytes:
        raise OutputError("out shares memory with data; pass another tensor")
    _write(data, fmt, out)
    if out.is_cuda:
        TORCH.written(out)


def _get_rows(data: Tensor, indices: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    check_numbers("indices", indices, data)
    fmt, name = _format(format), DTYPES.get(dtype)
    n_elements = result_shape(data, fmt)[-1]
    if data.is_cuda and name is not None and fmt.decode is not None and n_elements % RUN == 0:
        rows = data if data.is_contiguous() else data.contiguous()
        numbers = indices.to(torch.int64).contiguous()
        out = data.new_empty([*indices.shape, n_elements], dtype=dtype)
        if out.numel():
            gpu = _gpu_of(data)
            arguments = rows.data_ptr(), rows.shape[0], numbers.data_ptr(), n_elements, out.data_ptr()
            with gpu.active():
                _cuda().launch_rows(gpu, fmt, name, arguments, numbers.numel(), TORCH.current_stream(gpu.index))
        return out
    numbers = indices.reshape(-1).to(torch.int64)
    if indices.numel() and not data.shape[0]:
        raise IndexError("there are indices, but data has no rows")
    if indices.numel() and numbers.device.type == "cpu":  # index_select has several errors for them
        first, last = (int(number) for number in numbers.aminmax())
        if not 0 <= first <= last < data.shape[0]:
            raise IndexError(
                f"indices are from {first} to {last}, but data has only {data.shape[0]} rows; pass numbers from 0 to "
                f"{data.shape[0] - 1}"
            )
    rows = data.index_select(0, numbers)
    return _dequantize(rows, format, dtype).view(*indices.shape, n_elements)


def _linear(
    input: Tensor, weight: Tensor, format: str, bias: Tensor | None, weight_is_constant: bool = False
) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        with torch.autocast(input.device.type, enabled=False):
            return _linear(input, weight, format, bias, weight_is_constant)
    fmt = _format(format)
    check_product(input, weight, bias, fmt.name, (fmt.type_size, fmt.block_size))
    if input.is_cuda and input.numel() <= MOST_COLUMNS * input.shape[-1]:
        out = _product(input, weight, fmt, bias, weight_is_constant)
        if out is not None:
            return out
    step = PIECE if input.is_cuda else CPU_PIECE
    if weight.numel() // fmt.type_size * fmt.block_size <= step:
        return torch.nn.functional.linear(input, _values(weight, format, input.dtype, _dequantize), bias)
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    for rows in _pieces(weight, format, step):
        values = _values(weight[rows], format, input.dtype, _dequantize)
        out[..., rows] = torch.nn.functional.linear(input, values, None if bias is None else bias[rows])
    return out


def _product(
    input: Tensor, weight: Tensor, fmt: Format, bias: Tensor | None, weight_is_constant: bool
) -> Tensor | None:
    """The product by a kernel that multiplies the blocks themselves; None if it cannot, or if it is slower."""
    n_columns = input.numel() // max(input.shape[-1], 1)
    if n_columns > 1 and _cuda_product().is_slower(_gpu_of(weight), weight.shape[0], n_columns):
        return None
    out = input.new_empty(*input.shape[:-1], weight.shape[0])
    columns = _columns(input)
    given = _operands(columns, weight, fmt, bias, out)
    if given is None:
        return None
    if not out.numel():
        return out
    gpu, operands = given
    memory = _Memory(input.device)
    with gpu.active():
        stream = TORCH.current_stream(weight.get_device())
        _cuda_product().multiply(gpu, operands, memory, stream, weight_is_constant=weight_is_constant)
    return out


class _Memory:
    """Temporary memory from PyTorch's allocator, which is kept until the end of a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    def __call__(self, n_bytes: int) -> int:
        self._tensors.append(torch.empty(n_bytes, dtype=torch.uint8, device=self._device))
        return self._tensors[-1].data_ptr()


def _columns(input: Tensor) -> Tensor:
    """The input as kernels read it: contiguous, and aligned to 16 bytes."""
    if input.is_contiguous() and input.data_ptr() % 16 == 0:
        return input
    return input.clone(memory_format=torch.contiguous_format)


def _gpu_of(weight: Tensor) -> Any:
    return _cuda().OPEN.get(weight.get_device()) or _cuda().backend_of(weight).gpu


def _operands(columns: Tensor, weight: Tensor, fmt: Format, bias: Tensor | None, out: Tensor) -> tuple[Any, Any] | None:
    """The GPU and the operands of a product, or None if no kernel can compute it."""
    dtype, cuda, gpu = DTYPES.get(columns.dtype), _cuda_product(), _gpu_of(weight)
    n_elements = columns.shape[-1]
    if dtype is None or not n_elements or not weight.is_contiguous():
        return None
    if cuda.why_not(gpu, fmt, dtype, weight.data_ptr()) is not None:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    return gpu, cuda.Operands(
        fmt, weight.data_ptr(), weight.shape[-2], n_elements, columns.data_ptr(), dtype, columns.numel() // n_elements,
        out.data_ptr(), dtype, 0 if bias is None else bias.data_ptr(), dtype,
    )  # fmt: skip


MOST_PAIRS = 4096
"""Maximum number of pairs of an input and an expert that a kernel for blocks multiplies."""


def _mul_mat_id(input: Tensor, weight: Tensor, ids: Tensor, format: str) -> Tensor:
    if torch.is_autocast_enabled(input.device.type):
        with torch.autocast(input.device.type, enabled=False):
            return _mul_mat_id(input, weight, ids, format)
    fmt = _format(format)
    check_experts(input, weight, ids, fmt)
    (n, k), n_rows = ids.shape, weight.shape[1]
    out = input.new_empty(n, k, n_rows)
    if input.is_cuda and 0 < ids.numel() <= MOST_PAIRS:
        columns, numbers = _columns(input), ids.to(torch.int64).contiguous()
        given = _operands(columns, weight, fmt, None, out)
        if given is not None:
            gpu, operands = given
            cuda, memory = _cuda_product(), _Memory(input.device)
            with gpu.active():
                experts = cuda.Experts(weight.shape[0], numbers.data_ptr(), k)
                cuda.multiply_experts(gpu, operands, experts, memory, TORCH.current_stream(weight.get_device()))
            return out
    # The host does not wait for `ids`, so it does not know which experts are chosen.
    ids = ids.to(torch.int64).contiguous()
    if n * k <= weight.shape[0]:
        values = _values(weight.index_select(0, ids.view(-1)), format, input.dtype, _dequantize)
        inputs = input.unsqueeze(1).expand(n, k, input.shape[1]).reshape(n * k, 1, input.shape[1])
        return torch.bmm(inputs, values.transpose(1, 2)).view(n, k, n_rows)
    out.zero_()
    for expert in range(weight.shape[0]):
        values = _linear(input, weight[expert], format, None)
        out = torch.where((ids == expert).unsqueeze(-1), values.unsqueeze(1), out)
    return out


def _pieces(weight: Tensor, format: str, n_elements: int | None = None) -> list[slice]:
    """The rows of a weight, in pieces of at most `n_elements` elements; the default is `PIECE`."""
    n_rows, n_columns = result_shape(weight, _format(format))
    step = max((n_elements or PIECE) // max(n_columns, 1), 1)
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)] or [slice(0, 0)]


def _values(weight: Tensor, format: str, dtype: torch.dtype, dequantize: Callable[..., Tensor]) -> Tensor:
    """The values of a weight as any floating-point dtype."""
    return dequantize(weight, format, dtype) if dtype in DTYPES else dequantize(weight, format, torch.float32).to(dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, ctx.format, *_ = inputs
    ctx.save_for_backward(weight)
    ctx.dtype = input.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    (weight,) = ctx.saved_tensors
    of_input = of_bias = None
    if ctx.needs_input_grad[0]:
        # As an operator, because this may be traced.
        dequantize = OPERATORS.dequantize.default
        for rows in _pieces(weight, ctx.format):
            part = gradient[..., rows] @ _values(weight[rows], ctx.format, ctx.dtype, dequantize)
            of_input = part if of_input is None else of_input + part
    if ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return of_input, None, None, of_bias, None


def _save_experts_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, ids, ctx.format = inputs
    ctx.save_for_backward(weight, ids)
    ctx.dtype = input.dtype


def _mul_mat_id_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
    weight, ids = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    (n, k), n_rows, dequantize = ids.shape, weight.shape[1], OPERATORS.dequantize.default
    if n * k <= weight.shape[0]:
        values = _values(weight.index_select(0, ids.reshape(-1).to(torch.int64)), ctx.format, ctx.dtype, dequantize)
        of_pairs = torch.bmm(gradient.reshape(n * k, 1, n_rows), values)
        return of_pairs.view(n, k, values.shape[-1]).sum(1), None, None, None
    of_input = None
    for expert in range(weight.shape[0]):
        # An expert that a row did not choose may have infinities.
        is_chosen = (ids == expert).unsqueeze(-1)
        part = torch.where(is_chosen, gradient, 0).sum(1) @ _values(weight[expert], ctx.format, ctx.dtype, dequantize)
        part = torch.where(is_chosen.any(1), part, 0)
        of_input = part if of_input is None else of_input + part
    return of_input, None, None, None


def _dequantize_fake(data: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    return data.new_empty(result_shape(data, _format(format)), dtype=dtype)


def _dequantize_out_fake(data: Tensor, format: str, *, out: Tensor) -> None:
    pass


def _get_rows_fake(data: Tensor, indices: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    return data.new_empty([*indices.shape, result_shape(data, _format(format))[-1]], dtype=dtype)


def _linear_fake(
    input: Tensor, weight: Tensor, format: str, bias: Tensor | None, weight_is_constant: bool = False
) -> Tensor:
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


def _mul_mat_id_fake(input: Tensor, weight: Tensor, ids: Tensor, format: str) -> Tensor:
    return input.new_empty([*ids.shape, weight.shape[1]])


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("dequantize", _dequantize, _key)
    LIBRARY.impl("dequantize.out", _dequantize_out, _key)
    LIBRARY.impl("get_rows", _get_rows, _key)
    LIBRARY.impl("linear", _linear, _key)
    LIBRARY.impl("mul_mat_id", _mul_mat_id, _key)

torch.library.register_fake("numba_dequant::dequantize", _dequantize_fake, lib=LIBRARY)
torch.library.register_fake("numba_dequant::dequantize.out", _dequantize_out_fake, lib=LIBRARY)
torch.library.register_fake("numba_dequant::get_rows", _get_rows_fake, lib=LIBRARY)
torch.library.register_fake("numba_dequant::linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("numba_dequant::mul_mat_id", _mul_mat_id_fake, lib=LIBRARY)
torch.library.register_autograd(
    "numba_dequant::linear", _linear_backward, setup_context=_save_for_backward, lib=LIBRARY
)

OPERATORS = torch.ops.numba_dequant
torch.library.register_autograd(
    "numba_dequant::mul_mat_id", _mul_mat_id_backward, setup_context=_save_experts_for_backward, lib=LIBRARY
)
