"""Many tensors on a GPU: one launch per format, over a table of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from cuda.core import Device, Event, Kernel, LaunchConfig
from numpy.typing import NDArray

from numba_dequant.arguments import (
    Memory,
    Tensor,
    after_writing,
    check_apart,
    host_bytes,
    is_on_gpu,
    result_shape,
    with_tensor_name,
)
from numba_dequant.backends import cuda_driver, gpu, streams
from numba_dequant.backends.cuda_driver import DeviceBytes
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.streams import CallStream
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import NumbaDequantError
from numba_dequant.format import Format
from numba_dequant.interop import TORCH, library_of
from numba_dequant.kernels.compiler import batch_kernel
from numba_dequant.kernels.launch_shape import launch_shape, tile_directory

SHARED_MEMORY = 64 << 20
"""Tensors share pieces of device memory of up to so many bytes: getting one costs as much as launching a kernel."""

ALIGNMENT = 256
"""Of each tensor in shared memory: as if it had been allocated alone."""


Step = Callable[[int], None]
"""Something that is queued on a stream, given its handle."""


@dataclass(slots=True)
class _Job:
    """One tensor: everything about it has been checked, and perhaps it still needs memory on the GPU.

    `gather` copies strided data to `data`, which each run reads.
    """

    fmt: Format
    n_elements: int
    shape: tuple[int, ...]
    kind: np.dtype[Any]
    data: DeviceBytes
    target: DeviceBytes
    host: NDArray[np.uint8] | None
    result: Any
    gather: Step | None = None

    def memory(self, name: Any) -> list[Memory]:
        """What is read, and what is written to."""
        found = [(self.data, False), (self.target, True)]
        return [
            Memory(each.pointer, each.pointer + each.n_bytes, name, is_out) for each, is_out in found if each.pointer
        ]


def prepare(tensors: list[Tensor], dtype: str, index: int, stream: Any) -> tuple[dict[Any, Any], Callable[[], None]]:
    """The results of `numba_dequant.prepare_many` on CUDA device `index`, and what queues the work that fills them."""
    given = [thing for tensor in tensors for thing in (tensor.data, tensor.out) if thing is not None]
    call = streams.stream_for(stream, index, given)
    with cuda_driver.active_gpu(index) as device:
        cuda_driver.refuse_capture(call.handle, "a batch cannot be prepared during the capture; prepare it before")
        jobs = {}
        for tensor in tensors:
            try:
                jobs[tensor.name] = _job(tensor, dtype, device, call)
            except NumbaDequantError as error:
                raise with_tensor_name(error, tensor.name) from error
        if any(tensor.out is not None for tensor in tensors):
            check_apart(memory for name, job in jobs.items() for memory in job.memory(name))
        _allocate([job.data for job in jobs.values() if job.host is not None], device, call)
        _allocate([job.target for job in jobs.values() if job.result is None], device, call)
        for job in jobs.values():
            if job.host is not None and job.host.size:
                gpu.send(job.host, job.data.pointer, call.handle)
            if job.result is None:
                job.result = DeviceTensor(job.target, job.shape, job.kind, call.handle, call.framework)
        steps, tables = _steps(list(jobs.values()), dtype, device, call)
        results = {name: job.result for name, job in jobs.items()}
        return results, _Run(index, call, steps, [*jobs.values()], tables, given)


class _Run:
    """Queues all steps of a batch on the stream that is meant at that time.

    It keeps the memory whose addresses the steps hold.
    """

    def __init__(
        self,
        index: int,
        call: CallStream,
        steps: list[Step],
        jobs: list[_Job],
        tables: DeviceBytes | None,
        given: list[Any],
    ) -> None:
        self._index, self._call, self._steps = index, call, steps
        self._jobs, self._tables, self._given = jobs, tables, given
        libraries = {library.name: library for thing in given if (library := streams.owner_of(thing)) is not None}
        self._others = [library for library in libraries.values() if library is not call.framework]
        memories = [job.data for job in jobs] + [job.target for job in jobs] + ([tables] if tables else [])
        owners = {id(memory.owner): memory.owner for memory in memories if hasattr(memory.owner, "used_on")}
        self._owners = list(owners.values())
        self._results = [job.result for job in jobs if isinstance(job.result, DeviceTensor)]
        self._outs = [job.result for job in jobs if not isinstance(job.result, DeviceTensor)]
        self._uploaded: Event | None = cuda_driver.record_event(index, call.handle)
        self._last = call.handle
        self._used = {call.handle}

    def __call__(self) -> None:
        call, index = self._call, self._index
        handle = call.framework.current_stream(index) if call.framework is not None else call.handle
        with cuda_driver.active_gpu(index):
            if handle != call.handle:
                self._wait_for_uploads()
            others = [library.current_stream(index) for library in self._others]
            for other in others:
                cuda_driver.stream_wait_stream(handle, other)
            for step in self._steps:
                step(handle)
            for out in self._outs:
                after_writing(out)
            if not call.is_named:
                for other in others:
                    cuda_driver.stream_wait_stream(other, handle)
            if handle != self._last:
                self._last = handle
                self._used.add(handle)
                for result in self._results:
                    result.stream = handle

    def __del__(self) -> None:
        # The streams may still be at work on what is dropped with this, and on results that live on.
        with suppress(Exception), cuda_driver.active_gpu(self._index):  # the interpreter may be ending
            for handle in self._used:
                for owner in self._owners:
                    owner.used_on(handle)
            if self._call.is_named:
                for thing in self._given:
                    streams.release(self._call, self._index, thing, None)

    def _wait_for_uploads(self) -> None:
        """Wait, once, for what has been copied to the GPU on the stream on which the batch was prepared."""
        if self._uploaded is not None:
            with cuda_driver.allowed_in_capture():
                self._uploaded.sync()
            self._uploaded = None


def _job(tensor: Tensor, dtype: str, device: Device, call: CallStream) -> _Job:
    host, given = None, tensor.data
    if gpu.is_pinned_tensor(given):
        given = TORCH.to_gpu(given, device.device_id, call.handle)
    gather: Step | None = None
    if isinstance(given, DeviceTensor) or is_on_gpu(given):
        data = streams.memory_of(given, call)
        library = library_of(given)
        if library is not None and not library.is_contiguous(given):
            gather = partial(library.copy, data.owner, given, device.device_id)
        gpu.check_place(data, device)
    else:
        host = host_bytes(given)
        data = DeviceBytes(0, host.size, device.device_id, None)
    gpu.check_capability(tensor.fmt, dtype, device.device_id)
    n_elements = tensor.fmt.n_elements(data.n_bytes)
    shape = result_shape(tensor.shape, n_elements, tensor.out)
    kind = tensor.fmt.result_dtype(dtype)
    if tensor.out is None:
        target = DeviceBytes(0, n_elements * kind.itemsize, device.device_id, None)
    else:
        read = data if host is None else None
        target = gpu.checked_output(tensor.out, read, kind, shape, n_elements, device, call)
    return _Job(tensor.fmt, n_elements, shape, kind, data, target, host, tensor.out, gather)


def _allocate(pieces: list[DeviceBytes], device: Device, call: CallStream) -> None:
    """Get device memory for each piece; small ones share."""
    start = 0
    sharing: list[tuple[DeviceBytes, int]] = []
    for piece in pieces:
        size = -(-piece.n_bytes // ALIGNMENT) * ALIGNMENT
        if start + size > SHARED_MEMORY:
            _share(sharing, start, device, call)
            sharing, start = [], 0
        sharing.append((piece, start))
        start += size
    _share(sharing, start, device, call)


def _share(pieces: list[tuple[DeviceBytes, int]], n_bytes: int, device: Device, call: CallStream) -> None:
    if pieces:
        whole = gpu.new_memory(n_bytes, device, call)
        for piece, start in pieces:
            piece.pointer, piece.owner = whole.pointer + start, whole.owner


def _steps(jobs: list[_Job], dtype: str, device: Device, call: CallStream) -> tuple[list[Step], DeviceBytes | None]:
    """What is to be queued, and the memory of the tables for it.

    That is one launch per format, and a step for each tensor that cannot be part of one.
    """
    steps: list[Step] = [job.gather for job in jobs if job.gather is not None]
    by_source: dict[int, list[_Job]] = {}
    for job in jobs:
        if not job.n_elements:
            continue
        if job.fmt.stored_dtype is not None or job.target.pointer % 16:
            steps.append(partial(gpu.dequantize_into, job.data, job.fmt, dtype, job.n_elements, job.target))
        else:
            by_source.setdefault(id(job.fmt), []).append(job)
    if not by_source:
        return steps, None
    groups = list(by_source.values())
    index = device.device_id
    kernels = [gpu.load_kernel(batch_kernel(group[0].fmt, dtype), gpu.capability_of(index)) for group in groups]
    tables = [_table(group, numpy_dtype(dtype).itemsize) for group in groups]
    packed = np.concatenate([table.reshape(-1) for table, _ in tables])
    memory = gpu.new_memory(packed.nbytes, device, call)
    gpu.send(packed.view(np.uint8), memory.pointer, call.handle)
    place = memory.pointer
    for group, kernel, (table, n_tiles) in zip(groups, kernels, tables, strict=True):
        config = gpu.launch_config(n_tiles, launch_shape("tile", group[0].fmt).threads)
        steps.append(partial(_launch, index, config, kernel, place, len(group)))
        place += table.nbytes
    return steps, memory


def _launch(index: int, config: LaunchConfig, kernel: Kernel, table: int, n_tensors: int, stream: int) -> None:
    # The table holds addresses, which count from 0.
    cuda_driver.launch_kernel(cuda_driver.stream_on(index, stream), config, kernel, 0, table, n_tensors, 0)


def _table(jobs: list[_Job], itemsize: int) -> tuple[NDArray[np.int64], int]:
    numbers = [(job.data.pointer, job.target.pointer, job.n_elements) for job in jobs]
    data, targets, n_elements = np.array(numbers, np.int64).T
    return tile_directory(launch_shape("tile", jobs[0].fmt), data, targets // itemsize, n_elements)
