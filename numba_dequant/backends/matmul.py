"""`matmul`: its arguments, for all devices, and the product on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import Job, host_array, result_shape
from numba_dequant.dtypes import PRODUCT_TYPES, dtype_name, numpy_dtype
from numba_dequant.errors import (
    DataError,
    DtypeError,
    NumbaDequantError,
    ShapeError,
    UnknownFormatError,
    shown,
)
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.interop import TORCH, library_of

TILE = 1 << 20
"""Elements of the weight that are dequantized together on the host. As float32 they stay in the cache."""


@dataclass(slots=True)
class ProductJob:
    """One product ``x @ weight.T + bias``, on any backend.

    Attributes:
        x: the columns, as passed by the caller. The last dimension is one column; all others count columns.
        weight: the blocks, as passed by the caller.
        fmt: the format of the blocks.
        weight_shape: the shape that came with the blocks, or None.
        bias: a number for each row, as passed by the caller, or None.
        dtype: the output type; None, until `measure`, means that of `x`.
        out: the caller's array to write to, or None for new memory.
        n_rows: rows of the weight, set by `measure`.
        n_elements: elements of a row, set by `measure`.
        n_columns: the number of columns, set by `measure`.
    """

    x: Any
    weight: Any
    fmt: Format
    weight_shape: Any = None
    bias: Any = None
    dtype: str | None = None
    out: Any = None
    n_rows: int = 0
    n_elements: int = 0
    n_columns: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the weight."""
        return self.n_elements // self.fmt.block_size * self.fmt.type_size

    def measure(
        self, x_shape: tuple[int, ...], x_dtype: str, n_bytes: int, bias_shape: tuple[int, ...] | None = None
    ) -> Job:
        """Set the sizes and the output type.

        Args:
            x_shape: the shape of `x`.
            x_dtype: the type of `x`.
            n_bytes: bytes of the weight.
            bias_shape: the shape of the bias, if there is one.

        Returns:
            The job that describes the result.

        Raises:
            DataError: the weight is not a whole number of blocks.
            ShapeError: the shapes do not match.
        """
        if not x_shape:
            raise ShapeError("x has no dimensions; pass an array whose last dimension is as long as a row of weight")
        self.n_elements, self.n_columns = x_shape[-1], math.prod(x_shape[:-1])
        self.n_rows = self._count_rows(n_bytes)
        if bias_shape is not None and bias_shape != (self.n_rows,):
            raise ShapeError(
                f"bias has shape {bias_shape}; pass one number for each of the {self.n_rows} rows of weight"
            )
        self.dtype = self.dtype or x_dtype
        shape = (*x_shape[:-1], self.n_rows)
        return Job(None, self.fmt, self.dtype, shape, self.out, n_elements=math.prod(shape))

    def _count_rows(self, n_bytes: int) -> int:
        fmt, n_elements = self.fmt, self.n_elements
        try:
            total = fmt.n_elements(n_bytes)
            shape = None if self.weight_shape is None else result_shape(self.weight_shape, total, None)
        except NumbaDequantError as error:
            raise with_argument_name(error, "weight") from error
        if shape is not None and len(shape) != 2:
            raise ShapeError(f"weight has shape {shape}; pass a weight of two dimensions, rows first")
        if shape is not None and shape[1] != n_elements:
            raise ShapeError(
                f"x has {n_elements} elements in its last dimension, but a row of weight has {shape[1]}; "
                "pass an x that is as long as a row"
            )
        if n_elements % fmt.block_size:
            raise ShapeError(
                f"a row of {fmt.name} is a whole number of blocks of {fmt.block_size} elements, but the last dimension "
                f"of x is {n_elements}; pass an x that is as long as a row"
            )
        if shape is not None:
            return shape[0]
        if not n_elements:
            raise ShapeError(
                "the last dimension of x is 0, so the number of rows of weight is not known; pass its shape too"
            )
        if total % n_elements:
            raise ShapeError(
                f"weight has {total} elements, which are not whole rows of {n_elements}, the last dimension of x; "
                "pass whole rows"
            )
        return total // n_elements


def product_job(x: Any, weight: Any, format: Any, bias: Any, dtype: Any, out: Any) -> ProductJob:
    """The job for the arguments of `numba_dequant.matmul`.

    Raises:
        UnknownFormatError: there is no such format, or none was given.
        DataError: `weight` is a tuple of another length, or contains another format than `format`.
        DtypeError: there is no such output type, or the weight holds integers or float64.
    """
    shape = None
    if isinstance(weight, tuple):
        if len(weight) not in (2, 3):
            raise DataError(
                f"weight is a tuple of {len(weight)}; pass a QuantizedTensor, (data, format) or (data, format, shape)"
            )
        weight, own_format, *rest = weight
        fmt, shape = format_named(own_format), rest[0] if rest else None
        if format is not None and format_named(format) is not fmt:
            raise DataError(f"weight has the format {fmt.name}, but format is {shown(format)}; omit format")
    elif format is None:
        raise UnknownFormatError(
            "the format of weight is not known; pass format, such as format='Q4_K', or pass a QuantizedTensor"
        )
    else:
        fmt = format_named(format)
    if fmt.stored_dtype is not None:
        raise DtypeError(
            f"weight holds {fmt.stored_dtype.name} ({fmt.name}), which matmul does not multiply; dequantize it, "
            "convert it to float32 and use numpy.matmul"
        )
    output = dtype_name(dtype) if dtype is not None else _type_of_output(out)
    return ProductJob(x, weight, fmt, shape, bias, output, out)


def _type_of_output(out: Any) -> str | None:
    try:
        return None if out is None else dtype_name(out.dtype)
    except Exception:  # the checks of `out` will report the problem
        return None


def float_type(dtype: np.dtype[Any], name: str) -> str:
    """The name of the type of an argument. Raises DtypeError if it is not one of `PRODUCT_TYPES`."""
    if dtype.name in PRODUCT_TYPES and dtype.isnative:
        return dtype.name
    actual = dtype.name if dtype.isnative else f"{dtype.name} of the other byte order"
    raise _wrong_type(actual, name)


def _wrong_type(actual: str, name: str) -> DtypeError:
    return DtypeError(f"{name} holds {actual}; convert it to {', '.join(PRODUCT_TYPES[:-1])} or {PRODUCT_TYPES[-1]}")


def with_argument_name(error: NumbaDequantError, name: str) -> NumbaDequantError:
    """The same error, with the name of the argument in its message."""
    return type(error)(f"{name}: {error}")


def host_argument(array: Any, name: str) -> NDArray[Any]:
    """An argument in host memory as a plain NumPy array without a copy; it may be strided.

    Raises:
        DataError: it is not an array on the host.
        DtypeError: it is `x` or the bias, and the type of its elements is not one of `PRODUCT_TYPES`.
    """
    try:
        return host_array(array) if name == "weight" else _host_floats(array, name)
    except DataError as error:
        raise with_argument_name(error, name) from error


def _host_floats(array: Any, name: str) -> NDArray[Any]:
    if library_of(array) is TORCH:
        type_name = str(array.dtype).removeprefix("torch.")
        if type_name not in PRODUCT_TYPES:
            raise _wrong_type(type_name, name)
        return TORCH.host_array(array).view(numpy_dtype(type_name))
    if isinstance(array, np.ma.MaskedArray):
        raise DataError("it is a masked array, and masked numbers cannot be multiplied; pass the result of filled(0)")
    try:
        found = array if isinstance(array, np.ndarray) else _as_array(array)
    except Exception:  # a foreign object may raise any exception
        raise DataError(f"expected a NumPy array, a PyTorch tensor or an array on a GPU, got {shown(array)}") from None
    float_type(found.dtype, name)
    return found.view(np.ndarray)


def _as_array(array: Any) -> NDArray[Any]:
    if hasattr(array, "__array__") or hasattr(array, "__array_interface__"):
        return np.asarray(array)
    return np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(memoryview(array))


def multiply(
    given: ProductJob,
    x: NDArray[Any],
    blocks: NDArray[np.uint8],
    bias: NDArray[Any] | None,
    out: NDArray[Any],
    dequantize: Callable[[NDArray[np.uint8], NDArray[np.float32]], None],
) -> None:
    """Write the product to the contiguous array `out`. It is computed in float32 and rounded once.

    Args:
        given: the job, with its sizes.
        x: the columns.
        blocks: the weight.
        bias: a number for each row, or None.
        out: memory for the results, one column after the other.
        dequantize: writes the values of blocks to an array of float32.
    """
    if not out.size:
        return
    n_rows, n_elements, row_bytes = given.n_rows, given.n_elements, given.row_bytes
    results = out.reshape(given.n_columns, n_rows)
    step = max(TILE // max(n_elements, 1), 1)
    tile = np.empty((min(step, n_rows), n_elements), np.float32)
    # Infinite and NaN scales have defined results, so NumPy must not warn.
    with np.errstate(all="ignore"):
        columns = np.ascontiguousarray(x, np.float32).reshape(given.n_columns, n_elements)
        added = None if bias is None else bias.astype(np.float32)
        for first in range(0, n_rows, step):
            last = min(first + step, n_rows)
            values = tile[: last - first]
            if n_elements:
                dequantize(blocks[first * row_bytes : last * row_bytes], values.reshape(-1))
            sums = np.matmul(columns, values.T)
            if added is not None:
                sums += added[first:last]
            results[:, first:last] = sums
