"""The entry points. `dequantize_many(...)` is `prepare_many(...).run()`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union, overload

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import (
    Memory,
    after_writing,
    allocated,
    check_apart,
    flat_bytes,
    host_array,
    host_output,
    is_on_gpu,
    memory_of_array,
    output_type,
    parse_tensors,
    result_shape,
    with_tensor_name,
)
from numba_dequant.backends import host
from numba_dequant.backends.devices import DeviceSpec, parse_device
from numba_dequant.backends.dlpack import shareable
from numba_dequant.errors import DeviceError, NumbaDequantError, OutputError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.kernels.launch_shape import launch_shape

if TYPE_CHECKING:  # it imports what only a GPU needs
    from numba_dequant.backends.device_tensor import DeviceTensor

Key = TypeVar("Key")


class Batch(Generic[Key]):
    """Many tensors that have been checked and given their memory: what is left of `dequantize_many` is to compute.

    Attributes:
        results: name -> result, which every `run` fills anew.
    """

    def __init__(self, results: dict[Key, Array], work: Callable[[], object]) -> None:
        self.results = results
        self._work = work

    def run(self) -> dict[Key, Array]:
        """Compute all results, on a GPU by one launch per format, in the order of the stream."""
        self._work()
        return self.results

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"Batch({len(self)} tensors)"


Array = Union[NDArray[Any], "DeviceTensor"]
"""What comes back: a NumPy array from the CPU, a `DeviceTensor` from a GPU."""

Out = TypeVar("Out")

_Shape = Sequence[int] | NDArray[Any] | int | None


@overload
def dequantize(
    data: Any,
    format: str | int | Format,
    dtype: Any = ...,
    *,
    shape: _Shape = ...,
    device: Any = ...,
    out: Out,
    stream: Any = ...,
    mapping: str = ...,
) -> Out: ...


@overload
def dequantize(
    data: Any,
    format: str | int | Format,
    dtype: Any = ...,
    *,
    shape: _Shape = ...,
    device: Literal["reference", "cpu"],
    out: None = ...,
    stream: None = ...,
    mapping: str = ...,
) -> NDArray[Any]: ...


@overload
def dequantize(
    data: Any,
    format: str | int | Format,
    dtype: Any = ...,
    *,
    shape: _Shape = ...,
    device: Any = ...,
    out: None = ...,
    stream: Any = ...,
    mapping: str = ...,
) -> Array: ...


def dequantize(
    data: Any,
    format: str | int | Format,
    dtype: Any = "float16",
    *,
    shape: _Shape = None,
    device: Any = None,
    out: Any = None,
    stream: Any = None,
    mapping: str = "tile",
) -> Any:
    """The values of compressed blocks.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> nd.dequantize(block, "Q8_0", device="cpu")[:4]
    array([0. , 0.5, 1. , 1.5], dtype=float16)

    Args:
        data: whole blocks: bytes, a memoryview, a NumPy array, a PyTorch tensor, or an array on a GPU that has
            `__cuda_array_interface__` or `__dlpack__` (CuPy, Numba). An array counts by its bytes, whatever its dtype.
            It is read where it lies; one that is not contiguous, such as rows of a padded array, is copied first.
        format: a name in `FORMATS`, in any case; a ggml id, also as a member of gguf-py's `GGMLQuantizationType`; or a
            `Format`.
        dtype: "float16", "bfloat16" or "float32", one of their other names ("fp16", "half", "bf16", "fp32", ...), or a
            NumPy, ml_dtypes or PyTorch dtype. None is the dtype of `out`; without `out`, PyTorch's default dtype if
            `data` is a PyTorch tensor, and otherwise float16. Values are those of GGML in float32, rounded once to
            nearest even. Integers and F64 are returned as they are stored.
        shape: of the result, rows first; flat without one. One number may be -1: it follows from the others.
        device: "reference" (NumPy), "cpu", "cuda", "cuda:1"..., the ordinal of a GPU, or a device of PyTorch, JAX,
            CuPy or Numba. None is the GPU that `data` lies on, else the first GPU, else the CPU, which is then said
            once in a warning.
        out: array to write to, contiguous and of the right shape and type: on the CPU NumPy's or PyTorch's, on a GPU
            anything. It is returned. A PyTorch tensor may require gradients if it is a leaf, such as a parameter;
            autograd then sees changed values and no computation.
        stream: on which to compute (CUDA): an int, a stream of PyTorch, CuPy or Numba, or an object with
            `__cuda_stream__`. None is the current stream of PyTorch or CuPy where data or `out` is theirs, and
            otherwise the legacy default stream. The host does not wait for it.
        mapping: how the kernel is cut (CUDA): "tile", or "block" for one thread block per quant block.

    Returns:
        A NumPy array from the CPU, a `DeviceTensor` from CUDA, or `out`. ``torch.from_dlpack`` takes either, without a
        copy: arrays in bfloat16 are `Bfloat16Array`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: what is wrong with the
            argument of that name. Nothing has been launched or written then.
        OptionError: there is no such `mapping`.
        DeviceError: also if there is not enough memory.
    """
    fmt = format_named(format)
    name = output_type(dtype, data, out)
    launch_shape(mapping, fmt)
    place = _device_for(data if is_on_gpu(data) else None, device, stream)
    if place.kind == "cuda":
        from numba_dequant.backends.gpu import dequantize as dequantize_on_gpu

        return dequantize_on_gpu(data, fmt, name, shape, place.index, out, stream, mapping)
    job = _prepared(host_array(data), fmt, name, shape, place, out, mapping)
    job.compute()
    return job.result


def dequantize_many(
    tensors: Mapping[Key, tuple[Any, ...]],
    dtype: Any = "float16",
    *,
    device: Any = None,
    out: Mapping[Key, Any] | None = None,
    stream: Any = None,
) -> dict[Key, Array]:
    """The values of many tensors; on a GPU by one launch per format, where a launch each would take longer.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> found = nd.dequantize_many({"a": (block, "Q8_0"), "b": (block * 2, "Q8_0", (2, 32))}, device="cpu")
    >>> found["b"].shape
    (2, 32)

    Args:
        tensors: name -> (data, format) or (data, format, shape), each as for `dequantize`.
        dtype: as for `dequantize`; None follows the first tensor.
        device: as for `dequantize`; data may lie on the host and on that GPU.
        out: name -> array to write to, for all of them or for none. None may share memory with another, nor with any
            data.
        stream: as for `dequantize`.

    Returns:
        name -> result, in the order of `tensors`. On a GPU, small results share allocations of up to 64 MiB, which go
        back once none of theirs is used.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: what is wrong with the
            argument of that name, and with which tensor. Nothing has been launched or written then.
    """
    return prepare_many(tensors, dtype, device=device, out=out, stream=stream).run()


def prepare_many(
    tensors: Mapping[Key, tuple[Any, ...]],
    dtype: Any = "float16",
    *,
    device: Any = None,
    out: Mapping[Key, Any] | None = None,
    stream: Any = None,
) -> Batch[Key]:
    """All of `dequantize_many` but the computation, which `Batch.run` then does, time and again.

    For weights that stay compressed and are dequantized whenever they are needed: a run checks nothing and allocates
    nothing, so that on a GPU the launches are all that it costs, and that it can be captured in a CUDA graph. (An `out`
    whose address is no multiple of 16 is the exception: its values go by way of memory that each run allocates.)

    >>> import numpy as np, numba_dequant as nd
    >>> data = np.zeros(34, np.uint8)
    >>> batch = nd.prepare_many({"a": (data, "Q8_0")}, device="cpu")
    >>> data[:4] = 0, 60, 1, 2  # a scale of 1, then quants
    >>> batch.run()["a"][:3]
    array([1., 2., 0.], dtype=float16)

    Args:
        tensors: as for `dequantize_many`. Each run reads the data anew, where it lies: keep its order with the stream.
            Data that lies on the host is copied to a GPU here, once.
        dtype: as for `dequantize`; None follows the first tensor.
        device: as for `dequantize_many`.
        out: as for `dequantize_many`.
        stream: on which each run computes, as for `dequantize`; None is the stream that is current at each run.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: as `dequantize_many` does.
    """
    entries = parse_tensors(tensors, out)
    first = entries[0] if entries else None
    name = output_type(dtype, first and first.data, first and first.out)
    on_gpu = next((entry.data for entry in entries if is_on_gpu(entry.data)), None)
    place = _device_for(on_gpu, device, stream)
    if place.kind == "cuda":
        from numba_dequant.backends import gpu_batch

        return Batch(*gpu_batch.prepare(entries, name, place.index, stream))
    jobs: dict[Any, _HostJob] = {}
    for entry in entries:
        try:
            data = host_array(entry.data)
            jobs[entry.name] = _prepared(data, entry.fmt, name, entry.shape, place, entry.out, "tile")
        except NumbaDequantError as error:
            raise with_tensor_name(error, entry.name) from error
    if out is not None:
        check_apart(memory for name, job in jobs.items() for memory in job.memory(name))

    def compute() -> None:
        for job in jobs.values():
            job.compute()

    return Batch({name: job.result for name, job in jobs.items()}, compute)


def _device_for(on_gpu: Any, device: Any, stream: Any) -> DeviceSpec:
    """Where to compute, given data that lies on a GPU, if any does."""
    if on_gpu is not None and device is None:
        from numba_dequant.backends.cuda_driver import device_of

        device = f"cuda:{device_of(on_gpu)}"
    place = parse_device(device)
    if place.kind == "cuda":
        return place
    if on_gpu is not None:
        raise DeviceError(f"the data lies on a GPU, but the device is {place}; copy it to the host first")
    if stream is not None and place.kind != "simulator":
        raise DeviceError(f"stream is for CUDA, but the device is {place}")
    return place


@dataclass(slots=True)
class _HostJob:
    """A tensor whose arguments have been checked, with the memory for its result.

    Attributes:
        data: its blocks, where they lie; perhaps strided.
        fmt: their format.
        dtype: the output type.
        values: where to write.
        out: the caller's array, of which `values` are the memory; None for new memory.
        place: where to compute.
        mapping: how the kernel of the simulator is cut.
    """

    data: NDArray[Any]
    fmt: Format
    dtype: str
    values: NDArray[Any]
    out: Any
    place: DeviceSpec
    mapping: str

    @property
    def result(self) -> Any:
        """What the caller gets."""
        if self.out is not None:
            return self.out
        if self.place.kind == "simulator":
            from numba_dequant.backends.simulator import SimulatedTensor

            return SimulatedTensor(self.values)
        return shareable(self.values)

    def compute(self) -> None:
        """Fill the result with the values of what the data is now."""
        data, flat = flat_bytes(self.data), self.values.reshape(-1)
        try:
            host.dequantize_into(data, self.fmt, self.dtype, flat, self.place, self.mapping)
        except MemoryError as error:
            raise DeviceError(f"the CPU is out of memory while it computes {flat.size:,} values: {error}") from error
        if self.out is not None:
            after_writing(self.out)

    def memory(self, name: Any) -> list[Memory]:
        """What is read, and what is written."""
        found = [memory_of_array(self.data, name, is_out=False), memory_of_array(self.values, name, is_out=True)]
        return found if self.out is not None else found[:1]


def _prepared(
    data: NDArray[Any], fmt: Format, dtype: str, shape: Any, place: DeviceSpec, out: Any, mapping: str
) -> _HostJob:
    n_elements = fmt.n_elements(data.nbytes)
    asked = result_shape(shape, n_elements, out)
    kind = fmt.result_dtype(dtype)
    if out is None:
        n_bytes = n_elements * kind.itemsize
        values = allocated(lambda: np.empty(asked, kind), n_bytes, "the result")
    else:
        values = host_output(out, kind, asked, n_elements, place)
        if np.may_share_memory(values, data):
            raise OutputError("out shares memory with data")
    return _HostJob(data, fmt, dtype, values, out, place, mapping)
