"""Access to the arrays, the current streams and the memory of PyTorch and CuPy, without importing them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DataError, OutputError


class ArrayView(NamedTuple):
    """The memory of an array on a GPU.

    Attributes:
        pointer: the address.
        n_bytes: the size in bytes.
        device: the ordinal of the GPU.
        dtype: the dtype of the elements; void if NumPy has no such type.
        shape: rows first.
        array: the array that owns the memory; a contiguous copy if the original was strided.
        is_copy: whether `array` is a copy.
    """

    pointer: int
    n_bytes: int
    device: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    array: Any
    is_copy: bool


class Torch:
    """PyTorch."""

    name = "torch"

    @property
    def _torch(self) -> Any:
        return sys.modules["torch"]

    def default_dtype(self) -> Any:
        """PyTorch's default floating-point dtype."""
        return self._torch.get_default_dtype()

    def has_memory(self, array: Any) -> bool:
        """Whether a tensor has memory; meta and fake tensors have none."""
        fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
        return not array.is_meta and not isinstance(array, fake)

    def why_freed(self, array: Any) -> str | None:
        """Why the memory of a tensor cannot be used, or None if its storage is as large as the tensor.

        A program can resize a storage and keep its tensors, as FSDP does between two uses of a parameter. PyTorch
        itself checks nothing, so that access to such a tensor may end the process.
        """
        torch, kind = self._torch, type(array)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return self._why_freed(array)
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return None  # a wrapper has no storage; the tensors in it are checked where they are used
        with self._as_plain(array):
            return self._why_freed(array)

    def _why_freed(self, array: Any) -> str | None:
        last = array.numel() - 1
        if last < 0:
            return None
        try:
            n_bytes = array.untyped_storage().nbytes()
        except NotImplementedError:  # a wrapper of torch.func
            return None
        if not array.is_contiguous():
            last = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.stride(), strict=True))
        needed = (array.storage_offset() + last + 1) * array.element_size()
        if needed <= n_bytes:
            return None
        return (
            f"its memory was freed: its storage has {n_bytes:,} of the {needed:,} bytes that it needs; pass a tensor "
            "whose storage is whole"
        )

    def is_on_gpu(self, array: Any) -> bool:
        """Whether a tensor is on a CUDA GPU."""
        return bool(array.is_cuda) and (type(array) is self._torch.Tensor or self.has_memory(array))

    def is_pinned(self, array: Any) -> bool:
        """Whether a tensor is in pinned host memory, all of which is there."""
        is_pinned = self.has_gpu and array.device.type == "cpu" and bool(array.is_pinned())
        return is_pinned and self.why_freed(array) is None

    def device_of(self, array: Any) -> int:
        """The ordinal of the GPU of a tensor."""
        return int(array.get_device())

    @property
    def has_gpu(self) -> bool:
        """Whether PyTorch has initialized CUDA; before that, it has no current stream."""
        return bool(self._torch.cuda.is_initialized())

    def current_stream(self, index: int) -> int:
        """The handle of PyTorch's current stream; requires `has_gpu`."""
        # The public function creates a Python object, which is ten times slower.
        raw = _raw_stream_of_torch()
        return int(raw(index) if raw is not None else self._torch.cuda.current_stream(index).cuda_stream)

    def keeper(self, index: int) -> Any:
        """None: PyTorch never destroys the streams of its pool."""
        return None

    def is_contiguous(self, array: Any) -> bool:
        """Whether a tensor is C-contiguous."""
        return bool(array.is_contiguous())

    def view(self, array: Any) -> ArrayView:
        """The memory of a tensor on a GPU; the tensor may require gradients.

        Raises:
            DataError: its memory was freed.
        """
        if problem := self.why_freed(array):
            raise DataError(f"cannot use a {type(array).__name__}: {problem}")
        is_copy = not array.is_contiguous()
        if is_copy:
            array = array.detach().contiguous()
        dtype = _dtype_of_torch(array.dtype)
        shape = tuple(array.shape)
        n_bytes = array.numel() * array.element_size()
        return ArrayView(array.data_ptr(), n_bytes, array.get_device(), dtype, shape, array, is_copy)

    def copy(self, target: Any, array: Any, index: int, stream: int) -> None:
        """Queue a copy to a tensor of the same shape on the same GPU, on a stream."""
        with self._torch.no_grad(), self._torch.cuda.stream(self._external(stream, index)):
            target.copy_(array)

    def host_array(self, array: Any) -> NDArray[Any]:
        """A CPU tensor as a NumPy array of integers of the same item size.

        Elements for which NumPy has no integer keep their type. The memory is shared; only a conjugate or negative view
        is copied.

        Raises:
            DataError: the tensor has no memory on the CPU.
        """
        try:
            is_plain = type(array) is self._torch.Tensor and array.dtype is self._torch.uint8
            if is_plain and array.device.type == "cpu" and self.why_freed(array) is None:
                return array.numpy()  # type: ignore[no-any-return]
            with self._as_plain(array):
                problem = self._problem_on_host(array)
                if problem is None:
                    plain = self._torch.Tensor.detach(array)
                    if plain.is_conj() or plain.is_neg():
                        plain = plain.resolve_conj().resolve_neg()
                    integer = _integer_of_torch(plain.element_size())
                    return (plain if integer is None else plain.view(integer)).numpy()  # type: ignore[no-any-return]
        except Exception as error:  # a subclass of tensors may fail in any way
            problem = _first_line(error)
        raise DataError(f"cannot read bytes from a {type(array).__name__}: {problem}")

    def host_output(self, array: Any, dtype: np.dtype[Any], device: object) -> NDArray[Any]:
        """A CPU tensor as a writable NumPy array of `dtype`, without a copy.

        A leaf that requires gradients, such as a parameter, is accepted, as in `load_state_dict`.

        Raises:
            OutputError: the tensor has no memory on the CPU, has another dtype, or is the result of a computation that
                keeps gradients.
        """
        try:
            with self._as_plain(array):
                problem = self._problem_on_host(array)
                name = str(array.dtype).removeprefix("torch.")
                if problem is None and name != dtype.name:
                    problem = f"it holds {name}, the result is {dtype.name}; pass a tensor of {dtype.name}"
                if problem is None:
                    problem = self.why_not_written(array)
                if problem is None:
                    plain = self._torch.Tensor.detach(array)
                    if dtype.isbuiltin != 1:  # PyTorch's `numpy` takes only types of NumPy itself
                        integer = getattr(self._torch, f"int{8 * dtype.itemsize}")
                        return plain.view(integer).numpy().view(dtype)  # type: ignore[no-any-return]
                    return plain.numpy()  # type: ignore[no-any-return]
        except Exception as error:  # a subclass of tensors may fail in any way
            problem = _first_line(error)
        raise OutputError(f"cannot write to out, a {type(array).__name__}, where the device is {device}: {problem}")

    def why_not_written(self, array: Any) -> str | None:
        """Why a tensor cannot be written, or None if it can: its memory was freed, or autograd would not let it."""
        if problem := self.why_freed(array):
            return problem
        if array.requires_grad and not array.is_leaf and self._torch.is_grad_enabled():
            return "it is the result of a computation that keeps gradients; pass out.detach()"
        return None

    def _problem_on_host(self, array: Any) -> str | None:
        """Why a tensor has no memory on the CPU, or None if it has."""
        if not self.has_memory(array):
            return (
                "it is a tensor without memory (meta or fake). Pass a real tensor, or call "
                "numba_dequant.torch.dequantize, which torch.compile and torch.export can trace"
            )
        if array.device.type != "cpu":
            return f"it is on {array.device}; copy it to the CPU first"
        return self.why_freed(array)

    def written(self, array: Any) -> None:
        """Tell autograd that a tensor was modified in place."""
        with self._as_plain(array):
            if not array.is_inference():
                self._torch.autograd.graph.increment_version(array)

    def _as_plain(self, array: Any) -> AbstractContextManager[Any]:
        """A context in which PyTorch functions treat a tensor subclass as a plain tensor."""
        if type(array) in (self._torch.Tensor, self._torch.nn.Parameter):
            return nullcontext()
        context: AbstractContextManager[Any] = self._torch._C.DisableTorchFunctionSubclass()
        return context

    def empty(self, shape: tuple[int, ...], dtype: str, index: int) -> Any:
        """A tensor in memory of PyTorch's caching allocator, ordered on the current stream.

        Raises:
            torch.OutOfMemoryError: not enough memory.
        """
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=_torch_device(index))

    def to_gpu(self, array: Any, index: int, stream: int) -> Any:
        """Copy a host tensor to a GPU, as bytes. PyTorch keeps pinned memory alive until the copy is done."""
        torch = self._torch
        with self._as_plain(array), torch.cuda.stream(self._external(stream, index)):
            blocks = array.detach().reshape(-1).view(torch.uint8)
            return blocks.to(_torch_device(index), non_blocking=True)

    def can_compute(self) -> bool:
        """Whether the program has imported PyTorch, and it can use a GPU."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        return cuda is not None and bool(cuda.is_available())

    def from_dlpack(self, capsule: object) -> Any:
        """The tensor of a DLPack capsule."""
        return self._torch.from_dlpack(capsule)

    def converted(self, array: Any, dtype: str) -> Any:
        """The tensor in a dtype, which is given by its name."""
        return array.to(getattr(self._torch, dtype))

    @contextmanager
    def computing_on(self, index: int, stream: int) -> Iterator[None]:
        """A context in which PyTorch computes on a stream, in the types of the tensors and without gradients."""
        torch = self._torch
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.stream(self._external(stream, index)):
            yield

    def write_product(self, out: Any, x: Any, values: Any, bias: Any) -> None:
        """Queue ``x @ values.T + bias``, rounded to the dtype of the tensor `out`."""
        out.copy_(self._torch.nn.functional.linear(x, values, bias))

    def is_capturing(self) -> bool:
        """Whether this thread captures a CUDA graph on PyTorch's current stream."""
        return bool(self._torch.cuda.is_current_stream_capturing())

    def record_stream(self, array: Any, index: int, stream: int) -> None:
        """Let PyTorch reuse the memory of a dropped tensor only after the work now queued on `stream`."""
        array.record_stream(self._external(stream, index))

    def _external(self, stream: int, index: int) -> Any:
        cuda = self._torch.cuda
        # For the handle 0, ExternalStream would be a new stream.
        return cuda.ExternalStream(stream, device=index) if stream else cuda.default_stream(index)


class CuPy:
    """CuPy."""

    name = "cupy"

    def _cuda(self) -> Any:
        return sys.modules["cupy"].cuda

    def is_on_gpu(self, array: Any) -> bool:
        """Always True."""
        return True

    def device_of(self, array: Any) -> int:
        """The ordinal of the GPU of an array."""
        return int(array.device.id)

    def current_stream(self, index: int) -> int:
        """The handle of CuPy's current stream."""
        return int(self.keeper(index).ptr)

    def keeper(self, index: int) -> Any:
        """The current stream as a CuPy object. CuPy destroys the stream when the object is dropped."""
        return self._cuda().get_current_stream(index)

    def is_contiguous(self, array: Any) -> bool:
        """Whether an array is C-contiguous."""
        return bool(array.flags.c_contiguous)

    def why_not_written(self, array: Any) -> str | None:
        """None: CuPy lets every array be written."""
        return None

    def view(self, array: Any) -> ArrayView:
        """The memory of an array."""
        is_copy = not array.flags.c_contiguous
        if is_copy:
            array = sys.modules["cupy"].ascontiguousarray(array)
        memory = int(array.data.ptr), int(array.nbytes), int(array.device.id)
        return ArrayView(*memory, array.dtype, tuple(array.shape), array, is_copy)

    def copy(self, target: Any, array: Any, index: int, stream: int) -> None:
        """Queue a copy to an array of the same shape on the same GPU, on a stream."""
        stream_type = self._cuda().Stream
        # CuPy 14 deprecates ExternalStream.
        make = getattr(stream_type, "from_external", None)
        with make(_StreamHandle(stream)) if make else self._cuda().ExternalStream(stream, index):
            sys.modules["cupy"].copyto(target, array)

    def is_capturing(self) -> bool:
        """Whether this thread captures a CUDA graph on CuPy's current stream."""
        return bool(self._cuda().get_current_stream().is_capturing())


class _StreamHandle:
    """A foreign stream with the `__cuda_stream__` protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


Library = Torch | CuPy
TORCH, CUPY = Torch(), CuPy()


def library_of(thing: object) -> Library | None:
    """PyTorch or CuPy if `thing` is an array of that library; otherwise None."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(thing, getattr(torch, "Tensor", ())):
        return TORCH
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(thing, getattr(cupy, "ndarray", ())):
        return CUPY
    return None


def is_freed(thing: object) -> bool:
    """Whether `thing` is a tensor whose memory was freed; even a look at its values may end the process."""
    return library_of(thing) is TORCH and TORCH.why_freed(thing) is not None


def libraries_with_streams() -> list[Library]:
    """The imported libraries that may have a current stream of their own."""
    libraries: list[Library] = []
    if getattr(sys.modules.get("torch"), "cuda", None) is not None and TORCH.has_gpu:
        libraries.append(TORCH)
    if getattr(sys.modules.get("cupy"), "cuda", None) is not None:
        libraries.append(CUPY)
    return libraries


def library_that_captures() -> Library | None:
    """The library with which this thread captures a CUDA graph, or None."""
    for library in libraries_with_streams():
        if library.is_capturing():
            return library
    return None


@lru_cache
def _dtype_of_torch(dtype: Any) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    try:
        return numpy_dtype(name)
    except TypeError:  # float8 and others; only their bytes are used
        return np.dtype(f"V{dtype.itemsize}")


@lru_cache
def _integer_of_torch(size: int) -> Any:
    """PyTorch's integer dtype of `size` bytes, which NumPy can represent; None if there is none."""
    torch = sys.modules["torch"]
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(size)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


@lru_cache(maxsize=1)
def _raw_stream_of_torch() -> Any:
    return getattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", None)


@lru_cache
def _torch_device(index: int) -> Any:
    return sys.modules["torch"].device("cuda", index)
