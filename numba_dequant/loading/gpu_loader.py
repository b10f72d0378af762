"""Loads tensors to a GPU: threads read chunks to pinned memory, while the GPU copies and dequantizes earlier chunks.

The threads share buffers. A buffer is pinned memory, GPU memory of the same size, and a stream, which several buffers
share. The stream orders the work of a buffer; events order the streams, including the stream of the caller. The GPU
writes a count when a buffer may be filled again. The threads are in `native_threads`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from typing import Any

from numba_dequant.arguments import with_tensor_name
from numba_dequant.backends import cuda, streams
from numba_dequant.backends.devices import available_cores
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.backends.overlap import Memory, check_apart
from numba_dequant.backends.streams import CallStream
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.kernels.native.records import FAULT_GPU
from numba_dequant.loading import gpu_buffers, gpu_faults, native_threads
from numba_dequant.loading.chunks import Chunk, TensorSlice, plan_chunks, round_robin_by_disk
from numba_dequant.loading.files import check_unchanged, open_unchanged, read_tensor
from numba_dequant.loading.groups import Groups, GroupsOfGenerator, GroupsOfLoad
from numba_dequant.loading.python_threads import POLL_SECONDS
from numba_dequant.loading.requests import Request
from numba_dequant.loading.small_files import SmallFile


@dataclass(slots=True)
class _Result:
    """A tensor during the load: the result for the caller, the memory that the GPU writes, and the final memory.

    Both memories are the same, except for an `out` whose address is not a multiple of 16.
    """

    returned: Any
    write_to: DeviceBytes
    caller_out: DeviceBytes


def load(
    requests: Sequence[Request],
    call: CallStream,
    threads: int | None,
    prefetch: int | None,
    on_bytes_read: Callable[[int], None],
    begun: SmallFile | None = None,
) -> Generator[Any, None, None]:
    """The results of the requests, in order, ready in the order of the stream of `call`.

    Args:
        requests: the tensors.
        call: the stream.
        threads: the number of threads; None means the default.
        prefetch: the number of tensors to read ahead; None to return all together.
        on_bytes_read: called with the number of bytes that have been read.
        begun: the file, if it is being copied already. It is used if it has the tensors.

    Raises:
        OutputError, DtypeError: an `out` or an output type is wrong. Nothing has been read.
        ReadError, GgufError, DeviceError: reading or allocating failed, or a CUDA graph is being captured.
    """
    _check(requests, call)
    if _needs_python(requests, call):
        return _load_alone(requests, call, on_bytes_read)
    if prefetch is not None:
        return _Load(requests, call, threads, on_bytes_read, is_whole=False, in_turn=True).run_in_turn(prefetch)
    return _load_together(requests, call, threads, on_bytes_read, begun)


def _load_together(
    requests: Sequence[Request],
    call: CallStream,
    threads: int | None,
    on_bytes_read: Callable[[int], None],
    begun: SmallFile | None,
) -> Generator[Any, None, None]:
    if begun is not None and begun.has(requests, call) and begun.prepare(requests, call):
        yield from begun.finish(on_bytes_read)
        return
    if begun is not None:
        begun.stop()
    yield from _Load(requests, call, threads, on_bytes_read, is_whole=True).run()


def load_groups(
    requests: Sequence[Request],
    call: CallStream,
    threads: int | None,
    on_bytes_read: Callable[[int], None],
    ends: Sequence[int],
) -> Groups:
    """Loads the requests in groups with these ends.

    The caller's thread plans the reads, and native threads read. A Python thread in between would take the interpreter
    from the caller for milliseconds at a time.

    Raises:
        OutputError, DtypeError, ReadError, GgufError, DeviceError: as for `load`.
    """
    _check(requests, call)
    if _needs_python(requests, call):
        return GroupsOfGenerator(partial(_load_alone, requests, call), ends, on_bytes_read, has_thread=False)
    return GroupsOfLoad(_Load(requests, call, threads, on_bytes_read, is_whole=False), ends)


def _needs_python(requests: Sequence[Request], call: CallStream) -> bool:
    """Whether Python must read. Native threads only read files, in the byte order of this machine."""
    return call.gpu.thread_functions is None or any(
        tensor.byte_order == "big" or tensor.source.data is not None for tensor, _ in requests
    )


def _load_alone(
    requests: Sequence[Request], call: CallStream, on_bytes_read: Callable[[int], None]
) -> Generator[Any, None, None]:
    """Load in this thread, on any system. Each tensor is read to the host when the caller needs it."""
    done = 0
    for request in requests:
        result = _by_the_host(request, call)
        done += request.tensor.n_bytes
        on_bytes_read(done)
        yield result
        del result


def _by_the_host(request: Request, call: CallStream) -> Any:
    host = read_tensor(request.tensor)
    try:
        if request.job.dtype is None:
            return request.finished(cuda.upload(host, request.job, call))
        return cuda.load(host, request.job, call)
    except DeviceError as error:
        raise request.blame(error) from error


def _check(requests: Sequence[Request], call: CallStream) -> None:
    """Check outputs and output types, before anything is read."""
    outputs, checked = [], set()
    with call.gpu.active():
        call.gpu.refuse_capture(call.handle, "a file cannot be loaded as part of the graph; load before the capture")
        for _, job in requests:
            kind = id(job.fmt), job.dtype
            if job.out is None and kind in checked:
                continue
            checked.add(kind)
            try:
                cuda.check_capability(job.dtype, job.fmt, call.gpu)
                if job.out is not None:
                    out = cuda.checked_output(job, call)
                    outputs.append(Memory(out.pointer, out.pointer + out.n_bytes, job.name, is_out=True))
            except NumbaDequantError as error:
                raise with_tensor_name(error, job.name) from error
    check_apart(outputs)


class _Load:
    """One load: its plan, its threads, and the tensors that have not been returned yet."""

    def __init__(
        self,
        requests: Sequence[Request],
        call: CallStream,
        threads: int | None,
        on_bytes_read: Callable[[int], None],
        *,
        is_whole: bool,
        in_turn: bool = False,
    ) -> None:
        self.requests, self.tensors = requests, [request.tensor for request in requests]
        self.call, self.gpu, self.stream = call, call.gpu, call.handle
        self._on_bytes_read = on_bytes_read
        self._tuning = gpu_buffers.TUNING
        # Unless all are returned together, tensors are read in the order in which they are returned.
        order = round_robin_by_disk(self.tensors) if is_whole else range(len(requests))
        self._cut = plan_chunks(self.tensors, order, self._tuning.chunk_bytes, in_turn=in_turn)
        self._next = next(self._cut, None)
        self._chunks: list[Chunk] = []
        self._results: dict[int, _Result] = {}
        self._released = 0
        self._has_prepared = False
        self._ready: list[Any] = []
        self._files: dict[str, RawIOBase] = {}
        self._stack = ExitStack()
        n_threads = threads or min(available_cores(), self._tuning.threads)
        self._n_threads = max(1, min(n_threads, native_threads.MAX_THREADS))
        self._is_sound, self._has_started = True, False

    def run(self) -> Generator[Any, None, None]:
        """All tensors together, so that the caller's stream waits only once for each of our streams."""
        self.start()
        try:
            self.plan(len(self.requests))
            results = self.finish(0, len(self.requests))
            yield from results
            results.clear()
        finally:
            self.stop()

    def run_in_turn(self, prefetch: int) -> Generator[Any, None, None]:
        """One tensor after the other."""
        self.start()
        try:
            for index in range(len(self.requests)):
                self.plan(index + prefetch + 1)
                self._wait_for(index, index + 1)
                with self.gpu.active():
                    numbered = enumerate(self._buffers.streams)
                    self._let_caller_wait(
                        stream for bit, stream in numbered if self._threads.has_written(1 << bit, index)
                    )
                    finished = [self._finish_tensor(index)]
                yield finished.pop()
        finally:
            self.stop()

    def start(self) -> None:
        """Take the buffers. The threads start when there is work for them."""
        most = sum(tensor.n_bytes // (self._tuning.chunk_bytes // 2) + 2 for tensor in self.tensors)
        self._most_shares = sum(-(-tensor.n_bytes // self._tuning.subread_bytes) for tensor in self.tensors)
        native_threads.stop_interrupted()
        with self.gpu.active():
            self._buffers = gpu_buffers.take(self.gpu)
        # A previous load may have failed.
        self._buffers.records["waited"] = self._buffers.records["is_taken"] = 0
        sizes = [tensor.n_bytes for tensor in self.tensors]
        try:
            self._threads = native_threads.ReaderThreads(
                sizes, most, self._buffers.records, self._tuning.subread_bytes, self.gpu, self._finish
            )
        except BaseException:
            gpu_buffers.give_back(self._buffers)
            raise

    def stop(self) -> None:
        """Stop the threads, and free what has not been returned."""
        self._threads.stop()

    def finish(self, first: int, end: int) -> list[Any]:
        """Wait for some tensors, which are planned, and return them."""
        self._wait_for(first, end)
        with self.gpu.active():
            self._let_caller_wait(self._buffers.streams)
            return [self._finish_tensor(index) for index in range(first, end)]

    def plan(self, end: int) -> None:
        """Pass the chunks of all tensors before number `end` to the threads."""
        if self._next is None:
            return
        with self.gpu.active():
            while self._next is not None and self._next.parts[0].index < end:
                chunk = self._next
                size = self._tuning.chunk_bytes
                if chunk.n_bytes > size:  # the native code does not check this
                    raise DeviceError(
                        f"{chunk.path}: a chunk has {chunk.n_bytes} bytes, a buffer only {size}; please report this"
                    )
                for part in chunk.parts:
                    self._prepare(part.index)
                parts = [self._part(part) for part in chunk.parts]
                is_computed = any(kernel for _, _, _, _, kernel, *_ in parts)
                where = self._file(chunk).fileno(), chunk.offset, chunk.n_bytes
                self._threads.plan((*where, is_computed), parts)
                self._chunks.append(chunk)
                self._next = next(self._cut, None)
                # Waking a thread takes longer than planning a chunk, so chunks are passed on in growing batches.
                n_planned = len(self._chunks) - self._released
                if n_planned >= min(self._released + 1, self._tuning.max_batch) or self._threads.are_waiting:
                    self._release()
            self._release()
        if self._next is None:
            self._threads.end()

    def _release(self) -> None:
        """Pass the planned chunks to the threads, and start more threads if there is work for them."""
        if self._has_prepared:
            self._ready.append(self.gpu.record_event(self.stream))
            self._has_prepared = False
        if len(self._chunks) > self._released:
            self._released = len(self._chunks)
            most = min(self._tuning.buffers, self._released)
            self._buffers.grow(most)
            self._threads.publish(int(self._ready[-1].handle))
            self._threads.set_buffer_count(most)
            if not self._has_started:
                gpu_faults.start(self._threads, min(self._n_threads, self._most_shares))
                self._has_started = True
        self._on_bytes_read(self._threads.bytes_read)

    def _prepare(self, index: int) -> None:
        """Allocate the memory of a tensor in the order of the caller's stream, unless it exists."""
        if index in self._results:
            return
        self._has_prepared = True
        request = self.requests[index]
        try:
            returned, out = cuda.output(request.job, self.call)
            # The kernel stores 16 bytes at a time, so a misaligned output is written through temporary memory.
            write_to = self.gpu.allocate(out.n_bytes, self.stream) if out.pointer % 16 else out
        except NumbaDequantError as error:
            raise request.blame(error) from error
        self._results[index] = _Result(request.finished(returned), write_to, out)

    def _part(self, part: TensorSlice) -> tuple[int, ...]:
        job, target = self.requests[part.index].job, self._results[part.index].write_to
        fmt, dtype = job.fmt, job.dtype
        if dtype is None or fmt.decode is None:
            return part.index, part.at, part.n_bytes, target.pointer + part.start, 0, 0, 0, 0
        kernel, shape = cuda.kernel_for(fmt, dtype, self.gpu)
        first = part.start // fmt.type_size * fmt.block_size
        n_elements = part.n_bytes // fmt.type_size * fmt.block_size
        out = target.pointer + first * job.result_dtype.itemsize
        launch = int(kernel.handle), shape.thread_blocks(n_elements), shape.threads, n_elements
        return part.index, part.at, part.n_bytes, out, *launch

    def _file(self, chunk: Chunk) -> RawIOBase:
        file = self._files.get(chunk.path)
        if file is None:
            first = self.tensors[chunk.parts[0].index]
            file = self._files[chunk.path] = self._stack.enter_context(open_unchanged(first))
        return file

    def _wait_for(self, first: int, end: int) -> None:
        """Wait until some tensors have been read, and check that their files have not changed."""
        try:
            for index in range(first, end):
                while not self._threads.wait_for(index, POLL_SECONDS):
                    self._on_bytes_read(self._threads.bytes_read)
                    self._check_gpu()
                self._on_bytes_read(self._threads.bytes_read)
        except native_threads.ReaderFaultError as fault:
            raise self._error_of(fault) from None
        # The last tensor of a file is the first one that is missing if the file was cut short.
        for tensor in {tensor.path: tensor for tensor in self.tensors[first:end] if tensor.n_bytes}.values():
            check_unchanged(tensor, self._files[tensor.path])

    def _check_gpu(self) -> None:
        try:
            gpu_faults.check(self.gpu, self._buffers.streams)
        except DeviceError:
            self._is_sound = False
            raise

    def _error_of(self, fault: native_threads.ReaderFaultError) -> NumbaDequantError:
        self._is_sound &= fault.place != FAULT_GPU
        chunk = self._chunks[fault.chunk]
        return gpu_faults.error_of(fault, chunk, self.requests, self._files[chunk.path], self.gpu)

    def _let_caller_wait(self, streams: Iterable[Any]) -> None:
        """Let the caller's stream wait for the work now queued on `streams`."""
        for stream in streams:
            self.gpu.stream_wait_event(self.stream, self.gpu.record_event(int(stream.handle)))

    def _finish_tensor(self, index: int) -> Any:
        """Remove a finished tensor from the load and return it; the caller's stream waits for its last write."""
        self._prepare(index)  # an empty tensor has no chunk
        result = self._results.pop(index)
        if result.write_to is not result.caller_out:
            target = result.caller_out
            self.gpu.copy_on_device(target.pointer, result.write_to.pointer, target.n_bytes, self.stream)
        out = self.requests[index].job.out
        if out is not None:
            streams.release(self.call, out=out)
        return result.returned

    def _finish(self) -> None:
        """Free the tensors that have not been returned, after the GPU has finished. All threads have ended."""
        self._stack.close()
        try:
            if self._results or not self._is_sound:
                self._buffers.sync()
        except Exception:
            # The GPU has failed. This error must not replace the first one, which has been raised already.
            self._is_sound = False
        self._results.clear()
        # After a failure, the GPU may never release a buffer.
        if self._is_sound:
            gpu_buffers.give_back(self._buffers)
