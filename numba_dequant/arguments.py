"""Checks of arguments for all devices, made before anything is allocated or launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.dtypes import DEFAULT, dtype_name
from numba_dequant.errors import (
    DataError,
    DeviceError,
    NumbaDequantError,
    OptionError,
    OutputError,
    ShapeError,
    shown,
)
from numba_dequant.format import Format, whole_number
from numba_dequant.formats import format_named
from numba_dequant.interop import TORCH, is_freed, library_of

MAX_DIMENSIONS = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
"""Maximum dimensions of a NumPy array."""

BYTES = np.dtype(np.uint8)


@dataclass(slots=True)
class Job:
    """One tensor to dequantize, on any backend.

    Attributes:
        data: the blocks, as passed by the caller; None if they are in a file.
        fmt: the format of the blocks.
        dtype: the output type; None to keep the blocks compressed.
        shape: the shape of the result, as passed by the caller until `measure` checks it.
        out: the caller's array to write to, or None for new memory.
        name: the name of the tensor, if there are several.
        n_elements: the number of elements, set by `measure`.
    """

    data: Any
    fmt: Format
    dtype: str | None
    shape: Any = None
    out: Any = None
    name: Any = None
    n_elements: int = 0

    def measure(self, n_bytes: int) -> None:
        """Set the number of elements in `n_bytes` of blocks, and the shape of the result.

        Raises:
            DataError: `n_bytes` is not a whole number of blocks.
            ShapeError: the shape of the caller has another number of elements.
        """
        self.n_elements = self.fmt.n_elements(n_bytes)
        self.shape = result_shape(self.shape, self.n_elements, self.out)

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the result."""
        return BYTES if self.dtype is None else self.fmt.result_dtype(self.dtype)

    def check_output(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Raise OutputError if the dtype or the shape of `out` is not that of the result."""
        expected = self.result_dtype
        if dtype != expected:
            actual = dtype.name if dtype.isnative else f"{dtype.name} of the other byte order"
            raise OutputError(f"out holds {actual}, the result is {expected.name}; pass an array of {expected.name}")
        if shape != self.shape or math.prod(shape) != self.n_elements:
            expected_shape = f"{self.n_elements} elements" if shape == self.shape else f"shape {self.shape}"
            raise OutputError(f"out has shape {shape}, the result has {expected_shape}; pass an array of that size")


def parse_tensors(tensors: Any, dtype: Any, out: Any) -> list[Job]:
    """The jobs for name -> (data, format) or (data, format, shape), and for name -> `out`.

    All jobs get the same output type. If `dtype` is None, it is the default for the first tensor.

    Raises:
        DataError: `tensors` or one of its entries has a wrong type.
        OutputError: `out` is not a mapping, or has other names.
        UnknownFormatError: there is no such format.
        DtypeError: there is no such output type.
    """
    if not isinstance(tensors, Mapping):
        raise DataError(f"tensors must be a mapping, name -> (data, format), got {shown(tensors)}")
    outputs = None if out is None else output_mapping(out)
    if outputs is not None and outputs.keys() != tensors.keys():
        mismatch = next(iter(outputs.keys() ^ tensors.keys()))
        raise OutputError(f"{shown(mismatch)} is in tensors or in out, but not in both; pass one array for each tensor")
    jobs = []
    for name, entry in tensors.items():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            actual = f"tuple of {len(entry)}" if isinstance(entry, tuple) else type(entry).__name__
            raise DataError(f"tensor {shown(name)} must be (data, format) or (data, format, shape), got a {actual}")
        try:
            fmt = format_named(entry[1])
        except NumbaDequantError as error:
            raise with_tensor_name(error, name) from error
        shape = entry[2] if len(entry) == 3 else None
        jobs.append(Job(entry[0], fmt, None, shape, outputs[name] if outputs else None, name))
    output = output_type(dtype, jobs[0].data, jobs[0].out) if jobs else output_type(dtype)
    for job in jobs:
        job.dtype = output
    return jobs


def output_mapping(out: Any) -> dict[Any, Any]:
    """The arrays to write to, by tensor name. Raises OutputError if `out` is not a mapping."""
    try:
        if not isinstance(out, type) and hasattr(out, "keys"):
            return dict(out)
    except Exception:  # noqa: S110 a foreign object may raise any exception
        pass
    raise OutputError(f"out must be a mapping, name -> array, got {shown(out)}")


def with_tensor_name(error: NumbaDequantError, name: Any) -> NumbaDequantError:
    """The same error, with the name of the tensor in its message."""
    return type(error)(f"tensor {shown(name)}: {error}")


def output_type(dtype: Any, data: Any = None, out: Any = None) -> str:
    """The name of the output type. None means that of `out`, PyTorch's default if `data` is a tensor, or float16.

    Raises:
        DtypeError: there is no such output type.
    """
    if dtype is not None:
        return dtype_name(dtype)
    if out is not None:
        try:
            return dtype_name(out.dtype)
        except Exception:  # the checks of `out` will report the problem
            return DEFAULT
    return dtype_name(TORCH.default_dtype()) if library_of(data) is TORCH else DEFAULT


def is_on_gpu(array: Any) -> bool:
    """Whether an object is in GPU memory, according to its DLPack device or its `__cuda_array_interface__`."""
    if isinstance(array, (bytes, bytearray, memoryview, np.ndarray)):
        return False
    try:
        library = library_of(array)
        if library is not None:
            return library.is_on_gpu(array)
        if hasattr(array, "__dlpack_device__"):
            return int(array.__dlpack_device__()[0]) in (2, 13)
        return not isinstance(array, type) and hasattr(array, "__cuda_array_interface__")
    except Exception:  # a foreign object may raise any exception; reading it will report the problem
        return False


def host_array(data: Any) -> NDArray[Any]:
    """Host memory as a plain NumPy array without a copy; it may be strided.

    Raises:
        DataError: `data` is not host memory, or its elements are not numbers.
    """
    if type(data) is np.ndarray:
        array = data
    elif type(data) is bytes:
        return np.frombuffer(data, np.uint8)
    elif isinstance(data, np.ma.MaskedArray):
        raise DataError("data is a masked array, and masked bytes have no meaning; pass data.data")
    elif isinstance(data, np.ndarray):
        array = data.view(np.ndarray)
    elif library_of(data) is TORCH:
        array = TORCH.host_array(data)
    else:
        array = _array_of_buffer(data)
    dtype = array.dtype
    if dtype.hasobject or dtype.kind in "OTU":
        raise DataError(f"data is an array of {dtype}, not of bytes; pass the blocks as an array of uint8")
    return array


def _array_of_buffer(data: Any) -> NDArray[Any]:
    if not isinstance(data, (str, type)):
        try:
            view = memoryview(data)
            if not view.nbytes:
                return np.empty(0, np.uint8)
            return np.frombuffer(view, np.uint8) if view.c_contiguous else np.asarray(view)
        except (TypeError, ValueError, BufferError, NotImplementedError):
            pass  # no buffer, or a buffer with elements that NumPy does not know
        if is_on_gpu(data):
            raise DataError(f"data is on a GPU ({type(data).__name__}); copy it to the host first")
        try:
            if hasattr(data, "__dlpack__"):
                return np.from_dlpack(data)
        except Exception as error:  # a foreign object may raise any exception
            raise DataError(
                f"cannot read bytes from {type(data).__name__}: {str(error).partition(chr(10))[0]}"
            ) from None
    raise DataError(
        f"cannot read bytes from {shown(data)}; pass bytes, a memoryview, a NumPy array, a PyTorch tensor, or an array "
        "on a GPU"
    )


def flat_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array, flat; copied only if the array is strided.

    Raises:
        DeviceError: there is not enough memory for a copy.
    """
    if not array.flags.c_contiguous:
        array = allocated(lambda: np.ascontiguousarray(array), array.nbytes, "a contiguous copy of the data")
    elif array.ndim == 1 and array.dtype.char == "B":
        return array
    return array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)


def host_bytes(data: Any) -> NDArray[np.uint8]:
    """Host memory as a flat array of bytes; copied only if it is strided.

    Raises:
        DataError: `data` is not host memory, or its elements are not numbers.
        DeviceError: there is not enough memory for a copy.
    """
    return flat_bytes(host_array(data))


def allocated(allocate: Callable[[], NDArray[Any]], n_bytes: int, purpose: str) -> NDArray[Any]:
    """The result of `allocate`, a function that creates an array of `n_bytes`.

    Raises:
        DeviceError: there is not enough memory.
    """
    try:
        return allocate()
    except (MemoryError, ValueError) as error:  # NumPy raises ValueError for impossible sizes
        raise DeviceError(f"the CPU is out of memory: {n_bytes:,} bytes are needed for {purpose}") from error


def result_shape(shape: Any, n_elements: int, out: Any) -> tuple[int, ...]:
    """The shape of a result: `shape`, otherwise that of `out`, otherwise one dimension.

    Raises:
        ShapeError: `shape` is not a shape, or has another number of elements.
    """
    if type(shape) is tuple and n_elements and has_elements(shape, n_elements):
        return shape
    if shape is None:
        if out is None:
            return (n_elements,)
        try:
            return tuple(out.shape)
        except Exception:  # the checks of `out` will report the problem
            return (n_elements,)
    extents = shape if type(shape) is tuple and all(type(extent) is int for extent in shape) else _extents(shape)
    if len(extents) > MAX_DIMENSIONS:
        raise ShapeError(f"shape has {len(extents)} dimensions, but an array has {MAX_DIMENSIONS} at most; pass fewer")
    if extents.count(-1) == 1:
        rest = -math.prod(extents)
        if rest <= 0 or n_elements % rest:
            raise ShapeError(
                f"no number in place of -1 gives shape {shown(extents)} the {n_elements} elements of the data; pass "
                "another shape"
            )
        extents = tuple(n_elements // rest if extent == -1 else extent for extent in extents)
    if math.prod(extents) != n_elements or min(extents, default=0) < 0:
        raise ShapeError(
            f"shape {shown(extents)} does not have as many elements as the data, {n_elements}; pass a shape that does"
        )
    if not n_elements and math.prod(max(extent, 1) for extent in extents) >= 2**60:
        raise ShapeError(
            f"shape {shown(extents)} has no elements, but its other extents are too large; pass smaller ones"
        )
    return extents


def has_elements(shape: tuple[Any, ...], n_elements: int) -> bool:
    """Whether a tuple is a shape of so many elements; the fast way for what is nearly always passed."""
    total = 1
    for extent in shape:
        if type(extent) is not int or extent < 0:
            return False
        total *= extent
    return total == n_elements and len(shape) <= MAX_DIMENSIONS


def _extents(shape: Any) -> tuple[int, ...]:
    try:
        if not isinstance(shape, (tuple, list)):
            # Arrays of all libraries have `tolist`; so does a memoryview, which is refused here.
            is_wrong = isinstance(shape, (str, bytes, bytearray, memoryview, type)) or is_freed(shape)
            if is_wrong or getattr(shape, "ndim", 1) > 1:
                raise TypeError  # noqa: TRY301
            if not isinstance(shape, Sequence) and not getattr(shape, "ndim", 0):
                shape = (shape,)
        # A longer sequence is refused anyway; it may be a whole tensor.
        shape = shape[: MAX_DIMENSIONS + 1]
        extents = tuple(map(whole_number, shape.tolist() if hasattr(shape, "tolist") else shape))
    except Exception:  # a foreign object may raise any exception
        extents = (None,)
    if None in extents:
        raise ShapeError(f"shape must be whole numbers, rows first, got {shown(shape)}")
    return extents  # type: ignore[return-value]


def host_output(job: Job, device: object) -> NDArray[Any]:
    """The caller's `out` as a plain NumPy array without a copy, after all checks.

    Raises:
        OutputError: the result cannot be written to `out`.
    """
    out = job.out
    if library_of(out) is TORCH:
        array = TORCH.host_output(out, job.result_dtype, device)
    elif isinstance(out, np.ma.MaskedArray):
        raise OutputError("out is a masked array; pass out.data")
    elif isinstance(out, np.ndarray):
        array = out if type(out) is np.ndarray else out.view(np.ndarray)
    elif is_on_gpu(out):
        raise OutputError(f"out is on a GPU, but the device is {device}; pass an array on the host")
    else:
        raise OutputError(f"out must be a NumPy array or a PyTorch tensor if the device is {device}, got {shown(out)}")
    job.check_output(array.dtype, array.shape)
    flags = array.flags
    if not flags.c_contiguous:
        raise OutputError(f"out is not C-contiguous (its strides are {array.strides}); pass a C-contiguous array")
    if not flags.writeable:
        raise OutputError("out is read-only; pass a writable array")
    if not flags.aligned:
        raise OutputError(f"the address of out is not a multiple of {array.itemsize}; pass an aligned array")
    return array


def after_writing(out: Any) -> None:
    """If `out` is a PyTorch tensor, tell autograd that its values have changed."""
    if library_of(out) is TORCH:
        TORCH.written(out)


def whole_option(name: str, value: Any, least: int) -> int:
    """The value of an integer option. Raises OptionError unless it is from `least` to 2**63 - 1."""
    number = whole_number(value, least)
    if number is None or number >= 2**63:
        raise OptionError(f"{name} must be a whole number, {least} or more, got {shown(value)}")
    return number


def flag_option(name: str, value: Any) -> bool:
    """The value of a boolean option. Raises OptionError if it is not a boolean."""
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)
