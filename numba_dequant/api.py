"""The entry points. `dequantize_many(...)` is `prepare_many(...).run()`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

from numpy.typing import NDArray

from numba_dequant.arguments import Job, is_on_gpu, output_type, parse_tensors
from numba_dequant.backends.batch import Array, Backend, Batch
from numba_dequant.backends.devices import is_simulated, parse_device
from numba_dequant.backends.host import HostBackend, ReferenceBackend, SimulatorBackend
from numba_dequant.backends.matmul import product_job
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.kernels.launch_shape import launch_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from numba_dequant.backends.cuda import CudaBackend  # requires the GPU packages

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

    class _ProductOptions(TypedDict, total=False):
        bias: Any
        dtype: Any
        stream: Any


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
    """Dequantize compressed blocks.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> nd.dequantize(block, "Q8_0", device="cpu")[:4]
    array([0. , 0.5, 1. , 1.5], dtype=float16)

    Args:
        data: whole blocks, as bytes, a memoryview, a NumPy array, a PyTorch tensor, or a GPU array that has
            `__cuda_array_interface__` or `__dlpack__` (CuPy, Numba). Only the bytes of an array are used, not its
            dtype or shape. On the device, contiguous data is read in place; strided data is copied first. Of strided
            arrays on a GPU, only those of PyTorch and CuPy are accepted.
        format: a name in `FORMATS`, in upper or lower case; a ggml id (also as a member of gguf-py's
            `GGMLQuantizationType`); or a `Format`.
        dtype: type of the result: "float16", "bfloat16", "float32", an alias ("fp16", "half", "bf16", "fp32", ...), or
            a NumPy, ml_dtypes or PyTorch dtype. None means the dtype of `out`. If there is no `out`, it means PyTorch's
            default dtype if `data` is a PyTorch tensor, otherwise float16. The values are those of GGML in float32,
            rounded once to nearest even. Integers and F64 keep their stored type.
        shape: shape of the result, rows first. One extent may be -1. The default is the shape of `out`, or one
            dimension.
        device: "reference" (NumPy), "cpu", "cuda", "cuda:1", ..., the ordinal of a GPU, or a device of PyTorch, JAX,
            CuPy or Numba. If you omit `device`, the GPU of `data` is used, otherwise the first GPU. If no GPU can be
            used, the CPU is used and one warning says why.
        out: contiguous array to write to, with the shape and dtype of the result: a NumPy array or PyTorch tensor on
            the CPU, any GPU array on a GPU. A PyTorch tensor that requires gradients must be a leaf, such as a
            parameter; autograd notices the new values, but records no computation.
        stream: CUDA stream to compute on: a handle (int), a stream of PyTorch, CuPy or Numba, or an object with
            `__cuda_stream__`. The default is the current stream of PyTorch or CuPy if `data` or `out` belongs to that
            library, otherwise the legacy default stream. The host does not wait for the stream; docs/streams.md lists
            the exceptions.
        mapping: how a CUDA kernel divides the work: "tile", or "block" for one thread block per quant block.

    Returns:
        `out`, or a new array: a NumPy array on the CPU, a `DeviceTensor` on a GPU. ``torch.from_dlpack`` accepts both
        without a copy; a bfloat16 array is a `Bfloat16Array`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError: the argument of that name is wrong.
            Nothing has been launched or written.
        OptionError: there is no such `mapping`.
        DeviceError: `device` or `stream` cannot be used, there is not enough memory, or a CUDA graph that is being
            captured cannot contain the call (docs/streams.md).
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
    """Dequantize many tensors. A GPU needs one launch per format, which is faster than one launch per tensor.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> results = nd.dequantize_many({"a": (block, "Q8_0"), "b": (block * 2, "Q8_0", (2, 32))}, device="cpu")
    >>> results["b"].shape
    (2, 32)

    Args:
        tensors: name -> (data, format) or (data, format, shape), each as for `dequantize`.
        dtype: as for `dequantize`; None means the default for the first tensor.
        device: as for `dequantize`. If it is a GPU, data may be on the host or on that GPU.
        out: name -> array to write to, for all tensors or for none. An output must not share memory with another
            output or with any data.
        stream: as for `dequantize`.

    Returns:
        name -> result, in the order of `tensors`. On a GPU, small results share allocations of up to 64 MiB; an
        allocation is freed when none of its results is in use.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: as for `dequantize`. The
            message names the tensor.
    """
    usual = _usual_results(tensors, dtype, device, stream) if out is None else None
    if usual is not None:
        return usual
    backend, jobs = _backend_and_jobs(tensors, dtype, device, out, stream)
    return backend.dequantize_many(jobs, stream)


def prepare_many(
    tensors: Mapping[Key, tuple[Any, ...]],
    dtype: Any = "float16",
    *,
    device: Any = None,
    out: Mapping[Key, Any] | None = None,
    stream: Any = None,
) -> Batch[Key]:
    """Prepare `dequantize_many`, so that `Batch.run` only has to compute, as often as you like.

    Use it for weights that stay compressed and are dequantized whenever they are needed. A run checks nothing and
    allocates nothing. On a GPU it costs only the launches, and a CUDA graph can capture it. (Exception: if the address
    of an output on a GPU is not a multiple of 16, or if data on the CPU is strided, each run allocates temporary memory
    for them.)

    >>> import numpy as np, numba_dequant as nd
    >>> data = np.zeros(34, np.uint8)
    >>> batch = nd.prepare_many({"a": (data, "Q8_0")}, device="cpu")
    >>> data[:4] = 0, 60, 1, 2  # a scale of 1, then quants
    >>> batch.run()["a"][:3]
    array([1., 2., 0.], dtype=float16)

    Args:
        tensors: as for `dequantize_many`. Each run reads data on the device again; order your changes to the
            data with the stream. For a GPU, data on the host is copied once, by this call.
        dtype: as for `dequantize_many`.
        device: as for `dequantize_many`.
        out: as for `dequantize_many`.
        stream: stream of each run, as for `dequantize`; the default is the stream that is current at each run.

    Returns:
        A `Batch`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: as for `dequantize_many`.
    """
    backend, jobs = _backend_and_jobs(tensors, dtype, device, out, stream)
    return backend.prepare(jobs, stream)


def _usual_results(tensors: Any, dtype: Any, device: Any, stream: Any) -> dict[Any, Any] | None:
    """The results on a GPU if all is as usual there; None if the arguments need all checks."""
    entry = next(iter(tensors.values()), None) if type(tensors) is dict else None
    own = sys.modules.get("numba_dequant.backends.device_tensor")  # requires the GPU packages
    if own is None or not isinstance(entry, tuple) or not entry or type(entry[0]) is not own.DeviceTensor:
        return None
    try:
        backend = backend_for(device, stream, entry[0])
        if isinstance(backend, HostBackend):
            return None
        return backend.dequantize_usual(tensors, output_type(dtype, entry[0]), stream)
    except NumbaDequantError:
        return None  # the checks of the arguments say which of them is wrong


def _backend_and_jobs(tensors: Any, dtype: Any, device: Any, out: Any, stream: Any) -> tuple[Backend, list[Job]]:
    jobs = parse_tensors(tensors, dtype, out)
    on_gpu = next((job.data for job in jobs if is_on_gpu(job.data)), None)
    return backend_for(device, stream, on_gpu), jobs


@overload
def matmul(
    x: Any,
    weight: Any,
    format: _Format | None = ...,
    *,
    out: Out,
    device: Any = ...,
    **options: Unpack[_ProductOptions],
) -> Out: ...


@overload
def matmul(
    x: Any,
    weight: Any,
    format: _Format | None = ...,
    *,
    device: _Host,
    out: None = ...,
    **options: Unpack[_ProductOptions],
) -> NDArray[Any]: ...


@overload
def matmul(
    x: Any,
    weight: Any,
    format: _Format | None = ...,
    *,
    device: Any = ...,
    out: None = ...,
    **options: Unpack[_ProductOptions],
) -> Array: ...


def matmul(
    x: Any,
    weight: Any,
    format: _Format | None = None,
    *,
    bias: Any = None,
    dtype: Any = None,
    device: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Multiply with a weight that stays compressed: ``x @ W.T + bias``, where `W` are the values of `weight`.

    On a GPU of compute capability 8.0 or higher, kernels multiply the blocks themselves, on the tensor cores. With many
    columns, PyTorch multiplies dequantized pieces of at most 2**28 elements, if the program has imported it and the
    result has the type of `x`. The CPU dequantizes about 2**20 elements at a time. The kernels and the CPU add up in
    float32; for PyTorch, its own settings of precision apply. PyTorch's autograd does not record the product; use
    `numba_dequant.torch.linear` for gradients.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> x = np.ones((2, 32), np.float32)
    >>> nd.matmul(x, block * 3, "Q8_0", device="cpu")
    array([[248., 248., 248.],
           [248., 248., 248.]], dtype=float32)

    Args:
        x: float16, bfloat16 or float32 of shape (..., elements of a row of the weight): a NumPy array, a PyTorch
            tensor, or a GPU array that has `__cuda_array_interface__` or `__dlpack__`.
        weight: a `QuantizedTensor` of two dimensions, which `load` returns if you pass ``keep_quantized=True``; a tuple
            (data, format) or (data, format, shape); or whole rows of blocks, as `data` of `dequantize`. A row has as
            many elements as the last dimension of `x`.
        format: the format of the blocks, as for `dequantize`; omit it if `weight` contains it.
        bias: float16, bfloat16 or float32 of shape (rows,), which is added to each result, or None.
        dtype: type of the result, as for `dequantize`. None means the dtype of `out`; without `out`, that of `x`.
        device: as for `dequantize`. If you omit it, the GPU of `x`, `weight` or `bias` is used, otherwise the first
            GPU. For a GPU, arrays may be on the host or on that GPU.
        out: contiguous array to write to, as for `dequantize`. It must not share memory with the other arrays.
        stream: as for `dequantize`. The default is that of the first array of PyTorch or CuPy among `x`, `weight`,
            `bias` and `out`.

    Returns:
        `out`, or a new array of shape (..., rows), as from `dequantize`.

    Raises:
        UnknownFormatError, OutputError: the argument of that name is wrong. Nothing has been launched or written.
        DataError: `x`, `weight` or `bias` is not an array, `weight` is not a whole number of blocks or is a tuple of a
            wrong length, or its format is not `format`.
        DtypeError: the type of `x`, `weight` or `bias` cannot be multiplied, there is no such `dtype`, or the GPU does
            not support it.
        ShapeError: the shapes of `x`, `weight` and `bias` do not match.
        DeviceError: `device` or `stream` cannot be used, there is not enough memory, or a CUDA graph that is being
            captured cannot contain the call (docs/streams.md). On a GPU, some products need PyTorch, which the program
            must have imported: those on a GPU of compute capability below 8.0, with an `x` of float32, with an F32,
            F16 or BF16 weight, with blocks at an address that is not a multiple of `Format.alignment`, and with a
            format of your own whose blocks do not have 32, 64, 128 or 256 elements.
    """
    given = product_job(x, weight, format, bias, dtype, out)
    on_gpu = next((array for array in (given.x, given.weight, given.bias) if is_on_gpu(array)), None)
    return backend_for(device, stream, on_gpu).matmul(given, stream)


@cache
def _cuda() -> Any:
    # Cached: an import statement takes as long as launching a kernel.
    from numba_dequant.backends import cuda

    return cuda


def backend_for(device: Any, stream: Any, data: Any = None) -> HostBackend | CudaBackend:
    """The backend for a device. If `device` is None, it is the GPU of `data`, otherwise as in `parse_device`.

    Raises:
        DeviceError: there is no such device, it has no streams, or it cannot read the data.
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
        raise DeviceError(f"the data is on a GPU, but the device is {spec}; copy it to the host first")
    if spec.kind == "simulator":
        return SimulatorBackend(spec)
    if stream is not None:
        raise DeviceError(f"the device {spec} has no streams; omit stream, or pass a CUDA device")
    return ReferenceBackend(spec) if spec.kind == "reference" else HostBackend(spec)
