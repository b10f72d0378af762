"""`dequantize`, `get_rows` and `linear`: the operators with checked arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from numba_dequant.arguments import flag_option, output_type
from numba_dequant.arguments import result_shape as checked_shape
from numba_dequant.errors import DataError, DtypeError, OutputError, UnknownFormatError, shown
from numba_dequant.format import Format
from numba_dequant.formats import FORMATS, format_named
from numba_dequant.interop import TORCH
from numba_dequant.torch.checks import check_product, check_same_device, check_tensor, kind_of_memory
from numba_dequant.torch.ops import OPERATORS


def dequantize(
    data: Tensor,
    qtype: str | int | Format,
    dtype: torch.dtype | str | None = None,
    shape: Sequence[int] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize the blocks of a tensor.

    >>> import torch, numba_dequant.torch
    >>> blocks = torch.zeros(4, 36, dtype=torch.uint8)  # 4 rows of two Q4_0 blocks
    >>> numba_dequant.torch.dequantize(blocks, "Q4_0", torch.bfloat16).shape
    torch.Size([4, 64])

    Args:
        data: whole blocks on the CPU or on a CUDA GPU, usually uint8 of shape (..., bytes per row). A tensor of another
            dtype, a parameter or a subclass of Tensor is read as its bytes. A strided tensor is copied first.
        qtype: the format: a name ("Q4_K"), a ggml id, gguf-py's `GGMLQuantizationType`, or a registered `Format`.
        dtype: torch.float16, torch.bfloat16 or torch.float32; None means the dtype of `out`, otherwise PyTorch's
            default dtype. The values are those of GGML in float32, rounded once to nearest even. Integers and F64 keep
            their stored type.
        shape: shape of the result; one extent may be -1. The default is the shape of `out`, or that of `data` with the
            last dimension in elements instead of bytes.
        out: contiguous tensor on the device of `data` to write to.

    Returns:
        `out`, or a new tensor on the device of `data`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError: the argument of that name is wrong.
        DeviceError: the GPU cannot be used.
    """
    if out is not None:
        return _dequantize_into(data, qtype, dtype, shape, out)
    name, result_dtype = resolved(qtype, torch.get_default_dtype() if dtype is None else dtype)
    blocks = as_bytes(data)
    if shape is None:
        values: Tensor = OPERATORS.dequantize.default(blocks, name, result_dtype)
        return values
    values = OPERATORS.dequantize.default(_flat(blocks), name, result_dtype)
    return values.reshape(_shape(shape, values.numel()))


def _dequantize_into(data: Tensor, qtype: Any, dtype: Any, shape: Any, out: Tensor) -> Tensor:
    if not isinstance(out, Tensor):
        raise OutputError(f"out must be a tensor, got {shown(out)}")
    if kind := kind_of_memory(out):
        raise OutputError(f"out is a tensor {kind}; pass a dense tensor")
    if not torch.compiler.is_compiling():
        if out.is_neg():
            raise OutputError("out is a view that negates other memory; pass a tensor that does not")
        if problem := TORCH.why_freed(out):
            raise OutputError(f"out cannot be written to: {problem}")
    name, result_dtype = resolved(qtype, out.dtype if dtype is None else dtype)
    if result_dtype != out.dtype:
        raise OutputError(f"out holds {out.dtype}, the result is {result_dtype}; pass a tensor of {result_dtype}")
    if shape is not None and (wanted := tuple(_shape(shape, out.numel()))) != tuple(out.shape):
        raise OutputError(f"out has shape {tuple(out.shape)}, the result has shape {wanted}; pass the same shape")
    blocks = as_bytes(data)
    check_same_device(blocks, out)
    OPERATORS.dequantize.out(_flat(blocks), name, out=out)
    return out


def get_rows(
    data: Tensor, indices: Tensor, qtype: str | int | Format, dtype: torch.dtype | str | None = None
) -> Tensor:
    """Dequantize some rows, as an embedding does. The other rows are not read.

    >>> import torch, numba_dequant.torch
    >>> blocks = torch.zeros(4, 36, dtype=torch.uint8)  # 4 rows of two Q4_0 blocks
    >>> numba_dequant.torch.get_rows(blocks, torch.tensor([[3, 0, 3]]), "Q4_0").shape
    torch.Size([1, 3, 64])

    Args:
        data: uint8 of shape (rows, bytes per row).
        indices: the numbers of the rows: int32 or int64 of any shape, on the device of `data`.
        qtype: as for `dequantize`.
        dtype: as for `dequantize`.

    Returns:
        Tensor of shape ``(*indices.shape, elements per row)``.

    Raises:
        UnknownFormatError: there is no such format.
        DtypeError: there is no such output type, or `indices` are not integers.
        DataError: `data` is not a matrix of whole blocks, or `indices` are no tensor or on another device.
        IndexError: an index is out of range (on a GPU: a CUDA error, as in `torch.nn.functional.embedding`).
        DeviceError: the GPU cannot be used.
    """
    name, result_dtype = resolved(qtype, torch.get_default_dtype() if dtype is None else dtype)
    check_tensor("indices", indices)
    values: Tensor = OPERATORS.get_rows.default(_matrix(as_bytes(data), "data"), indices, name, result_dtype)
    return values


def linear(
    input: Tensor,
    weight: Tensor,
    qtype: str | int | Format,
    bias: Tensor | None = None,
    *,
    weight_is_constant: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear` with a compressed weight: ``input @ weight.T + bias``.

    On a GPU of compute capability 8.0 or higher, a kernel multiplies the blocks themselves, on the tensor cores, and
    adds up in float32. It takes up to 128 rows of float16 or bfloat16 input. On GPUs other than those of compute
    capability 9.0, it takes up to 32 if the weight has few rows. Otherwise the weight is dequantized to the dtype of
    `input`, in pieces. Backward keeps the blocks, not the dequantized weight, and dequantizes them again. The weight
    itself gets no gradient.

    Args:
        input: floating-point tensor of shape (..., in_features). Under `torch.autocast` it is cast first.
        weight: uint8 of shape (out_features, bytes per row).
        qtype: as for `dequantize`.
        bias: tensor of shape (out_features,), or None.
        weight_is_constant: pass True if the preceding kernel on the stream does not write to the weight. That is so
            for a parameter that is loaded once. The product may then begin before that kernel has ended.

    Returns:
        Tensor of shape (..., out_features) and the dtype of `input`.

    Raises:
        UnknownFormatError: there is no such format.
        DtypeError: `input` is not of float16, bfloat16, float32 or float64, or `bias` is complex.
        DataError: `weight` is not a matrix of whole blocks, a tensor is on another device than `input`, or an argument
            is no tensor.
        ShapeError: the last dimension of `input` is not the number of elements in a row of `weight`, or `bias` has not
            one number for each row.
        OptionError: `weight_is_constant` is not True or False.
        DeviceError: the GPU cannot be used.
    """
    check_tensor("input", input)
    device = input.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    if not input.is_floating_point():
        raise DtypeError(f"input holds {input.dtype}; pass a floating-point tensor")
    if type(weight_is_constant) is not bool:
        weight_is_constant = flag_option("weight_is_constant", weight_is_constant)
    name, _ = resolved(qtype, torch.float32)
    blocks = _matrix(as_bytes(weight, "weight"), "weight")
    if bias is not None:
        check_tensor("bias", bias)
        if bias.is_complex():
            raise DtypeError(f"bias holds {bias.dtype}; pass a tensor of real numbers")
        bias = bias.to(input.dtype)
    if torch.compiler.is_compiling():  # otherwise the operator itself does it
        check_product(input, blocks, bias, name, _sizes(name))
    values: Tensor = OPERATORS.linear.default(input, blocks, name, bias, weight_is_constant)
    return values


def qtype_name(qtype: Any) -> str:
    """The name of a registered format.

    Raises:
        UnknownFormatError: there is no such format, or it is not registered.
    """
    fmt = format_named(qtype)
    if FORMATS.get(fmt.name) is not fmt:
        raise UnknownFormatError(f"the format {fmt.name} is not registered; call numba_dequant.register first")
    return fmt.name


@torch.compiler.assume_constant_result
def resolved(qtype: Any, dtype: Any) -> tuple[str, torch.dtype]:
    """The name of the format, and the dtype of the result."""
    try:
        return _resolved_once(qtype, dtype)
    except TypeError:  # an argument that is not hashable
        return _resolve(qtype, dtype)


def _resolve(qtype: Any, dtype: Any) -> tuple[str, torch.dtype]:
    name = qtype_name(qtype)
    output = output_type(dtype)
    return name, getattr(torch, FORMATS[name].result_dtype(output).name)


_resolved_once = lru_cache(maxsize=1024, typed=True)(_resolve)  # typed: True must not find the entry of format 1


@torch.compiler.assume_constant_result
def _sizes(name: str) -> tuple[int, int]:
    fmt = FORMATS[name]
    return fmt.type_size, fmt.block_size


def as_bytes(data: Tensor, name: str = "data") -> Tensor:
    """A tensor as uint8, without a subclass of Tensor.

    Raises:
        DataError: it is no tensor, it has no dimension, or its elements are not in memory one by one.
    """
    if type(data) is not Tensor and type(data) is not torch.nn.Parameter:
        if not isinstance(data, Tensor):
            raise DataError(f"{name} must be a tensor, got {shown(data)}; numba_dequant.dequantize takes other arrays")
        if type(data).__torch_dispatch__ is Tensor.__torch_dispatch__:
            # A subclass that only overrides methods, as ComfyUI-GGUF's; fake tensors and other wrappers stay.
            data = data.detach().as_subclass(Tensor)
    check_tensor(name, data)
    if data.dtype is torch.uint8:
        return data
    if not data.dim():
        raise DataError(f"{name} has no dimension; pass a tensor of rows, each a whole number of blocks")
    data = data.detach()
    if not torch.compiler.is_compiling():  # PyTorch does not view a tensor of another dtype that it has yet to negate
        data = data.resolve_conj().resolve_neg()
    return data.contiguous().view(torch.uint8)


def _flat(blocks: Tensor) -> Tensor:
    return blocks if blocks.dim() == 1 else blocks.reshape(-1)


def _matrix(blocks: Tensor, name: str) -> Tensor:
    if blocks.dim() != 2:
        raise DataError(f"{name} must have 2 dimensions, rows and bytes per row, got shape {tuple(blocks.shape)}")
    return blocks


def _shape(shape: Any, n_elements: int) -> Any:
    if torch.compiler.is_compiling():
        return shape
    return checked_shape(shape, n_elements, None)
