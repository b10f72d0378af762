"""Loading to a GPU: threads read chunks to pinned memory; the GPU copies and dequantizes them behind the reading.

The threads of a load share buffers, each of pinned memory with as much memory on the GPU, and a stream, which it shares
with others. The stream keeps the order within a buffer, events keep it between streams, the caller's among them, and a
count that the GPU writes tells when a buffer may be filled again. What the threads do is in `native_threads`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import RawIOBase
from typing import Any

import numpy as np
from cuda.core import Device, Stream
from numpy.typing import NDArray

from numba_dequant.arguments import Memory, check_apart, with_tensor_name
from numba_dequant.backends import cuda_driver, gpu, streams
from numba_dequant.backends.cuda_driver import DeviceBytes
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.devices import available_cores
from numba_dequant.backends.streams import CallStream
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.gguf.file import truncated
from numba_dequant.kernels.native.records import END_OF_FILE, FAULT_GPU, buffer_dtype
from numba_dequant.loading import native_threads
from numba_dequant.loading.chunks import Chunk, TensorSlice, plan_chunks, round_robin_by_disk
from numba_dequant.loading.files import changed, check_unchanged, open_unchanged, read_error, read_tensor
from numba_dequant.loading.python_threads import POLL_SECONDS
from numba_dequant.loading.requests import QuantizedTensor, Request

CHUNK_BYTES = 8 << 20
"""Bytes that are sent at a time: each copy costs the bus 2 us."""

SUBREAD_BYTES = 1 << 20
"""Bytes of a chunk that one thread reads: where several fill a buffer, few are needed, which the CPU's cache holds."""

BUFFERS = 8
"""Buffers of a load: two or three are being filled, the others are on their way or wait for the bus."""

STREAMS = 2
"""Streams that buffers share: while one dequantizes, the other copies. With more, a GPU loses time between them."""

DEFAULT_THREADS = 12
"""Threads at most, unless more are asked for: these read faster than the bus carries."""

MAX_BATCH = 32
"""Chunks that are planned before the threads are told."""


class Buffers:
    """What the threads of one load share on a GPU. It is expensive to make: pinned memory takes 0.7 ms per MiB."""

    def __init__(self, device: Device) -> None:
        # Declared first, so that it is destroyed first: memory is freed in stream order, so the streams must exist.
        self._memory: list[tuple[NDArray[np.uint8], DeviceBytes]] = []
        self.streams = [cuda_driver.create_stream(device) for _ in range(STREAMS)]
        self.records = np.zeros(BUFFERS, buffer_dtype)
        self._flags = cuda_driver.pinned(8 * len(self.records)).view(np.int64)
        self._flags[:] = 0

    def __len__(self) -> int:
        return len(self._memory)

    def grow(self, count: int, device: Device) -> None:
        """Make buffers until there are so many."""
        while len(self) < count:
            number = len(self)
            bit = number % len(self.streams)
            stream = int(self.streams[bit].handle)
            # One after the other: cuda-core cannot free pinned memory while an error of the same line is on its way.
            on_gpu = cuda_driver.allocate(CHUNK_BYTES, device, stream)
            host = cuda_driver.pinned(CHUNK_BYTES)
            flag = self._flags.ctypes.data + 8 * number
            self.records[number] = host.ctypes.data, on_gpu.pointer, stream, 1 << bit, 0, flag, 0, 0
            self._memory.append((host, on_gpu))

    def sync(self) -> None:
        """Wait until nothing is under way."""
        for stream in self.streams:
            stream.sync()


class BufferPool:
    """The buffers that no load has in use, by GPU. Loads take turns with them, in whatever thread."""

    def __init__(self) -> None:
        self.idle: dict[int, list[Buffers]] = {}
        self._lock = threading.Lock()

    def take(self, index: int, device: Device) -> Buffers:
        """Buffers for one load, new ones if none are idle."""
        with self._lock:
            kept = self.idle.get(index)
            if kept:
                return kept.pop()
        return Buffers(device)

    def give_back(self, index: int, buffers: Buffers) -> None:
        """Keep buffers for the next load; those that are kept already are not kept twice."""
        with self._lock:
            kept = self.idle.setdefault(index, [])
            if all(each is not buffers for each in kept):
                kept.append(buffers)

    def release(self, index: int | None = None) -> None:
        """Free the idle buffers of one GPU, or of all."""
        with self._lock:
            dropped = [self.idle.pop(each, []) for each in (list(self.idle) if index is None else [index])]
        for kept in dropped:
            while kept:
                kept.pop().sync()

    def forget_lock(self) -> None:
        """Make the lock anew in a forked process, where whoever held it does not exist."""
        self._lock = threading.Lock()


POOL = BufferPool()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.forget_lock)


@dataclass(slots=True)
class _Result:
    """A tensor that is being loaded: what the caller gets, where the threads write, and where the values belong.

    The two differ for an `out` at an address to which a kernel cannot store 16 bytes at a time.
    """

    returned: Any
    write_to: DeviceBytes
    caller_out: DeviceBytes


def load(
    requests: Sequence[Request],
    index: int,
    stream: Any,
    threads: int | None,
    prefetch: int | None,
    on_bytes_read: Callable[[int], None],
) -> Generator[Any, None, None]:
    """The results of the requests, in order, each ready once `stream` gets there.

    Raises:
        OutputError, DtypeError: an `out` or an output type is not right. Nothing has been read then.
        ReadError, GgufError, DeviceError: reading or allocating failed halfway.
    """
    call = streams.stream_for(stream, index, [request.out for request in requests])
    _check(requests, index, call)
    # Native threads read from files, and know no other byte order.
    is_odd = any(tensor.byte_order == "big" or tensor.source.data is not None for tensor, *_ in requests)
    if is_odd or not native_threads.IS_SUPPORTED or not cuda_driver.supports_stream_write(index):
        return _load_alone(requests, index, call, on_bytes_read)
    return _Load(
        requests, index, call, threads or min(available_cores(), DEFAULT_THREADS), prefetch, on_bytes_read
    ).run()


def _load_alone(
    requests: Sequence[Request], index: int, call: CallStream, on_bytes_read: Callable[[int], None]
) -> Generator[Any, None, None]:
    """What `load` does, in this thread, on any system: each tensor is read to the host when it is asked for."""
    done = 0
    for request in requests:
        result = _by_the_host(request, index, call)
        done += request.tensor.n_bytes
        on_bytes_read(done)
        yield result
        del result


def _by_the_host(request: Request, index: int, call: CallStream) -> Any:
    tensor = request.tensor
    host = read_tensor(tensor)
    try:
        if request.dtype is None:
            return QuantizedTensor(gpu.upload(host, index, call), tensor.format, tensor.shape)
        return gpu.load(host, tensor.format, request.dtype, tensor.shape, index, request.out, call)
    except DeviceError as error:
        raise DeviceError(f"{tensor.path}: tensor {tensor.name!r}: {error}") from error


def _check(requests: Sequence[Request], index: int, call: CallStream) -> None:
    """Check everything about the results that can be checked before they are made."""
    outputs = []
    with cuda_driver.active_gpu(index) as device:
        cuda_driver.refuse_capture(call.handle, "a file cannot be loaded as part of it; load before the capture")
        for request in requests:
            fmt = request.tensor.format
            try:
                if request.dtype is not None:
                    gpu.check_capability(fmt, request.dtype, index)
                if request.out is not None:
                    assert request.dtype is not None  # `requests` refuses `out` for bytes that are kept
                    shape, n_elements = request.tensor.shape, request.tensor.n_elements
                    kind = fmt.result_dtype(request.dtype)
                    out = gpu.checked_output(request.out, None, kind, shape, n_elements, device, call)
                    outputs.append(Memory(out.pointer, out.pointer + out.n_bytes, request.tensor.name, is_out=True))
            except NumbaDequantError as error:
                raise with_tensor_name(error, request.tensor.name) from error
    check_apart(outputs)


class _Load:
    """One load: its plan, its threads, and what has not been handed out yet."""

    def __init__(
        self,
        requests: Sequence[Request],
        index: int,
        call: CallStream,
        n_threads: int,
        prefetch: int | None,
        on_bytes_read: Callable[[int], None],
    ) -> None:
        self.requests, self.tensors = requests, [request.tensor for request in requests]
        self.index, self.call, self.stream = index, call, call.handle
        self._prefetch, self._on_bytes_read = prefetch, on_bytes_read
        # An order other than that of handing out would have the first tensor wait for one that is not due.
        order = range(len(requests)) if prefetch is not None else round_robin_by_disk(self.tensors)
        self._cut = plan_chunks(self.tensors, order, CHUNK_BYTES, in_turn=prefetch is not None)
        self._next = next(self._cut, None)
        self._chunks: list[Chunk] = []
        self._results: dict[int, _Result] = {}
        self._released = 0
        self._has_prepared = False
        self._ready: list[Any] = []
        self._files: dict[str, RawIOBase] = {}
        self._stack = ExitStack()
        self._n_threads = max(1, min(n_threads, native_threads.MAX_THREADS))
        self._is_sound = True

    def run(self) -> Generator[Any, None, None]:
        most = sum(tensor.n_bytes // (CHUNK_BYTES // 2) + 2 for tensor in self.tensors)
        self._start(most)
        try:
            if self._prefetch is None:
                # They are handed out together, and the caller's stream waits for each of ours once.
                self._plan(len(self.requests))
                for index in range(len(self.requests)):
                    self._wait_for(index)
                with cuda_driver.active_gpu(self.index) as device:
                    self._let_caller_wait(self._buffers.streams)
                    given = [self._finish_tensor(index, device) for index in range(len(self.requests))]
                yield from given
                return
            for index in range(len(self.requests)):
                self._plan(index + self._prefetch)
                self._wait_for(index)
                with cuda_driver.active_gpu(self.index) as device:
                    streams = enumerate(self._buffers.streams)
                    self._let_caller_wait(each for bit, each in streams if self._threads.has_written(1 << bit, index))
                    given = [self._finish_tensor(index, device)]
                yield given.pop()
        finally:
            self._threads.stop()

    def _start(self, most: int) -> None:
        native_threads.stop_interrupted()
        with cuda_driver.active_gpu(self.index) as device:
            context = cuda_driver.context_of(device)
            self._buffers = POOL.take(self.index, device)
        # What a load before may have left.
        self._buffers.records["waited"] = self._buffers.records["is_taken"] = 0
        sizes = [tensor.n_bytes for tensor in self.tensors]
        try:
            self._threads = native_threads.ReaderThreads(
                sizes, most, self._buffers.records, SUBREAD_BYTES, context, self._finish
            )
        except BaseException:
            POOL.give_back(self.index, self._buffers)
            raise

    def _plan(self, last: int) -> None:
        """Give the threads the chunks of all tensors up to this one."""
        if self._next is None:
            return
        with cuda_driver.active_gpu(self.index) as device:
            while self._next is not None and self._next.parts[0].index <= last:
                chunk = self._next
                if chunk.n_bytes > CHUNK_BYTES:  # the threads' code believes what it is told
                    raise DeviceError(f"{chunk.path}: a chunk of {chunk.n_bytes} bytes, and buffers of {CHUNK_BYTES}")
                for part in chunk.parts:
                    self._prepare(part.index, device)
                parts = [self._part(part) for part in chunk.parts]
                is_computed = any(kernel for _, _, _, _, kernel, *_ in parts)
                where = self._file(chunk).fileno(), chunk.offset, chunk.n_bytes
                self._threads.plan((*where, is_computed), parts)
                self._chunks.append(chunk)
                self._next = next(self._cut, None)
                # Waking a thread takes longer than planning a chunk; the first ones should not wait, though.
                if len(self._chunks) - self._released >= min(self._released + 1, MAX_BATCH):
                    self._release(device)
            self._release(device)
        if self._next is None:
            self._threads.end()

    def _release(self, device: Device) -> None:
        """Let the threads have what has been planned, with one more of them where there is work for it."""
        if self._has_prepared:
            self._ready.append(cuda_driver.record_event(self.index, self.stream))
            self._has_prepared = False
        if len(self._chunks) > self._released:
            self._released = len(self._chunks)
            most = min(BUFFERS, self._released)
            self._buffers.grow(most, device)
            self._threads.publish(int(self._ready[-1].handle))
            self._threads.set_buffer_count(most)
        while (n_started := self._threads.n_threads) < min(self._n_threads, self._threads.n_shares):
            try:
                self._threads.start()
            except OSError as error:
                self._n_threads = n_started
                if not n_started:
                    raise DeviceError(
                        f"cannot start a reader thread: {error.strerror}; end other work of this user, or raise the "
                        "limit (ulimit -u)"
                    ) from error
        self._on_bytes_read(self._threads.bytes_read)

    def _prepare(self, index: int, device: Device) -> None:
        """Get the memory of a tensor, in the order of the caller's stream, if there is none yet."""
        if index in self._results:
            return
        self._has_prepared = True
        request = self.requests[index]
        tensor = request.tensor
        try:
            if request.dtype is None:
                target = gpu.new_memory(tensor.n_bytes, device, self.call)
                data = DeviceTensor(target, (tensor.n_bytes,), cuda_driver.BYTES, self.stream, self.call.framework)
                self._results[index] = _Result(QuantizedTensor(data, tensor.format, tensor.shape), target, target)
                return
            what = tensor.format, request.dtype, tensor.n_elements, tensor.shape
            given, out = gpu.target_for(*what, device, request.out, self.call)
            # The kernel stores 16 bytes at a time: an odd address gets its values by way of memory of ours.
            target = cuda_driver.allocate(out.n_bytes, device, self.stream) if out.pointer % 16 else out
            self._results[index] = _Result(given, target, out)
        except NumbaDequantError as error:
            raise type(error)(f"{tensor.path}: tensor {tensor.name!r}: {error}") from error

    def _part(self, part: TensorSlice) -> tuple[int, ...]:
        request, target = self.requests[part.index], self._results[part.index].write_to
        fmt, dtype = request.tensor.format, request.dtype
        if dtype is None or fmt.decode is None:
            return part.index, part.at, part.n_bytes, target.pointer + part.start, 0, 0, 0, 0
        _, kernel, shape = gpu.launcher(fmt, dtype, "tile", self.index, self.stream)
        first = part.start // fmt.type_size * fmt.block_size
        n_elements = part.n_bytes // fmt.type_size * fmt.block_size
        out = target.pointer + first * numpy_dtype(dtype).itemsize
        launch = int(kernel.handle), shape.thread_blocks(n_elements), shape.threads, n_elements
        return part.index, part.at, part.n_bytes, out, *launch

    def _file(self, chunk: Chunk) -> RawIOBase:
        file = self._files.get(chunk.path)
        if file is None:
            first = self.tensors[chunk.parts[0].index]
            file = self._files[chunk.path] = self._stack.enter_context(open_unchanged(first))
        return file

    def _wait_for(self, index: int) -> None:
        try:
            while not self._threads.wait_for(index, POLL_SECONDS):
                self._on_bytes_read(self._threads.bytes_read)
                self._check_gpu()
        except native_threads.ReaderFaultError as fault:
            raise self._error_of(fault) from None
        if self.tensors[index].n_bytes:
            check_unchanged(self.tensors[index], self._files[self.tensors[index].path])
        self._on_bytes_read(self._threads.bytes_read)

    def _check_gpu(self) -> None:
        """Look whether the GPU still works: a thread would wait for its buffer in vain."""
        try:
            for stream in self._buffers.streams:
                cuda_driver.raise_if_failed(int(stream.handle))
        except DeviceError as error:
            self._is_sound = False
            raise DeviceError(f"cuda:{self.index}: {error}") from error

    def _error_of(self, fault: native_threads.ReaderFaultError) -> NumbaDequantError:
        chunk = self._chunks[fault.chunk]
        first = self.tensors[chunk.parts[0].index]
        if fault.place == FAULT_GPU:
            self._is_sound = False
            message = cuda_driver.message_of(fault.code)
            return DeviceError(f"{first.path}: tensor {first.name!r}: cuda:{self.index}: {message}")
        if fault.code == END_OF_FILE:
            size = self._files[chunk.path].seek(0, 2)
            cut_short = (self.tensors[part.index] for part in chunk.parts)
            gone = next((each for each in cut_short if each.offset + each.n_bytes > size), None)
            return truncated(gone, size) if gone is not None else changed(first)
        error = OSError(fault.code, os.strerror(fault.code))
        return read_error(self.tensors[chunk.index_at(fault.offset)], fault.offset, error)

    def _let_caller_wait(self, streams: Iterable[Stream]) -> None:
        """Let the caller's stream wait for what these have been given so far."""
        for stream in streams:
            cuda_driver.stream_wait_event(self.stream, cuda_driver.record_event(self.index, int(stream.handle)))

    def _finish_tensor(self, index: int, device: Device) -> Any:
        """Remove a finished tensor from the load and return it; the caller's stream waits for its last write."""
        self._prepare(index, device)  # a tensor without bytes is in no chunk
        result = self._results.pop(index)
        if result.write_to is not result.caller_out:
            cuda_driver.copy_on_device(
                result.caller_out.pointer, result.write_to.pointer, result.caller_out.n_bytes, self.stream
            )
        streams.release(self.call, self.index, None, self.requests[index].out)
        return result.returned

    def _finish(self) -> None:
        """Free what has not been handed out, once nothing writes to it any more; no thread works now."""
        self._stack.close()
        try:
            if self._results or not self._is_sound:
                self._buffers.sync()
        except Exception:
            # The GPU has failed, and whoever asked it first has said so: this error must not take the place of that.
            self._is_sound = False
        self._results.clear()
        # A buffer that the GPU has not given back would be waited for in vain.
        if self._is_sound:
            POOL.give_back(self.index, self._buffers)
