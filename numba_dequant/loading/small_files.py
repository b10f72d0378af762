"""Loads small files to a GPU: the file is copied as it is while its header is read, and then dequantized.

Reading the header of a small file takes as long as copying its tensors. `gpu_loader` copies when the tensors are known;
here both go on at the same time, and at the end one launch per format dequantizes all tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from io import RawIOBase
from typing import Any

import numpy as np

from numba_dequant.api import backend_for
from numba_dequant.backends import cuda
from numba_dequant.backends.cuda_batch import Blocks, allocate_together, prepared_blocks
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.devices import available_cores
from numba_dequant.backends.gpu import OPEN
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.backends.host import HostBackend
from numba_dequant.backends.streams import CallStream
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.gguf.source import identity_of, source_of
from numba_dequant.interop import library_that_captures
from numba_dequant.kernels.native.records import FAULT_GPU
from numba_dequant.loading import gpu_buffers, gpu_faults, native_threads
from numba_dequant.loading.chunks import Chunk, TensorSlice
from numba_dequant.loading.files import check_unchanged
from numba_dequant.loading.python_threads import POLL_SECONDS
from numba_dequant.loading.requests import Request


def copy_of_file(source: Any, device: Any) -> SmallFile | None:
    """Begin to copy a file whose header has not been read, if it is small and the GPU has loaded files before.

    If anything is wrong, the result is None. The load that follows raises the error.
    """
    with suppress(NumbaDequantError, OSError):
        origin = source_of(source)
        # Before the device is asked for, which warns if no GPU can be used.
        if origin.data is not None or not any(gpu.idle_buffers for gpu in OPEN.values()):
            return None
        backend = backend_for(device, None)
        if isinstance(backend, HostBackend) or library_that_captures() is not None:
            return None
        gpu = backend.gpu
        if not gpu.idle_buffers or gpu.thread_functions is None:
            return None
        file = origin.open()
        if 0 < origin.size(file) <= gpu_buffers.TUNING.small_file_bytes:
            return SmallFile(file, CallStream(gpu))
        file.close()
    return None


def _are_plain(requests: Sequence[Request]) -> bool:
    """Whether all tensors are in one file, in the byte order of this machine, and become new arrays of values."""
    source = requests[0].tensor.source
    return source.data is None and all(
        tensor.source is source and tensor.byte_order == "little" and job.dtype is not None and job.out is None
        for tensor, job in requests
    )


class SmallFile:
    """A file that native threads are copying to a GPU.

    Use it in this order: `has`, `prepare`, `finish`; `stop` at any time.

    Args:
        file: the open file, which this object closes.
        call: the stream in whose order the memory is allocated and used.

    Raises:
        DeviceError: there is not enough memory, or no thread or file descriptor left.
    """

    def __init__(self, file: RawIOBase, call: CallStream) -> None:
        # If the file changes before its header is read, its bytes are those of another file.
        self._file, self._stamp, self._call = file, identity_of(file), call
        self._tuning = gpu_buffers.TUNING
        self._memory: DeviceBytes | None = None
        self._buffers: gpu_buffers.Buffers | None = None
        self._threads: native_threads.ReaderThreads | None = None
        self._results: list[Any] = []
        self._launches: list[Callable[[], None]] = []
        self._is_sound, self._is_ordered, self._has_ended = True, False, False
        try:
            self._begin()
        except BaseException:
            self.stop()
            raise

    def _begin(self) -> None:
        call, gpu, size = self._call, self._call.gpu, self._tuning.chunk_bytes
        sizes = [min(size, self._stamp.size - start) for start in range(0, self._stamp.size, size)]
        native_threads.stop_interrupted()
        with gpu.active():
            self._memory = cuda.new_memory(self._stamp.size, call)
            self._ready = gpu.record_event(call.handle)
            buffers = self._buffers = gpu_buffers.take(gpu)
            buffers.grow(min(self._tuning.buffers, len(sizes)))
        # A previous load may have failed.
        buffers.records["waited"] = buffers.records["is_taken"] = 0
        threads = self._threads = native_threads.ReaderThreads(
            sizes, len(sizes), buffers.records, self._tuning.subread_bytes, gpu, self._end_copy
        )
        threads.plan_copy(self._file.fileno(), self._memory.pointer)
        threads.set_buffer_count(min(len(buffers), len(sizes)))
        threads.publish(int(self._ready.handle))
        gpu_faults.start(threads, min(available_cores(), self._tuning.threads, threads.n_shares))
        threads.end()

    def has(self, requests: Sequence[Request], call: CallStream) -> bool:
        """Whether this is the file of all tensors, and `prepare` can be called for them."""
        if self._has_ended or not requests or not _are_plain(requests):
            return False
        return (
            (call.gpu, call.handle) == (self._call.gpu, self._call.handle)
            and self._stamp == requests[0].tensor.source.stamp
            and all(tensor.offset + tensor.n_bytes <= self._stamp.size for tensor, _ in requests)
        )

    def prepare(self, requests: Sequence[Request], call: CallStream) -> bool:
        """Allocate the results, and prepare the launches. False if there is not enough memory for that and the copy."""
        assert self._memory is not None
        base, found = self._memory.pointer, dict[str, list[Blocks]]()
        try:
            with call.gpu.active():
                self._results, targets = _outputs(requests, call)
                for (tensor, job), target in zip(requests, targets, strict=True):
                    blocks = Blocks(job.fmt, base + tensor.offset, target.pointer, job.n_elements)
                    found.setdefault(job.dtype or "", []).append(blocks)
                self._launches = [prepared_blocks(blocks, dtype, call) for dtype, blocks in found.items()]
        except DeviceError:
            self.stop()
            return False
        except BaseException:
            self.stop()
            raise
        self._requests, self._call = requests, call
        return True

    def finish(self, on_bytes_read: Callable[[int], None]) -> Generator[Any, None, None]:
        """The results, in order, ready in the order of the stream of the call.

        Raises:
            ReadError, GgufError, DeviceError: reading failed.
        """
        try:
            total = sum(tensor.n_bytes for tensor, _ in self._requests)
            self._wait(lambda n_bytes: on_bytes_read(n_bytes) if n_bytes < total else None)
            self._launch()
            # The last tensor is the first one that is missing if the file was cut short.
            last = max((tensor for tensor, _ in self._requests), key=lambda each: each.offset + each.n_bytes)
            check_unchanged(last, self._file)
            on_bytes_read(total)
        finally:
            results = self._results[::-1]
            self.stop()
        while results:
            yield results.pop()

    def _wait(self, on_bytes_read: Callable[[int], None]) -> None:
        """Wait until everything has been read."""
        assert self._threads is not None
        assert self._buffers is not None
        try:
            for number in range(len(self._threads.left)):
                while not self._threads.wait_for(number, POLL_SECONDS):
                    on_bytes_read(self._threads.bytes_read)
                    try:
                        gpu_faults.check(self._call.gpu, self._buffers.streams)
                    except DeviceError:
                        self._is_sound = False
                        raise
        except native_threads.ReaderFaultError as fault:
            self._is_sound &= fault.place != FAULT_GPU
            chunk = self._chunk(fault.chunk)
            raise gpu_faults.error_of(fault, chunk, self._requests, self._file, self._call.gpu) from None

    def _launch(self) -> None:
        assert self._buffers is not None
        gpu, handle = self._call.gpu, self._call.handle
        with gpu.active():
            for stream in self._buffers.streams:
                gpu.stream_wait_event(handle, gpu.record_event(int(stream.handle)))
            self._is_ordered = True
            for launch in self._launches:
                launch()

    def _chunk(self, number: int) -> Chunk:
        """A chunk and the parts of tensors in it, for an error. The first tensor stands for bytes of no tensor."""
        start = number * self._tuning.chunk_bytes
        end, parts = min(start + self._tuning.chunk_bytes, self._stamp.size), []
        for index, (tensor, _) in enumerate(self._requests):
            first, last = max(tensor.offset, start), min(tensor.offset + tensor.n_bytes, end)
            if first < last:
                parts.append(TensorSlice(index, first - tensor.offset, first - start, last - first))
        return Chunk(self._requests[0].tensor.path, start, end - start, parts or [TensorSlice(0, 0, 0, 0)])

    def stop(self) -> None:
        """Stop the threads, and free the copy in the order of the stream. Calling this twice is harmless."""
        if self._threads is not None:
            self._threads.stop()
        else:
            self._end_copy()

    def _end_copy(self) -> None:
        """All threads have ended, or none has been started."""
        self._has_ended = True
        self._file.close()
        if self._buffers is not None:
            try:
                if not self._is_ordered or not self._is_sound:
                    self._buffers.sync()
            except Exception:
                # The GPU has failed. This error must not replace the first one, which has been raised already.
                self._is_sound = False
            # After a failure, the GPU may never release a buffer.
            if self._is_sound:
                gpu_buffers.give_back(self._buffers)
        self._memory, self._results, self._launches = None, [], []


def _outputs(requests: Sequence[Request], call: CallStream) -> tuple[list[Any], list[DeviceBytes]]:
    """New results, and their memory. Without PyTorch, small ones share an allocation."""
    if call.returns_tensors:
        pairs = [cuda.output(job, call) for _, job in requests]
        return [result for result, _ in pairs], [target for _, target in pairs]
    results, targets = [], []
    dtypes: dict[Any, np.dtype[Any]] = {}
    for _, job in requests:
        kind = id(job.fmt), job.dtype
        dtype = dtypes.get(kind)
        if dtype is None:
            dtype = dtypes[kind] = job.result_dtype
        target = DeviceBytes(0, job.n_elements * dtype.itemsize, call.gpu, None)
        results.append(DeviceTensor(target, job.shape, dtype, call.handle, call.framework))
        targets.append(target)
    allocate_together(targets, call)
    return results, targets
