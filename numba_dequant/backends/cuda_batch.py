"""Batches on a GPU: one launch per format, with a table of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from cuda.core import Event
from numpy.typing import NDArray

from numba_dequant.arguments import Job, after_writing, host_bytes, is_on_gpu, with_tensor_name
from numba_dequant.backends import cuda, streams
from numba_dequant.backends.batch import Batch
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.gpu import Gpu
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.backends.overlap import Memory, check_apart
from numba_dequant.backends.streams import CallStream
from numba_dequant.errors import NumbaDequantError
from numba_dequant.format import Format
from numba_dequant.interop import TORCH, library_of
from numba_dequant.kernels.compiler import batch_kernel
from numba_dequant.kernels.launch_shape import launch_shape, tile_directory

SHARED_MEMORY = 64 << 20
"""Tensors share allocations of up to this many bytes, because an allocation takes as long as a launch."""

LARGE = 1 << 24
"""The GPU needs at least as long for a tensor of so many elements as the host for a launch."""

ALIGNMENT = 256
"""Alignment in bytes of each tensor in a shared allocation, the same as that of an allocation."""

Step = Callable[[int], None]
"""A function that queues work on the stream with the given handle."""


@dataclass(slots=True)
class _Kind:
    """The jobs of one format.

    Attributes:
        fmt: the format.
        dtype: the output type of all jobs.
        result_dtype: the dtype of the results.
        tasks: the tasks.
    """

    fmt: Format
    dtype: str
    result_dtype: np.dtype[Any]
    tasks: list[_Task]


@dataclass(slots=True)
class _Task:
    """A checked job with its memory.

    Attributes:
        job: the job.
        data: the blocks on the GPU; the address is 0 until blocks from the host have memory there.
        target: memory for the values; the address is 0 until a new result has memory.
        host: the blocks, if they are on the host.
        gather: step of each run that copies strided data to `data`.
        result: the result for the caller.
    """

    job: Job
    data: DeviceBytes
    target: DeviceBytes
    host: NDArray[np.uint8] | None
    gather: Step | None
    result: Any

    def memory(self) -> list[Memory]:
        """The memory ranges that are read and written."""
        return [
            Memory(memory.pointer, memory.pointer + memory.n_bytes, self.job.name, is_out)
            for memory, is_out in ((self.data, False), (self.target, True))
            if memory.pointer
        ]


def prepare(jobs: Sequence[Job], gpu: Gpu, stream: Any) -> Batch[Any]:
    """The batch of `numba_dequant.prepare_many` on a GPU."""
    arrays = _arrays(jobs)
    call = streams.stream_for(stream, gpu, arrays)
    with gpu.active():
        gpu.refuse_capture(call.handle, "a batch cannot be prepared during the capture; call prepare_many before it")
        tasks, kinds = _checked(jobs, call)
        steps, tables = _steps(tasks, kinds, call)
        return Batch({task.job.name: task.result for task in tasks}, _Run(call, steps, tasks, tables, arrays))


def dequantize(jobs: Sequence[Job], gpu: Gpu, stream: Any) -> dict[Any, Any]:
    """The results of `numba_dequant.dequantize_many` on a GPU."""
    arrays = _arrays(jobs)
    call = streams.stream_for(stream, gpu, arrays)
    with gpu.active():
        gpu.refuse_capture(call.handle, "a batch cannot be prepared during the capture; call prepare_many before it")
        tasks, kinds = _checked(jobs, call, is_once=True)
        for step in _steps(tasks, kinds, call)[0]:
            step(call.handle)
        results = {}
        for task in tasks:
            job = task.job
            results[job.name] = task.result
            if job.out is not None or not isinstance(job.data, DeviceTensor):
                streams.release(call, data=job.data, out=job.out)
        for owner in _owners([task.data for task in tasks]):
            owner.used_on(call.handle)
        return results


def _arrays(jobs: Sequence[Job]) -> list[Any]:
    """The data and the outputs of jobs."""
    return [job.data for job in jobs] + [job.out for job in jobs if job.out is not None]


def _owners(memories: Iterable[DeviceBytes]) -> list[Any]:
    """The owners of memory that this package allocated."""
    owners = {id(memory.owner): memory.owner for memory in memories}
    return [owner for owner in owners.values() if hasattr(owner, "used_on")]


def _checked(jobs: Sequence[Job], call: CallStream, *, is_once: bool = False) -> tuple[list[_Task], list[_Kind]]:
    """Check all jobs, and get memory for them: the tasks in order, and by format.

    Args:
        jobs: the jobs.
        call: the stream.
        is_once: whether nothing runs again. The GPU then begins with large tensors while others are checked, unless
            outputs were passed, to which nothing may be written before all checks.
    """
    gpu, has_outputs = call.gpu, any(job.out is not None for job in jobs)
    begins_early = is_once and not has_outputs
    kinds: dict[int, _Kind] = {}
    tasks, on_host, new = [], [], []
    for job in jobs:
        try:
            kind = kinds.get(id(job.fmt))
            if kind is None:
                cuda.check_capability(job.dtype, job.fmt, gpu)
                kind = kinds[id(job.fmt)] = _Kind(job.fmt, job.dtype or "", job.result_dtype, [])
            task = _task(job, call, kind)
        except NumbaDequantError as error:
            raise with_tensor_name(error, job.name) from error
        tasks.append(task)
        if task.host is not None:
            on_host.append(task)
        elif begins_early and job.n_elements >= LARGE and task.gather is None:
            allocate_together([task.target], call)
            cuda.dequantize_into(task.data, job, task.target, call.handle)
            streams.release(call, data=job.data)  # now, because a later job may be wrong
            continue
        if job.out is None:
            new.append(task.target)
        if job.n_elements:
            kind.tasks.append(task)
    if has_outputs:
        check_apart(memory for task in tasks for memory in task.memory())
    allocate_together([task.data for task in on_host], call)
    allocate_together(new, call)
    for task in on_host:
        if task.host is not None and task.host.size:
            gpu.send(task.data.pointer, task.host, call.handle)
    return tasks, list(kinds.values())


class _Run:
    """Queues all steps of a batch on the caller's stream, and owns the memory that the steps use."""

    def __init__(
        self, call: CallStream, steps: list[Step], tasks: list[_Task], tables: DeviceBytes | None, arrays: list[Any]
    ) -> None:
        self._call, self._steps, self._arrays = call, steps, arrays
        self._kept = tasks, tables
        libraries = {library.name: library for array in arrays if (library := streams.owner_of(array)) is not None}
        self._others = [library for library in libraries.values() if library is not call.framework]
        memories = [task.data for task in tasks] + [task.target for task in tasks] + ([tables] if tables else [])
        self._owners = _owners(memories)
        self._results = [task.result for task in tasks if isinstance(task.result, DeviceTensor)]
        self._outs = [task.result for task in tasks if not isinstance(task.result, DeviceTensor)]
        self._uploaded: Event | None = call.gpu.record_event(call.handle)
        self._last = call.handle
        self._used = {call.handle}

    def __call__(self) -> None:
        call, gpu = self._call, self._call.gpu
        handle = call.framework.current_stream(gpu.index) if call.framework is not None else call.handle
        with gpu.active():
            if handle != call.handle and self._uploaded is not None:
                # The data was copied to the GPU on the stream of `prepare`.
                gpu.wait_for_event(self._uploaded)
                self._uploaded = None
            others = [library.current_stream(gpu.index) for library in self._others]
            for other in others:
                gpu.stream_wait_stream(handle, other)
            for step in self._steps:
                step(handle)
            for out in self._outs:
                after_writing(out)
            if not call.is_named:
                for other in others:
                    gpu.stream_wait_stream(other, handle)
            if handle != self._last:
                self._last = handle
                self._used.add(handle)
                for result in self._results:
                    result.stream = handle

    def __del__(self) -> None:
        # The streams may still use this memory, and results that the caller keeps.
        with suppress(Exception), self._call.gpu.active():  # the interpreter may be shutting down
            for handle in self._used:
                for owner in self._owners:
                    owner.used_on(handle)
            if self._call.is_named:
                for array in self._arrays:
                    streams.release(self._call, data=array)


def _task(job: Job, call: CallStream, kind: _Kind) -> _Task:
    host, array, gpu = None, job.data, call.gpu
    gather: Step | None = None
    if isinstance(array, DeviceTensor):
        data = streams.memory_of(array, call)
    else:
        if cuda.is_pinned_tensor(array):
            array = TORCH.to_gpu(array, gpu.index, call.handle)
        if is_on_gpu(array):
            data = streams.memory_of(array, call)
            library = library_of(array)
            if library is not None and not library.is_contiguous(array):
                gather = partial(library.copy, data.owner, array, gpu.index)
        else:
            host = host_bytes(array)
            data = DeviceBytes(0, host.size, gpu, None)
    if data.gpu is not gpu:
        raise cuda.elsewhere(data, gpu)
    job.measure(data.n_bytes)
    if job.out is not None:
        target = cuda.checked_output(job, call, data if host is None else None)
        return _Task(job, data, target, host, gather, job.out)
    target = DeviceBytes(0, job.n_elements * kind.result_dtype.itemsize, gpu, None)
    result = DeviceTensor(target, job.shape, kind.result_dtype, call.handle, call.framework)
    return _Task(job, data, target, host, gather, result)


def allocate_together(memories: Iterable[DeviceBytes], call: CallStream) -> None:
    """Allocate device memory for each; small ones share an allocation.

    Raises:
        DeviceError: there is not enough memory.
    """
    start = 0
    sharing: list[tuple[DeviceBytes, int]] = []
    for memory in memories:
        size = -(-memory.n_bytes // ALIGNMENT) * ALIGNMENT
        if start + size > SHARED_MEMORY:
            _share(sharing, start, call)
            sharing, start = [], 0
        sharing.append((memory, start))
        start += size
    _share(sharing, start, call)


def _share(sharing: list[tuple[DeviceBytes, int]], n_bytes: int, call: CallStream) -> None:
    if sharing:
        whole = cuda.new_memory(n_bytes, call)
        for memory, start in sharing:
            memory.pointer, memory.owner = whole.pointer + start, whole.owner


class Blocks(NamedTuple):
    """Contiguous blocks on a GPU, and where their values go: the addresses of both. That of the values is aligned."""

    fmt: Format
    pointer: int
    target: int
    n_elements: int


def dequantize_blocks(found: Iterable[Blocks], dtype: str, call: CallStream) -> None:
    """Queue the dequantization of blocks with one launch per format. Nothing is checked but what the GPU can do.

    Use it for memory of this package's own: checks of arrays take much longer than the launches.

    Raises:
        DtypeError, DeviceError: as for `dequantize`.
    """
    prepared_blocks(found, dtype, call)()


def prepared_blocks(found: Iterable[Blocks], dtype: str, call: CallStream) -> Callable[[], None]:
    """A function that does what `dequantize_blocks` does. It may be called before the blocks are in their memory.

    Raises:
        DtypeError, DeviceError: as for `dequantize`.
    """
    by_format: dict[int, list[Blocks]] = {}
    for blocks in found:
        if blocks.n_elements:
            by_format.setdefault(id(blocks.fmt), []).append(blocks)
    gpu, groups = call.gpu, []
    steps: list[Step] = []
    with gpu.active():
        for group in by_format.values():
            fmt = group[0].fmt
            cuda.check_capability(dtype, fmt, gpu)
            if fmt.stored_dtype is None:
                groups.append((fmt, dtype, [each[1:] for each in group]))
                continue
            size = fmt.type_size
            steps += [partial(gpu.copy_on_device, each.target, each.pointer, each.n_elements * size) for each in group]
        launches, tables = launches_for(groups, call)

    def run(tables: DeviceBytes | None = tables) -> None:
        with gpu.active():
            for step in steps + launches:
                step(call.handle)

    return run


def _steps(tasks: Sequence[_Task], kinds: Iterable[_Kind], call: CallStream) -> tuple[list[Step], DeviceBytes | None]:
    """The steps of a run, and the memory of their tables: one launch per format, and a step for each other tensor."""
    steps = [task.gather for task in tasks if task.gather is not None]
    groups = []
    for kind in kinds:
        is_stored, rows = kind.fmt.stored_dtype is not None, []
        for task in kind.tasks:
            if is_stored or task.target.pointer % 16:
                steps.append(partial(cuda.dequantize_into, task.data, task.job, task.target))
            else:
                rows.append((task.data.pointer, task.target.pointer, task.job.n_elements))
        if rows:
            groups.append((kind.fmt, kind.dtype, rows))
    launches, memory = launches_for(groups, call)
    return steps + launches, memory


def launches_for(
    groups: Sequence[tuple[Format, str, Sequence[tuple[int, int, int]]]], call: CallStream
) -> tuple[list[Step], DeviceBytes | None]:
    """A launch for each format, and the memory of their tables.

    Args:
        groups: a format, the output type, and for each tensor the addresses of its blocks and of its values, and the
            number of its elements.
        call: the stream on which the tables are copied to the GPU.
    """
    if not groups:
        return [], None
    gpu = call.gpu
    # All kernels are loaded before anything is queued, because compiling may fail.
    kernels = [gpu.load_kernel(batch_kernel(fmt, dtype)) for fmt, dtype, _ in groups]
    directories = [_directory(*group) for group in groups]
    packed = np.concatenate([directory.reshape(-1) for directory, _ in directories])
    memory = cuda.new_memory(packed.nbytes, call)
    gpu.send(memory.pointer, packed.view(np.uint8), call.handle)
    start, launches = memory.pointer, []
    for (fmt, _, rows), kernel, (directory, n_tiles) in zip(groups, kernels, directories, strict=True):
        threads = launch_shape("tile", fmt).threads
        # The directory has absolute addresses, so both base addresses are 0.
        launches.append(gpu.launcher(kernel, n_tiles, threads, (0, start, len(rows), 0)))
        start += directory.nbytes
    return launches, memory


def _directory(fmt: Format, dtype: str, rows: Sequence[tuple[int, int, int]]) -> tuple[NDArray[np.int64], int]:
    data, targets, n_elements = np.array(rows, np.int64).T
    size = fmt.result_dtype(dtype).itemsize
    return tile_directory(launch_shape("tile", fmt), data, targets // size, n_elements)
