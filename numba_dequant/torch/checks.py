"""Checks of the tensors that operators take. The messages are those of the functions, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from numba_dequant.dtypes import OUTPUT_TYPES
from numba_dequant.errors import DataError, DtypeError, OutputError, ShapeError, shown
from numba_dequant.format import Format
from numba_dequant.interop import TORCH

DTYPES = {getattr(torch, name): name for name in OUTPUT_TYPES}
"""The output types."""


FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The types of the columns of a product. PyTorch does not multiply float8."""


def check_tensor(name: str, given: Any) -> None:
    """Raise DataError unless `given` is a tensor whose elements are in memory one by one."""
    if not isinstance(given, Tensor):
        raise DataError(f"{name} must be a tensor, got {shown(given)}")
    if kind := kind_of_memory(given):
        raise DataError(f"{name} is a tensor {kind}; pass a dense tensor with the same numbers")
    if not torch.compiler.is_compiling() and (problem := TORCH.why_freed(given)):
        raise DataError(f"{name} cannot be read: {problem}")


def kind_of_memory(tensor: Tensor) -> str | None:
    """What a tensor is whose elements are not in memory one by one; None for all others.

    PyTorch has no common error for them. Some calls with the bytes of a quantized tensor end the process.
    """
    if tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested:
        return None
    return "quantized by PyTorch" if tensor.is_quantized else "nested" if tensor.is_nested else f"of {tensor.layout}"


def result_shape(data: Tensor, fmt: Format) -> list[Any]:
    """The shape of the values of `data`: the last dimension in elements instead of bytes.

    Raises:
        DataError: a row is not a whole number of blocks.
    """
    *rows, n_bytes = data.shape or [None]
    if n_bytes is None:
        raise DataError(f"data has no dimension; pass a tensor of rows, each a whole number of {fmt.name} blocks")
    type_size = fmt.type_size
    if n_bytes % type_size:
        raise DataError(
            f"a row of {fmt.name} is a whole number of blocks of {type_size} bytes, but the last dimension of data is "
            f"{n_bytes}; pass whole rows, or pass shape"
        )
    rows.append(n_bytes // type_size * fmt.block_size)
    return rows


def check_dtype(fmt: Format, dtype: torch.dtype) -> None:
    """Raise DtypeError if the values of a format cannot have that dtype."""
    if dtype not in DTYPES if fmt.stored_dtype is None else dtype is not _stored(fmt):
        possible = ", ".join(map(str, DTYPES)) if fmt.stored_dtype is None else str(_stored(fmt))
        raise DtypeError(f"values of {fmt.name} cannot be {dtype}; choose {possible}")


def _stored(fmt: Format) -> torch.dtype:
    stored: torch.dtype = getattr(torch, fmt.result_dtype("float16").name)
    return stored


def check_same_device(data: Tensor, out: Tensor) -> None:
    """Raise OutputError if `out` is on a device other than `data`."""
    if out.device != data.device:
        raise OutputError(f"out is on {out.device}, but data is on {data.device}; pass tensors on the same device")


def check_numbers(what: str, numbers: Tensor, data: Tensor) -> None:
    """Check that `numbers` are integers on the device of `data`.

    Raises:
        DtypeError: they are not integers.
        DataError: they are on another device.
    """
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool:
        raise DtypeError(f"{what} hold {numbers.dtype}, not integers; pass a tensor of torch.int64")
    if numbers.device != data.device:
        raise DataError(f"{what} are on {numbers.device}, but the data is on {data.device}; pass both on one device")


def check_product(input: Tensor, weight: Tensor, bias: Tensor | None, name: str, sizes: tuple[int, int]) -> None:
    """Check that a kernel may read all that a product needs.

    Args:
        input: the columns.
        weight: the blocks of the weights.
        bias: a number for each row of weights, or None.
        name: the name of the format.
        sizes: its bytes and its elements per block.

    Raises:
        DtypeError: `input` is not of one of `FLOATS`.
        ShapeError: `input` has no dimension or rows of another length than `weight`, or `bias` has not one number for
            each row.
        DataError: a row of `weight` is not a whole number of blocks, a tensor is on another device, or `bias` has
            another dtype than `input`.
    """
    if input.dtype not in FLOATS:
        allowed = "float16, bfloat16, float32 or float64"
        raise DtypeError(f"input holds {input.dtype}; pass a tensor of floating-point numbers: {allowed}")
    if not input.dim():
        raise ShapeError("input has no dimension; pass a tensor whose last dimension is in_features")
    n_bytes, (type_size, block_size) = weight.shape[-1], sizes
    if n_bytes % type_size:
        raise DataError(
            f"a row of {name} is a whole number of blocks of {type_size} bytes, but the last dimension of weight is "
            f"{n_bytes}; pass whole rows"
        )
    n_elements = n_bytes // type_size * block_size
    if input.shape[-1] != n_elements:
        raise ShapeError(
            f"input has {input.shape[-1]} features, but a row of weight has {n_bytes} bytes, which are {n_elements} "
            f"elements of {name}; pass an input that is as long as a row"
        )
    if weight.device != input.device:
        raise DataError(f"weight is on {weight.device}, but input is on {input.device}; pass both on the same device")
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != weight.shape[-2]:
        raise ShapeError(
            f"bias has shape {tuple(bias.shape)}, but weight has {weight.shape[-2]} rows; pass a number for each row"
        )
    if bias.device != input.device or bias.dtype != input.dtype:
        raise DataError(
            f"bias is a tensor of {bias.dtype} on {bias.device}, but input is one of {input.dtype} on {input.device}; "
            "pass a bias of the same dtype on the same device"
        )


def shapes_of_experts(input: Tensor, weight: Tensor, ids: Tensor) -> ShapeError:
    """The error for tensors whose shapes are not those of rows, experts and the numbers of experts."""
    return ShapeError(
        "the blocks must have the shape (experts, rows, bytes per row), the input (n, in_features) and ids (n, k), "
        f"got {tuple(weight.shape)}, {tuple(input.shape)} and {tuple(ids.shape)}"
    )


def check_experts(input: Tensor, weight: Tensor, ids: Tensor, fmt: Format) -> None:
    """Check what rows of `input` are multiplied by: the weights of the experts that `ids` name.

    Raises:
        ShapeError: a tensor has another number of dimensions, there is no row of `ids` for each row of `input`, rows
            have another length than those of an expert, or an expert does not exist, which only a CPU can tell.
        DataError: a row of `weight` is not a whole number of blocks, or a tensor is on another device.
        DtypeError: `input` is not of one of `FLOATS`, or `ids` are not integers.
    """
    if input.dim() != 2 or weight.dim() != 3 or ids.dim() != 2 or ids.shape[0] != input.shape[0]:
        raise shapes_of_experts(input, weight, ids)
    check_product(input, weight, None, fmt.name, (fmt.type_size, fmt.block_size))
    check_numbers("ids", ids, input)
    if ids.device.type == "cpu" and ids.numel():
        numbers, n_experts = ids.to(torch.int64), weight.shape[0]
        first, last = int(numbers.min()), int(numbers.max())
        if not 0 <= first <= last < n_experts:
            raise ShapeError(
                f"ids are from {first} to {last}, but there are only {n_experts} experts; pass numbers from 0 to "
                f"{n_experts - 1}"
            )
