"""Loads tensors to the host. The thread that reads a chunk decodes it, while it is in the cache of the core."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import Job, after_writing, with_tensor_name
from numba_dequant.backends.devices import available_cores
from numba_dequant.backends.host import HostBackend, SimulatorBackend
from numba_dequant.backends.overlap import check_apart, memory_of_array
from numba_dequant.errors import DeviceError, OutputError
from numba_dequant.loading.chunks import Chunk, TensorSlice
from numba_dequant.loading.groups import Groups, GroupsOfGenerator
from numba_dequant.loading.python_threads import Pipeline, Work
from numba_dequant.loading.requests import Request

CHUNK_BYTES = 1 << 20
"""Bytes that a thread reads at once, so that they fit in the cache of a core."""

WAITING_THREADS = 2
"""Threads in addition to one per core, because some wait for the disk or for the operating system."""


def load(
    requests: Sequence[Request],
    backend: HostBackend,
    threads: int | None,
    prefetch: int | None,
    on_bytes_read: Callable[[int], None],
) -> Generator[Any, None, None]:
    """The results of the requests, in order.

    Raises:
        OutputError: an `out` is wrong. Nothing has been read.
        ReadError, GgufError, DeviceError: reading or allocating failed during the load.
    """
    outputs = {}
    for index, request in enumerate(requests):
        if request.job.out is not None:
            try:
                outputs[index] = backend.output(request.job)
            except OutputError as error:
                raise with_tensor_name(error, request.job.name) from error
    check_apart(memory_of_array(array, requests[index].job.name, is_out=True) for index, array in outputs.items())
    results = _Results(requests, backend, outputs)
    # The simulator starts threads of its own.
    n_threads = 1 if isinstance(backend, SimulatorBackend) else threads or available_cores() + WAITING_THREADS
    largest_block = max((tensor.format.type_size for tensor, _ in requests), default=0)
    work = Work(results.prepare, results.consume, max(CHUNK_BYTES, largest_block))
    pipeline = Pipeline([request.tensor for request in requests], work, n_threads, prefetch, on_bytes_read)
    return (results.pop(index) for index in pipeline)


def load_groups(
    requests: Sequence[Request],
    backend: HostBackend,
    threads: int | None,
    on_bytes_read: Callable[[int], None],
    ends: Sequence[int],
) -> Groups:
    """Loads the requests in groups with these ends.

    Raises:
        OutputError, ReadError, GgufError, DeviceError: as for `load`.
    """
    # The last group may have any number of tensors, whose memory is not needed before.
    prefetch = max((end - start for start, end in pairwise((0, *ends[:-1]))), default=None)

    def results(on_bytes_read: Callable[[int], None]) -> Generator[Any, None, None]:
        return load(requests, backend, threads, prefetch, on_bytes_read)

    # The simulator starts threads of its own.
    has_thread = not isinstance(backend, SimulatorBackend)
    return GroupsOfGenerator(results, ends, on_bytes_read, has_thread=has_thread)


class _Results:
    """The arrays to write to. An array is created before its tensor is read, and removed when it is returned."""

    def __init__(self, requests: Sequence[Request], backend: HostBackend, outputs: dict[int, NDArray[Any]]) -> None:
        self._requests, self._backend, self._arrays = requests, backend, outputs

    def prepare(self, index: int) -> None:
        """Allocate the memory of a tensor."""
        request = self._requests[index]
        if request.job.out is None:
            try:
                self._arrays[index] = self._backend.output(request.job)
            except DeviceError as error:
                raise request.blame(error) from error

    def consume(self, chunk: Chunk, data: NDArray[np.uint8]) -> None:
        """Write the values of a chunk."""
        for part in chunk.parts:
            request = self._requests[part.index]
            try:
                self._write(part, request.job, data[part.at : part.at + part.n_bytes])
            except MemoryError as error:
                raise request.blame(DeviceError(f"out of memory: {error}")) from error

    def _write(self, part: TensorSlice, job: Job, data: NDArray[np.uint8]) -> None:
        flat = self._arrays[part.index].reshape(-1)
        if job.dtype is None:
            flat[part.start : part.start + part.n_bytes] = data
            return
        first = part.start // job.fmt.type_size * job.fmt.block_size
        n_elements = part.n_bytes // job.fmt.type_size * job.fmt.block_size
        self._backend.write(data, job, flat[first : first + n_elements], n_shares=1)

    def pop(self, index: int) -> Any:
        """Remove a finished tensor and return its result."""
        job, array = self._requests[index].job, self._arrays.pop(index)
        if job.out is not None:
            after_writing(job.out)
        if job.dtype is None:
            return self._requests[index].finished(array if job.out is None else job.out)
        return self._backend.result(job, array)
