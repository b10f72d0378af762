"""The entry points. `dequantize_many(...)` is `prepare_many(...).run()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

from numpy.typing import NDArray

from numba_dequant.arguments import Job, is_on_gpu, output_type, parse_tensors
from numba_dequant.backends.batch import Array, Batch
from numba_dequant.backends.devices import is_simulated, parse_device
from numba_dequant.backends.host import HostBackend, ReferenceBackend, SimulatorBackend
from numba_dequant.errors import DeviceError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.kernels.launch_shape import launch_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from numba_dequant.backends.cuda import CudaBackend  # it imports what only a GPU needs

Key = TypeVar("Key")

Out = TypeVar("Out")

_Format = str | int | Format
_Shape = Sequence[int] | NDArray[Any] | int | None
_Host = Literal["reference", "cpu"]


if TYPE_CHECKING:

    class _Options(TypedDict, total=False):
        shape: _Shape
        stream: Any
        mapping: str


@overload
def dequantize(
    data: Any, format: _Format, dtype: Any = ..., *, out: Out, device: Any = ..., **options: Unpack[_Options]
) -> Out: ...


@overload
def dequantize(
    data: Any, format: _Format, dtype: Any = ..., *, device: _Host, out: None = ..., **options: Unpack[_Options]
) -> NDArray[Any]: ...


@overload
def dequantize(
    data: Any, format: _Format, dtype: Any = ..., *, device: Any = ..., out: None = ..., **options: Unpack[_Options]
) -> Array: ...


def dequantize(
    data: Any,
    format: _Format,
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
    job = Job(data, fmt, output_type(dtype, data, out), shape, out)
    launch_shape(mapping, fmt)
    return backend_for(device, stream, data).dequantize(job, stream, mapping)


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
    jobs = parse_tensors(tensors, dtype, out)
    on_gpu = next((job.data for job in jobs if is_on_gpu(job.data)), None)
    return backend_for(device, stream, on_gpu).prepare(jobs, stream)


@cache
def _cuda() -> Any:
    # A call takes as long to import it again as to launch a kernel.
    from numba_dequant.backends import cuda

    return cuda


def backend_for(device: Any, stream: Any, data: Any = None) -> HostBackend | CudaBackend:
    """What computes on a device; if `device` is None, on the GPU that the data lies on, or on the first GPU.

    Raises:
        DeviceError: there is no such device, or it has no streams, or cannot read the data.
    """
    backend: CudaBackend
    on_gpu = data is not None and is_on_gpu(data)
    if on_gpu and device is None and not is_simulated():
        backend = _cuda().backend_of(data)
        return backend
    spec = parse_device(device)
    if spec.kind == "cuda":
        backend = _cuda().CudaBackend(_cuda().gpu_at(spec.index))
        return backend
    if on_gpu:
        raise DeviceError(f"the data lies on a GPU, but the device is {spec}; copy it to the host first")
    if spec.kind == "simulator":
        return SimulatorBackend(spec)
    if stream is not None:
        raise DeviceError(f"stream is for CUDA, but the device is {spec}")
    return ReferenceBackend(spec) if spec.kind == "reference" else HostBackend(spec)
