"""PyTorch and CuPy, where a program uses them: their arrays, their current streams, their memory.

Neither is imported here. An array of theirs exists only in a program that has imported its library.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DataError, OutputError


class ArrayView(NamedTuple):
    """Where an array lies on a GPU.

    Attributes:
        pointer: its address.
        n_bytes: its length.
        device: ordinal of its GPU.
        dtype: of its elements; raw bytes where NumPy has no such type.
        shape: rows first.
        array: the array that owns the memory, a contiguous copy if the given one was strided.
        is_copy: whether it is a copy.
    """

    pointer: int
    n_bytes: int
    device: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    array: Any
    is_copy: bool


class Library(Protocol):
    """What this package asks of PyTorch and CuPy."""

    name: str

    def is_on_gpu(self, array: Any) -> bool:
        """Whether an array of this library lies in the memory of a CUDA GPU."""

    def device_of(self, array: Any) -> int:
        """Ordinal of the GPU on which an array lies."""

    def current_stream(self, index: int) -> int:
        """Handle of the stream on which the library works now, on that GPU and in this thread."""

    def keeper(self, index: int) -> Any:
        """What keeps the current stream from being destroyed."""

    def is_contiguous(self, array: Any) -> bool:
        """Whether an array is one contiguous piece of memory, rows first."""

    def view(self, array: Any) -> ArrayView:
        """Where an array on a GPU lies. One that is not contiguous is copied first, on the current stream."""

    def copy(self, target: Any, array: Any, index: int, stream: int) -> None:
        """Queue a copy of an array to another of its shape, both on a GPU, on a stream."""

    def is_capturing(self) -> bool:
        """Whether this thread captures a CUDA graph on the library's current stream."""


class Torch:
    """PyTorch."""

    name = "torch"

    @property
    def _torch(self) -> Any:
        return sys.modules["torch"]

    def default_dtype(self) -> Any:
        """What a tensor of floats is of where nobody says."""
        return self._torch.get_default_dtype()

    def has_memory(self, array: Any) -> bool:
        """Whether a tensor has memory: one on the meta device has none, nor has one that stands for another."""
        fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
        return not array.is_meta and not isinstance(array, fake)

    def is_on_gpu(self, array: Any) -> bool:
        """Whether a tensor lies in the memory of a CUDA GPU."""
        return bool(array.is_cuda) and (type(array) is self._torch.Tensor or self.has_memory(array))

    def is_pinned(self, array: Any) -> bool:
        """Whether a tensor lies in pinned host memory."""
        return self.has_gpu and array.device.type == "cpu" and bool(array.is_pinned())

    def device_of(self, array: Any) -> int:
        """Ordinal of the GPU on which a tensor lies."""
        return int(array.get_device())

    @property
    def has_gpu(self) -> bool:
        """Whether the program has used a GPU through PyTorch: before that, it has no stream of its own."""
        return bool(self._torch.cuda.is_initialized())

    def current_stream(self, index: int) -> int:
        """Handle of PyTorch's current stream; the program has used a GPU through PyTorch."""
        # The public way makes an object of Python's, which takes ten times as long.
        raw = _raw_stream_of_torch()
        return int(raw(index) if raw is not None else self._torch.cuda.current_stream(index).cuda_stream)

    def keeper(self, index: int) -> Any:
        """Nothing: PyTorch never destroys a stream of its pool."""
        return None

    def is_contiguous(self, array: Any) -> bool:
        """Whether a tensor is one contiguous piece of memory, rows first."""
        return bool(array.is_contiguous())

    def view(self, array: Any) -> ArrayView:
        """Where a tensor on a GPU lies; it may be one that requires gradients."""
        is_copy = not array.is_contiguous()
        if is_copy:
            array = array.detach().contiguous()
        dtype = _dtype_of_torch(array.dtype)
        shape = tuple(array.shape)
        n_bytes = array.numel() * array.element_size()
        return ArrayView(array.data_ptr(), n_bytes, array.get_device(), dtype, shape, array, is_copy)

    def copy(self, target: Any, array: Any, index: int, stream: int) -> None:
        """Queue a copy of a tensor to another of its shape, both on a GPU, on a stream."""
        with self._torch.no_grad(), self._torch.cuda.stream(self._external(stream, index)):
            target.copy_(array)

    def host_array(self, array: Any) -> NDArray[Any]:
        """The bytes of a tensor on the CPU, as numbers of the size of its elements, where they lie.

        Raises:
            DataError: it has no memory of its own on the CPU.
        """
        try:
            if type(array) is self._torch.Tensor and array.dtype is self._torch.uint8 and array.device.type == "cpu":
                return array.numpy()  # type: ignore[no-any-return]
            with self._as_plain(array):
                problem = self._problem_on_host(array)
                if problem is None:
                    plain = self._torch.Tensor.detach(array)
                    if plain.is_conj() or plain.is_neg():
                        plain = plain.resolve_conj().resolve_neg()
                    kind = _integer_of_torch(plain.element_size())
                    return (plain if kind is None else plain.view(kind)).numpy()  # type: ignore[no-any-return]
        except Exception as error:  # a subclass of tensors may fail in any way
            problem = _first_line(error)
        raise DataError(f"cannot read bytes from a {type(array).__name__}: {problem}")

    def host_output(self, array: Any, dtype: np.dtype[Any], place: object) -> NDArray[Any]:
        """The memory of a tensor on the CPU that values are written to.

        One that requires gradients may be a leaf, such as a parameter, which is written to as `load_state_dict` does.

        Raises:
            OutputError: it has no memory of its own on the CPU, or is of another type.
        """
        try:
            with self._as_plain(array):
                problem = self._problem_on_host(array)
                name = str(array.dtype).removeprefix("torch.")
                if problem is None and name != dtype.name:
                    problem = f"it holds {name}, the result is {dtype.name}; pass a tensor of {dtype.name}"
                if problem is None and array.requires_grad and not array.is_leaf and self._torch.is_grad_enabled():
                    problem = "it is the result of a computation that keeps gradients; pass out.detach()"
                if problem is None:
                    plain = self._torch.Tensor.detach(array)
                    if name == "bfloat16":
                        return plain.view(self._torch.int16).numpy().view(dtype)  # type: ignore[no-any-return]
                    return plain.numpy()  # type: ignore[no-any-return]
        except Exception as error:  # a subclass of tensors may fail in any way
            problem = _first_line(error)
        raise OutputError(f"cannot write to out, a {type(array).__name__}, where the device is {place}: {problem}")

    def _problem_on_host(self, array: Any) -> str | None:
        """Why a tensor has no memory on the CPU; None if it has."""
        if not self.has_memory(array):
            return (
                "it is a tensor without memory (meta or fake). Pass a real tensor, outside of what torch.compile and "
                "torch.export trace; an operator that they can trace is to come with the module numba_dequant.torch"
            )
        return None if array.device.type == "cpu" else f"it lies on {array.device}; copy it to the CPU first"

    def written(self, array: Any) -> None:
        """Tell autograd that the values of a tensor have changed, as PyTorch's own functions do."""
        with self._as_plain(array):
            if not array.is_inference():
                self._torch.autograd.graph.increment_version(array)

    def _as_plain(self, array: Any) -> AbstractContextManager[Any]:
        """Within this, functions treat a subclass of tensors as what it is made of."""
        if type(array) in (self._torch.Tensor, self._torch.nn.Parameter):
            return nullcontext()
        context: AbstractContextManager[Any] = self._torch._C.DisableTorchFunctionSubclass()
        return context

    def empty(self, n_bytes: int, index: int) -> Any:
        """Memory from PyTorch's caching allocator, in the order of the current stream.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        return self._torch.empty(n_bytes, dtype=self._torch.uint8, device=_torch_device(index))

    def to_gpu(self, array: Any, index: int, stream: int) -> Any:
        """A copy on a GPU of a host tensor, as bytes; PyTorch keeps pinned memory until the copy has run."""
        torch = self._torch
        with self._as_plain(array), torch.cuda.stream(self._external(stream, index)):
            blocks = array.detach().reshape(-1).view(torch.uint8)
            return blocks.to(_torch_device(index), non_blocking=True)

    def is_capturing(self) -> bool:
        """Whether this thread captures a CUDA graph on PyTorch's current stream."""
        return bool(self._torch.cuda.is_current_stream_capturing())

    def record_stream(self, array: Any, index: int, stream: int) -> None:
        """Let PyTorch hand out the memory of a dropped tensor only after what `stream` has been asked so far."""
        array.record_stream(self._external(stream, index))

    def _external(self, stream: int, index: int) -> Any:
        return self._torch.cuda.ExternalStream(stream, device=index)


class CuPy:
    """CuPy."""

    name = "cupy"

    def _cuda(self) -> Any:
        return sys.modules["cupy"].cuda

    def is_on_gpu(self, array: Any) -> bool:
        """Always: CuPy has no other arrays."""
        return True

    def device_of(self, array: Any) -> int:
        """Ordinal of the GPU on which an array lies."""
        return int(array.device.id)

    def current_stream(self, index: int) -> int:
        """Handle of CuPy's current stream."""
        return int(self.keeper(index).ptr)

    def keeper(self, index: int) -> Any:
        """The current stream as CuPy's object, which destroys the stream when it is dropped."""
        return self._cuda().get_current_stream(index)

    def is_contiguous(self, array: Any) -> bool:
        """Whether an array is one contiguous piece of memory, rows first."""
        return bool(array.flags.c_contiguous)

    def view(self, array: Any) -> ArrayView:
        """Where an array lies."""
        is_copy = not array.flags.c_contiguous
        if is_copy:
            array = sys.modules["cupy"].ascontiguousarray(array)
        found = int(array.data.ptr), int(array.nbytes), int(array.device.id)
        return ArrayView(*found, array.dtype, tuple(array.shape), array, is_copy)

    def copy(self, target: Any, array: Any, index: int, stream: int) -> None:
        """Queue a copy of an array to another of its shape, on a stream."""
        kind = self._cuda().Stream
        # Before CuPy 14 there was ExternalStream, which it warns of since.
        is_new = hasattr(kind, "from_external")
        external = kind.from_external(_StreamHandle(stream)) if is_new else self._cuda().ExternalStream(stream, index)
        with external:
            sys.modules["cupy"].copyto(target, array)

    def is_capturing(self) -> bool:
        """Whether this thread captures a CUDA graph on CuPy's current stream."""
        return bool(self._cuda().get_current_stream().is_capturing())


class _StreamHandle:
    """A stream of somebody else's, by the protocol that libraries have for it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


TORCH, CUPY = Torch(), CuPy()


def library_of(thing: object) -> Library | None:
    """The library whose array this is: PyTorch, CuPy, or None for anything else."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(thing, getattr(torch, "Tensor", ())):
        return TORCH
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(thing, getattr(cupy, "ndarray", ())):
        return CUPY
    return None


def libraries_with_streams() -> list[Library]:
    """The libraries of this program that may be at work on a stream of their own."""
    found: list[Library] = []
    if getattr(sys.modules.get("torch"), "cuda", None) is not None and TORCH.has_gpu:
        found.append(TORCH)
    if getattr(sys.modules.get("cupy"), "cuda", None) is not None:
        found.append(CUPY)
    return found


def library_that_captures() -> Library | None:
    """The library with which this thread is capturing a CUDA graph."""
    for library in libraries_with_streams():
        if library.is_capturing():
            return library
    return None


@lru_cache
def _dtype_of_torch(dtype: Any) -> np.dtype[Any]:
    name = str(dtype).removeprefix("torch.")
    try:
        return numpy_dtype(name)
    except TypeError:  # float8 and the like: only their bytes matter here
        return np.dtype(f"V{dtype.itemsize}")


@lru_cache
def _integer_of_torch(size: int) -> Any:
    """The integers of that many bytes, which NumPy has whatever the tensor holds."""
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
