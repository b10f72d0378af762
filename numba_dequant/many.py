"""Many tensors on a GPU: one launch per format, over a table of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from cuda.core import Device, launch
from numpy.typing import NDArray

from numba_dequant import gpu, runtime
from numba_dequant.arguments import Tensor, host_bytes, is_on_gpu, named, result_shape
from numba_dequant.compiler import TABLE
from numba_dequant.device_tensor import DeviceTensor, memory_of
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import NumbaDequantError
from numba_dequant.format import Format
from numba_dequant.mapping import mapping_named, tile_table
from numba_dequant.runtime import DeviceBytes

SHARED_MEMORY = 64 << 20
"""Tensors share pieces of device memory of up to so many bytes: getting one costs as much as launching a kernel."""

ALIGNMENT = 256
"""Of each tensor in shared memory: as if it had been allocated alone."""


@dataclass(slots=True)
class _Job:
    """One tensor: everything about it has been checked, and perhaps it still needs memory on the GPU."""

    source: Format
    n_elements: int
    shape: tuple[int, ...]
    kind: np.dtype[Any]
    data: DeviceBytes
    target: DeviceBytes
    host: NDArray[np.uint8] | None
    result: Any


def prepare(tensors: list[Tensor], dtype: str, index: int, stream: Any) -> tuple[dict[Any, Any], Callable[[], None]]:
    """The results of `numba_dequant.prepare_many` on CUDA device `index`, and what queues the work that fills them."""
    handle = runtime.stream_handle(stream)
    with runtime.current(index) as device:
        jobs = {}
        for tensor in tensors:
            try:
                jobs[tensor.name] = _job(tensor, dtype, device, handle)
            except NumbaDequantError as error:
                raise named(error, tensor) from error
        _allocate([job.data for job in jobs.values() if job.host is not None], device, handle)
        _allocate([job.target for job in jobs.values() if job.result is None], device, handle)
        for job in jobs.values():
            if job.host is not None and job.host.size:
                gpu.send(job.host, job.data.pointer, handle)
            if job.result is None:
                job.result = DeviceTensor(job.target, job.shape, job.kind, handle)
        steps, tables = _steps(list(jobs.values()), dtype, device, handle)
        return {name: job.result for name, job in jobs.items()}, partial(_run, index, steps, (jobs, tables))


def _run(index: int, steps: list[Callable[[], None]], kept: object) -> None:
    """Queue all steps; `kept` are the owners of the memory whose addresses they hold."""
    with runtime.current(index):
        for step in steps:
            step()


def _job(tensor: Tensor, dtype: str, device: Device, stream: int) -> _Job:
    host = None
    if isinstance(tensor.data, DeviceTensor) or is_on_gpu(tensor.data):
        data = memory_of(tensor.data, stream)
        gpu.check_place(data, device)
    else:
        host = host_bytes(tensor.data)
        data = DeviceBytes(0, host.size, device.device_id, None)
    gpu.check_capability(tensor.source, dtype, device.device_id)
    n_elements = tensor.source.n_elements(data.n_bytes)
    shape = result_shape(tensor.shape, n_elements, tensor.out)
    kind = tensor.source.stored_dtype or numpy_dtype(dtype)
    if tensor.out is None:
        target = DeviceBytes(0, n_elements * kind.itemsize, device.device_id, None)
    else:
        read = data if host is None else None
        target = gpu.checked_output(tensor.out, read, kind, shape, n_elements, device, stream)
    return _Job(tensor.source, n_elements, shape, kind, data, target, host, tensor.out)


def _allocate(pieces: list[DeviceBytes], device: Device, stream: int) -> None:
    """Get device memory for each piece; small ones share."""
    start = 0
    sharing: list[tuple[DeviceBytes, int]] = []
    for piece in pieces:
        size = -(-piece.n_bytes // ALIGNMENT) * ALIGNMENT
        if start + size > SHARED_MEMORY:
            _share(sharing, start, device, stream)
            sharing, start = [], 0
        sharing.append((piece, start))
        start += size
    _share(sharing, start, device, stream)


def _share(pieces: list[tuple[DeviceBytes, int]], n_bytes: int, device: Device, stream: int) -> None:
    if pieces:
        whole = runtime.allocate(n_bytes, device, stream)
        for piece, start in pieces:
            piece.pointer, piece.owner = whole.pointer + start, whole.owner


def _steps(
    jobs: list[_Job], dtype: str, device: Device, stream: int
) -> tuple[list[Callable[[], None]], DeviceBytes | None]:
    """What is to be queued, and the memory of the tables for it.

    That is one launch per format, and a step for each tensor that cannot be part of one.
    """
    steps: list[Callable[[], None]] = []
    by_source: dict[int, list[_Job]] = {}
    for job in jobs:
        if not job.n_elements:
            continue
        if job.source.stored_dtype is not None or job.target.pointer % 16:
            of_one = job.data, job.source, dtype, job.n_elements, job.target, stream
            steps.append(partial(gpu.dequantize_into, *of_one))
        else:
            by_source.setdefault(id(job.source), []).append(job)
    if not by_source:
        return steps, None
    groups = list(by_source.values())
    capability = gpu.capability_of(device.device_id)
    kernels = [gpu.load_kernel(group[0].source, dtype, TABLE, capability) for group in groups]
    tables = [_table(group, numpy_dtype(dtype).itemsize) for group in groups]
    packed = np.concatenate([table.reshape(-1) for table, _ in tables])
    memory = runtime.allocate(packed.nbytes, device, stream)
    gpu.send(packed.view(np.uint8), memory.pointer, stream)
    queue = runtime.stream_on(device.device_id, stream)
    place = memory.pointer
    for group, kernel, (table, n_tiles) in zip(groups, kernels, tables, strict=True):
        config = gpu.launch_config(n_tiles, mapping_named("tile", group[0].source).threads)
        # The table holds addresses, which count from 0.
        steps.append(partial(launch, queue, config, kernel, 0, place, len(group), 0))
        place += table.nbytes
    return steps, memory


def _table(jobs: list[_Job], itemsize: int) -> tuple[NDArray[np.int64], int]:
    numbers = [(job.data.pointer, job.target.pointer, job.n_elements) for job in jobs]
    data, targets, n_elements = np.array(numbers, np.int64).T
    return tile_table(mapping_named("tile", jobs[0].source), data, targets // itemsize, n_elements)
