"""Loading to the host: chunks of a file, decoded where they were read, while they are in the cache of their core."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import after_writing, check_apart, host_output, memory_of_array, with_tensor_name
from numba_dequant.backends import host
from numba_dequant.backends.devices import DeviceSpec, available_cores
from numba_dequant.backends.dlpack import shareable
from numba_dequant.errors import DeviceError, OutputError
from numba_dequant.loading.chunks import Chunk, TensorSlice
from numba_dequant.loading.files import allocate
from numba_dequant.loading.python_threads import Pipeline
from numba_dequant.loading.requests import QuantizedTensor, Request

CHUNK_BYTES = 1 << 20
"""Bytes that a thread reads at a time: what a core's own cache holds."""

WAITING_THREADS = 2
"""Threads beyond the number of cores: some wait for the disk, or for the kernel to hand out memory."""


def load(
    requests: Sequence[Request],
    place: DeviceSpec,
    threads: int | None,
    prefetch: int | None,
    on_bytes_read: Callable[[int], None],
) -> Generator[Any, None, None]:
    """The results of the requests, in order.

    Raises:
        OutputError: an `out` is not right. Nothing has been read then.
        ReadError, GgufError, DeviceError: reading or allocating failed halfway.
    """
    outputs = {index: _output(request, place) for index, request in enumerate(requests) if request.out is not None}
    names = {index: requests[index].tensor.name for index in outputs}
    check_apart(memory_of_array(array, names[index], is_out=True) for index, array in outputs.items())
    results = _Results(requests, place, outputs)
    # The simulator's threads are its own.
    n_workers = 1 if place.kind == "simulator" else threads or available_cores() + WAITING_THREADS
    tensors = [request.tensor for request in requests]
    pipeline = Pipeline(tensors, results, CHUNK_BYTES, n_workers, prefetch, on_bytes_read)
    return (results.pop_result(index) for index in pipeline)


def _output(request: Request, place: DeviceSpec) -> NDArray[Any]:
    tensor = request.tensor
    try:
        return host_output(request.out, _kind(request), tensor.shape, tensor.n_elements, place)
    except OutputError as error:
        raise with_tensor_name(error, tensor.name) from error


def _kind(request: Request) -> np.dtype[Any]:
    if request.dtype is None:
        return np.dtype(np.uint8)
    return request.tensor.format.result_dtype(request.dtype)


class _Results:
    """The arrays to write to: they come to be when reading gets to them, and are let go when they are handed out."""

    def __init__(self, requests: Sequence[Request], place: DeviceSpec, outputs: dict[int, NDArray[Any]]) -> None:
        self.requests, self.place = requests, place
        self.arrays = outputs

    def prepare(self, index: int) -> None:
        request = self.requests[index]
        if request.out is not None:
            return
        tensor = request.tensor
        shape = (tensor.n_bytes,) if request.dtype is None else tensor.shape
        self.arrays[index] = allocate(tensor, shape, _kind(request))

    def worker(self) -> _Worker:
        return _Worker(self)

    def pop_result(self, index: int) -> Any:
        request, array = self.requests[index], self.arrays.pop(index)
        if request.dtype is None:
            return QuantizedTensor(array, request.tensor.format, request.tensor.shape)
        if request.out is not None:
            after_writing(request.out)
            return request.out
        if self.place.kind == "simulator":
            from numba_dequant.backends.simulator import SimulatedTensor

            return SimulatedTensor(array)
        return shareable(array)


class _Worker:
    """Decodes chunks in the thread that has read them."""

    def __init__(self, results: _Results) -> None:
        self._results = results
        self._buffer = np.empty(CHUNK_BYTES, np.uint8)

    def buffer(self) -> NDArray[np.uint8]:
        return self._buffer

    def consume(self, chunk: Chunk, data: NDArray[np.uint8]) -> None:
        for part in chunk.parts:
            try:
                self._write(part, data[part.at : part.at + part.n_bytes])
            except MemoryError as error:
                tensor = self._results.requests[part.index].tensor
                raise DeviceError(f"{tensor.path}: tensor {tensor.name!r}: out of memory: {error}") from error

    def _write(self, part: TensorSlice, data: NDArray[np.uint8]) -> None:
        request = self._results.requests[part.index]
        fmt = request.tensor.format
        flat = self._results.arrays[part.index].reshape(-1)
        if request.dtype is None:
            flat[part.start : part.start + part.n_bytes] = data
            return
        first = part.start // fmt.type_size * fmt.block_size
        out = flat[first : first + part.n_bytes // fmt.type_size * fmt.block_size]
        place = self._results.place
        host.dequantize_into(data, fmt, request.dtype, out, place, on_one_core=True)
