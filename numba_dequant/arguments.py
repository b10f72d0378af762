"""Checks that every device shares, all made before anything is allocated or launched."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import DataError, NumbaDequantError, OutputError, ShapeError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.interop import library_of


@dataclass(slots=True)
class Tensor:
    """One of many tensors to dequantize together, as the caller gave it."""

    name: Any
    data: Any
    source: Format
    shape: Any = None
    out: Any = None


def named_tensors(tensors: Mapping[Any, Any], out: Mapping[Any, Any] | None) -> list[Tensor]:
    """The tensors that were given as name -> (data, format) or (data, format, shape), with name -> `out`.

    Raises:
        DataError: an entry is something else.
        OutputError: `out` has other names.
        UnknownFormatError: there is no such format.
    """
    if out is not None and out.keys() != tensors.keys():
        odd = next(iter(out.keys() ^ tensors.keys()))
        raise OutputError(f"{odd!r} is in one of tensors and out, not in both; give an array for each tensor")
    found = []
    for name, entry in tensors.items():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            kind = f"tuple of {len(entry)}" if isinstance(entry, tuple) else type(entry).__name__
            raise DataError(f"tensor {name!r} is a {kind}, not (data, format) or (data, format, shape)")
        data, source, *shape = entry
        given = None if out is None else out[name]
        found.append(Tensor(name, data, format_named(source), shape[0] if shape else None, given))
    return found


def named(error: NumbaDequantError, tensor: Tensor) -> NumbaDequantError:
    """The same error, saying with which tensor it is."""
    return type(error)(f"tensor {tensor.name!r}: {error}")


def is_on_gpu(thing: Any) -> bool:
    """Whether an object lies in GPU memory, by its DLPack device or its `__cuda_array_interface__`."""
    if isinstance(thing, (bytes, bytearray, memoryview, np.ndarray)):
        return False
    library = library_of(thing)
    if library is not None:
        return library.is_on_gpu(thing)
    if hasattr(thing, "__dlpack_device__"):
        return int(thing.__dlpack_device__()[0]) in (2, 13)
    return hasattr(thing, "__cuda_array_interface__")


def host_bytes(data: Any) -> NDArray[np.uint8]:
    """Contiguous host memory as a flat array of bytes, which is not copied.

    Raises:
        DataError: it is not contiguous memory.
    """
    if isinstance(data, np.ndarray):
        array = data
    else:
        try:
            array = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
        except (TypeError, ValueError, BufferError):
            array = _host_array(data)
    if array.dtype.hasobject or not array.flags.c_contiguous:
        raise DataError("the data is not one contiguous piece of memory; pass numpy.ascontiguousarray(data)")
    return array.reshape(-1).view(np.uint8)


def _host_array(data: Any) -> NDArray[Any]:
    if hasattr(data, "__dlpack__"):
        try:
            return np.from_dlpack(data)
        except (BufferError, RuntimeError, TypeError) as error:
            raise DataError(f"cannot read bytes from {type(data).__name__}: {error}") from None
    raise DataError(
        f"cannot read bytes from {type(data).__name__}; pass bytes, a memoryview, a NumPy array or an array on a GPU"
    )


def result_shape(shape: Sequence[int] | int | None, n_elements: int, out: Any) -> tuple[int, ...]:
    """The shape of a result of `n_elements`: as asked for, else that of `out`, else flat.

    Raises:
        ShapeError: the shape asked for has another number of elements.
    """
    if shape is None:
        if out is not None and hasattr(out, "shape"):
            return tuple(out.shape)
        return (n_elements,)
    try:
        asked = tuple(map(operator.index, shape)) if isinstance(shape, (tuple, Sequence)) else (operator.index(shape),)
    except TypeError:
        raise ShapeError(f"a shape is whole numbers, rows first, not {shape!r}") from None
    if min(asked, default=0) < 0 or math.prod(asked) != n_elements:
        raise ShapeError(
            f"shape {asked} has {math.prod(asked)} elements, the data has {n_elements}; give a shape of that size"
        )
    return asked


def check_output(
    found_dtype: np.dtype[Any],
    found_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    n_elements: int,
) -> None:
    """Check that an `out` has the type and the shape of the result.

    Raises:
        OutputError: it has not.
    """
    if found_dtype != dtype:
        raise OutputError(f"out holds {found_dtype.name}, the result is {dtype.name}; pass an array of {dtype.name}")
    if found_shape != shape or math.prod(found_shape) != n_elements:
        expected = f"{n_elements} elements" if found_shape == shape else f"shape {shape}"
        raise OutputError(f"out has shape {found_shape}, the result has {expected}")
