"""Checks that every device shares, all made before anything is allocated or launched."""

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
from numba_dequant.interop import TORCH, library_of

MAX_DIMENSIONS = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
"""Of a NumPy array."""

BYTES = np.dtype(np.uint8)


@dataclass(slots=True)
class Job:
    """One tensor to dequantize, which every backend takes.

    Attributes:
        data: its blocks, as the caller gave them; None for those of a file.
        fmt: their format.
        dtype: the output type; None for the blocks as they are.
        shape: of the result; as the caller gave it, until `measure` has checked it.
        out: the caller's array to write to, or None for new memory.
        name: of the tensor, where there are several.
        n_elements: of the result, once `measure` knows it.
    """

    data: Any
    fmt: Format
    dtype: str | None
    shape: Any = None
    out: Any = None
    name: Any = None
    n_elements: int = 0

    def measure(self, n_bytes: int) -> None:
        """Find the number of elements of that many bytes of blocks, and the shape of the result.

        Raises:
            DataError: that is not a whole number of blocks.
            ShapeError: the shape asked for has another number of elements.
        """
        self.n_elements = self.fmt.n_elements(n_bytes)
        self.shape = result_shape(self.shape, self.n_elements, self.out)

    @property
    def result_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the result."""
        return BYTES if self.dtype is None else self.fmt.result_dtype(self.dtype)

    def check_output(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Check that an `out` of that type and shape is right for the result.

        Raises:
            OutputError: it is not.
        """
        expected = self.result_dtype
        if dtype != expected:
            held = dtype.name if dtype.isnative else f"{dtype.name} of the other byte order"
            raise OutputError(f"out holds {held}, the result is {expected.name}; pass an array of {expected.name}")
        if shape != self.shape or math.prod(shape) != self.n_elements:
            wanted = f"{self.n_elements} elements" if shape == self.shape else f"shape {self.shape}"
            raise OutputError(f"out has shape {shape}, the result has {wanted}")


def parse_tensors(tensors: Any, dtype: Any, out: Any) -> list[Job]:
    """The tensors that were given as name -> (data, format) or (data, format, shape), with name -> `out`.

    All get one output type; if `dtype` is None, that of the first.

    Raises:
        DataError: `tensors` or an entry of it is something else.
        OutputError: `out` is something else, or has other names.
        UnknownFormatError: there is no such format.
        DtypeError: there is no such output type.
    """
    if not isinstance(tensors, Mapping):
        raise DataError(f"tensors must be a mapping, name -> (data, format), got {shown(tensors)}")
    outputs = None if out is None else output_mapping(out)
    if outputs is not None and outputs.keys() != tensors.keys():
        odd = next(iter(outputs.keys() ^ tensors.keys()))
        raise OutputError(f"{shown(odd)} is in one of tensors and out, not in both; give an array for each tensor")
    jobs = []
    for name, entry in tensors.items():
        if not isinstance(entry, tuple) or len(entry) not in (2, 3):
            given = f"tuple of {len(entry)}" if isinstance(entry, tuple) else type(entry).__name__
            raise DataError(f"tensor {shown(name)} is a {given}, not (data, format) or (data, format, shape)")
        data, fmt, *shape = entry
        try:
            known = format_named(fmt)
        except NumbaDequantError as error:
            raise with_tensor_name(error, name) from error
        jobs.append(Job(data, known, None, shape[0] if shape else None, outputs[name] if outputs else None, name))
    output = output_type(dtype, jobs[0].data, jobs[0].out) if jobs else output_type(dtype)
    for job in jobs:
        job.dtype = output
    return jobs


def output_mapping(out: Any) -> dict[Any, Any]:
    """The arrays to write to, by the name of a tensor.

    Raises:
        OutputError: it is not a mapping.
    """
    try:
        if not isinstance(out, type) and hasattr(out, "keys"):
            return dict(out)
    except Exception:  # noqa: S110 a foreign object may fail in any way
        pass
    raise OutputError(f"out must be a mapping, name -> array, got {shown(out)}")


def with_tensor_name(error: NumbaDequantError, name: Any) -> NumbaDequantError:
    """The same error, saying with which tensor it is."""
    return type(error)(f"tensor {shown(name)}: {error}")


def output_type(dtype: Any, data: Any = None, out: Any = None) -> str:
    """The name of the output type; None is that of `out`, or PyTorch's default for data of PyTorch's, or float16.

    Raises:
        DtypeError: it is none.
    """
    if dtype is not None:
        return dtype_name(dtype)
    if out is not None:
        try:
            return dtype_name(out.dtype)
        except Exception:  # what is wrong with `out` is said where it is looked at
            return DEFAULT
    return dtype_name(TORCH.default_dtype()) if library_of(data) is TORCH else DEFAULT


def is_on_gpu(thing: Any) -> bool:
    """Whether an object lies in GPU memory, by its DLPack device or its `__cuda_array_interface__`."""
    if isinstance(thing, (bytes, bytearray, memoryview, np.ndarray)):
        return False
    try:
        library = library_of(thing)
        if library is not None:
            return library.is_on_gpu(thing)
        if hasattr(thing, "__dlpack_device__"):
            return int(thing.__dlpack_device__()[0]) in (2, 13)
        return not isinstance(thing, type) and hasattr(thing, "__cuda_array_interface__")
    except Exception:  # a foreign object may fail in any way; where it is read, that is said
        return False


def host_array(data: Any) -> NDArray[Any]:
    """Host memory as a plain NumPy array, which is not copied; it need not be contiguous.

    Raises:
        DataError: it is not memory on the host, or holds anything but numbers.
    """
    if type(data) is np.ndarray:
        array = data
    elif type(data) is bytes:
        return np.frombuffer(data, np.uint8)
    elif isinstance(data, np.ma.MaskedArray):
        raise DataError("data is a masked array, whose masked bytes mean nothing; pass its attribute data")
    elif isinstance(data, np.ndarray):
        array = data.view(np.ndarray)
    elif library_of(data) is TORCH:
        array = TORCH.host_array(data)
    else:
        array = _array_of_buffer(data)
    kind = array.dtype
    if kind.hasobject or kind.kind in "OTU":
        raise DataError(f"data is an array of {array.dtype}, not of bytes; pass the blocks as an array of uint8")
    return array


def _array_of_buffer(data: Any) -> NDArray[Any]:
    if not isinstance(data, (str, type)):
        try:
            view = memoryview(data)
            if not view.nbytes:
                return np.empty(0, np.uint8)
            return np.frombuffer(view, np.uint8) if view.c_contiguous else np.asarray(view)
        except (TypeError, ValueError, BufferError, NotImplementedError):
            pass  # no buffer, or one of a type that NumPy cannot name: the ways below are left
        if is_on_gpu(data):
            raise DataError(f"data lies on a GPU ({type(data).__name__}); copy it to the host first")
        try:
            if hasattr(data, "__dlpack__"):
                return np.from_dlpack(data)
        except Exception as error:  # a foreign object may fail in any way
            raise DataError(
                f"cannot read bytes from {type(data).__name__}: {str(error).partition(chr(10))[0]}"
            ) from None
    raise DataError(
        f"cannot read bytes from {shown(data)}; pass bytes, a memoryview, a NumPy array, a PyTorch tensor, or an array "
        "on a GPU"
    )


def flat_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array, flat; copied only if it is not contiguous.

    Raises:
        DeviceError: there is no memory for a copy.
    """
    if not array.flags.c_contiguous:
        array = allocated(lambda: np.ascontiguousarray(array), array.nbytes, "a contiguous copy of the data")
    elif array.ndim == 1 and array.dtype.char == "B":
        return array
    return array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)


def host_bytes(data: Any) -> NDArray[np.uint8]:
    """Host memory as a flat array of bytes, which is copied only if it is not contiguous.

    Raises:
        DataError: it is not memory on the host, or holds anything but numbers.
        DeviceError: there is no memory for a copy.
    """
    return flat_bytes(host_array(data))


def allocated(allocate: Callable[[], NDArray[Any]], n_bytes: int, what: str) -> NDArray[Any]:
    """What `allocate` makes.

    Raises:
        DeviceError: there is not enough memory.
    """
    try:
        return allocate()
    except (MemoryError, ValueError) as error:  # NumPy says ValueError where no computer has as much
        raise DeviceError(f"the CPU is out of memory: {n_bytes:,} bytes were asked for, for {what}") from error


def result_shape(shape: Any, n_elements: int, out: Any) -> tuple[int, ...]:
    """The shape of a result of `n_elements`: as asked for, else that of `out`, else flat.

    Raises:
        ShapeError: the shape asked for is none, or has another number of elements.
    """
    if shape is None:
        if out is None:
            return (n_elements,)
        try:
            return tuple(out.shape)
        except Exception:  # what is wrong with `out` is said where it is looked at
            return (n_elements,)
    asked = shape if type(shape) is tuple and all(type(extent) is int for extent in shape) else _extents(shape)
    if len(asked) > MAX_DIMENSIONS:
        raise ShapeError(f"shape has {len(asked)} dimensions; an array has {MAX_DIMENSIONS} at most")
    if asked.count(-1) == 1:
        rest = -math.prod(asked)
        if rest <= 0 or n_elements % rest:
            raise ShapeError(
                f"no number in place of -1 gives shape {shown(asked)} the {n_elements} elements of the data"
            )
        asked = tuple(n_elements // rest if extent == -1 else extent for extent in asked)
    if math.prod(asked) != n_elements or min(asked, default=0) < 0:
        raise ShapeError(
            f"shape {shown(asked)} does not have as many elements as the data, {n_elements}; pass a shape that does"
        )
    if not n_elements and math.prod(max(extent, 1) for extent in asked) >= 2**60:
        raise ShapeError(f"shape {shown(asked)} is larger than any array, although it has no elements")
    return asked


def _extents(shape: Any) -> tuple[int, ...]:
    try:
        if not isinstance(shape, (tuple, list)):
            # Arrays of any library have `tolist`; so does a memoryview, of bytes.
            if getattr(shape, "ndim", 1) > 1 or isinstance(shape, (str, bytes, bytearray, memoryview, type)):
                raise TypeError  # noqa: TRY301
            if not isinstance(shape, Sequence) and not getattr(shape, "ndim", 0):
                shape = (shape,)
        # More than that is refused anyway, and may be a whole tensor.
        shape = shape[: MAX_DIMENSIONS + 1]
        found = tuple(map(whole_number, shape.tolist() if hasattr(shape, "tolist") else shape))
    except Exception:  # a foreign object may fail in any way
        found = (None,)
    if None in found:
        raise ShapeError(f"shape must be whole numbers, rows first, got {shown(shape)}")
    return found  # type: ignore[return-value]


def host_output(job: Job, device: object) -> NDArray[Any]:
    """The memory of the caller's `out` as a plain NumPy array, which is right in every way for the result.

    Raises:
        OutputError: it is not.
    """
    out = job.out
    if library_of(out) is TORCH:
        array = TORCH.host_output(out, job.result_dtype, device)
    elif isinstance(out, np.ma.MaskedArray):
        raise OutputError("out is a masked array; pass its attribute data")
    elif isinstance(out, np.ndarray):
        array = out if type(out) is np.ndarray else out.view(np.ndarray)
    elif is_on_gpu(out):
        raise OutputError(f"out lies on a GPU, the device is {device}")
    else:
        raise OutputError(
            f"out must be a NumPy array or a PyTorch tensor where the device is {device}, got {shown(out)}"
        )
    job.check_output(array.dtype, array.shape)
    flags = array.flags
    if not flags.c_contiguous:
        raise OutputError(f"out is not contiguous, rows first (its strides are {array.strides}); pass an array that is")
    if not flags.writeable:
        raise OutputError("out is read-only; pass a writable array")
    if not flags.aligned:
        raise OutputError(f"out lies at an address that is not a multiple of {array.itemsize}; pass an aligned array")
    return array


def after_writing(out: Any) -> None:
    """Tell PyTorch, if `out` is a tensor, that its values have changed, as its own functions do."""
    if library_of(out) is TORCH:
        TORCH.written(out)


def whole_option(name: str, value: Any, least: int) -> int:
    """An option that is a whole number.

    Raises:
        OptionError: it is something else, less than `least`, or more than any number of things.
    """
    found = whole_number(value, least)
    if found is None or found >= 2**63:
        raise OptionError(f"{name} must be a whole number, {least} or more, got {shown(value)}")
    return found


def flag_option(name: str, value: Any) -> bool:
    """An option that is True or False.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)
