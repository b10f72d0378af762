"""`dequantize`, for one tensor, and `dequantize_many`, which `prepare_many` is the first half of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant import host
from numba_dequant.arguments import check_output, host_bytes, is_on_gpu, named, named_tensors, result_shape
from numba_dequant.batch import Batch, Key
from numba_dequant.device import Place, place_named
from numba_dequant.dtypes import dtype_name, numpy_dtype
from numba_dequant.errors import DeviceError, NumbaDequantError, OutputError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.mapping import mapping_named


def dequantize(
    data: Any,
    format: str | Format,
    dtype: Any = "float16",
    shape: Sequence[int] | int | None = None,
    device: str | None = None,
    out: Any = None,
    stream: Any = None,
    *,
    mapping: str = "tile",
) -> Any:
    """The values of compressed blocks.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> nd.dequantize(block, "Q8_0", device="cpu")[:4]
    array([0. , 0.5, 1. , 1.5], dtype=float16)

    Args:
        data: whole blocks: bytes, a memoryview, a NumPy array, or an array on a GPU that has
            `__cuda_array_interface__` or `__dlpack__` (PyTorch, CuPy, Numba), which is read where it lies.
        format: a name in `FORMATS`, or a `Format`.
        dtype: "float16", "bfloat16" or "float32", or a NumPy, ml_dtypes or torch dtype of that name. Values are those
            of GGML in float32, rounded once to nearest even. Integers and F64 are returned as they are stored.
        shape: of the result, rows first; flat without one.
        device: "reference" (NumPy), "cpu", "cuda", "cuda:1"...; None is the GPU that `data` lies on, else the first
            GPU, else the CPU, which is then said once in a warning.
        out: array to write to, contiguous and of the right shape and type: NumPy's for the CPU, anything on the GPU
            for CUDA. It is returned.
        stream: on which to compute (CUDA): an int, a stream of PyTorch, CuPy or Numba, or an object with
            `__cuda_stream__`. None is the current stream of PyTorch or CuPy where data or `out` is theirs, and
            otherwise the legacy default stream. The host does not wait for it.
        mapping: how the kernel is cut (CUDA): "tile", or "block" for one thread block per quant block.

    Returns:
        A NumPy array from the CPU, a `DeviceTensor` from CUDA, or `out`.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: what is wrong with the
            argument of that name. Nothing has been allocated or launched then.
    """
    source = format_named(format)
    name = dtype_name(dtype)
    mapping_named(mapping, source)
    place = _place_for(data if is_on_gpu(data) else None, device, stream)
    if place.kind == "cuda":
        from numba_dequant.gpu import dequantize as dequantize_on_gpu

        return dequantize_on_gpu(data, source, name, shape, place.index, out, stream, mapping)
    result, work = _prepared(host_bytes(data), source, name, shape, place, out, mapping)
    work()
    return result


def dequantize_many(
    tensors: Mapping[Key, tuple[Any, ...]],
    dtype: Any = "float16",
    device: str | None = None,
    out: Mapping[Key, Any] | None = None,
    stream: Any = None,
) -> dict[Key, Any]:
    """The values of many tensors; on a GPU by one launch per format, where a launch each would take longer.

    >>> import numpy as np, numba_dequant as nd
    >>> block = np.float16(0.5).tobytes() + bytes(range(32))
    >>> found = nd.dequantize_many({"a": (block, "Q8_0"), "b": (block * 2, "Q8_0", (2, 32))}, device="cpu")
    >>> found["b"].shape
    (2, 32)

    Args:
        tensors: name -> (data, format) or (data, format, shape), each as for `dequantize`.
        dtype: as for `dequantize`.
        device: as for `dequantize`; data may lie on the host and on that GPU.
        out: name -> array to write to, for all of them or for none.
        stream: as for `dequantize`.

    Returns:
        name -> result, in the order of `tensors`. On a GPU, small results share allocations of up to 64 MiB, which go
        back once none of theirs is used.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: what is wrong with the
            argument of that name, and with which tensor. Nothing has been launched or written then.
    """
    return prepare_many(tensors, dtype, device, out, stream).run()


def prepare_many(
    tensors: Mapping[Key, tuple[Any, ...]],
    dtype: Any = "float16",
    device: str | None = None,
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
        dtype: as for `dequantize`.
        device: as for `dequantize_many`.
        out: as for `dequantize_many`.
        stream: on which each run computes, as for `dequantize`; None is the stream that is current at each run.

    Raises:
        UnknownFormatError, DtypeError, DataError, ShapeError, OutputError, DeviceError: as `dequantize_many` does.
    """
    entries = named_tensors(tensors, out)
    name = dtype_name(dtype)
    on_gpu = next((entry.data for entry in entries if is_on_gpu(entry.data)), None)
    place = _place_for(on_gpu, device, stream)
    if place.kind == "cuda":
        from numba_dequant import many

        return Batch(*many.prepare(entries, name, place.index, stream))
    results, steps = {}, []
    for entry in entries:
        try:
            data = host_bytes(entry.data)
            prepared = _prepared(data, entry.source, name, entry.shape, place, entry.out, "tile")
        except NumbaDequantError as error:
            raise named(error, entry) from error
        results[entry.name] = prepared[0]
        steps.append(prepared[1])
    return Batch(results, lambda: [step() for step in steps])


def _place_for(on_gpu: Any, device: str | None, stream: Any) -> Place:
    """Where to compute, given data that lies on a GPU, if any does."""
    if on_gpu is not None and device is None:
        from numba_dequant.runtime import device_of

        device = f"cuda:{device_of(on_gpu)}"
    place = place_named(device)
    if place.kind == "cuda":
        return place
    if on_gpu is not None:
        raise DeviceError(f"the data lies on a GPU, but the device is {place}; copy it to the host first")
    if stream is not None and place.kind != "simulator":
        raise DeviceError(f"stream is for CUDA, but the device is {place}")
    return place


def _prepared(
    data: NDArray[np.uint8], source: Format, dtype: str, shape: Any, place: Place, out: Any, mapping: str
) -> tuple[Any, Callable[[], None]]:
    """The result, whose memory is there, and the computation that fills it, whose arguments have been checked."""
    n_elements = source.n_elements(data.size)
    asked = result_shape(shape, n_elements, out)
    kind = source.stored_dtype or numpy_dtype(dtype)
    if out is None:
        result = np.empty(asked, kind)
    elif not isinstance(out, np.ndarray) or not out.flags.c_contiguous or not out.flags.writeable:
        raise OutputError(f"out must be a contiguous, writable NumPy array where the device is {place}")
    else:
        result = out
        check_output(out.dtype, out.shape, kind, asked, n_elements)
        if np.may_share_memory(out, data):
            raise OutputError("out shares memory with data")
    work = partial(host.dequantize_into, data, source, dtype, result.reshape(-1), place, mapping)
    if place.kind == "simulator" and out is None:
        from numba_dequant.simulator import SimulatedTensor

        return SimulatedTensor(result), work
    return result, work
