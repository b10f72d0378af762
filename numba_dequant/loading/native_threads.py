"""Native threads that copy chunks of files to a GPU without the interpreter lock.

Their loop, `kernels.native.reader_loop`, is compiled, because Python threads that take the interpreter lock for every
chunk reach only a quarter of the bandwidth of the bus. They are POSIX threads, which start ten times as fast as Python
threads. Python plans chunks meanwhile, and is notified when a tensor is complete.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends.gpu import Gpu
from numba_dequant.errors import DeviceError
from numba_dequant.kernels import native
from numba_dequant.kernels.native.records import (
    calls_dtype,
    chunk_dtype,
    crew_dtype,
    job_dtype,
    slice_dtype,
    thread_dtype,
)

MAX_THREADS = 64
"""Maximum number of threads."""

STACK_BYTES = 1 << 20
"""The stack of a thread. The C library keeps small stacks for the next threads; large ones are mapped each time."""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _attributes() -> ctypes.Array[ctypes.c_char]:
    """The attributes of the threads (pthread_attr_t, which is smaller than 128 bytes)."""
    attributes = ctypes.create_string_buffer(128)
    _library().pthread_attr_init(attributes)
    _library().pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK_BYTES))
    return attributes


def calls(gpu: Gpu) -> NDArray[np.void]:
    """The addresses of the functions that the loop calls, as a `calls_dtype` record."""
    library = _library()
    functions = {
        "wait_for_share": library.read,
        "read": library.pread,
        "error": library.__errno_location,
        "tell": library.write,
        "pause": library.usleep,
        "create": library.pthread_create,
        "read_and_send": native.load("read_and_send"),
        **(gpu.thread_functions or {}),
    }
    addresses = (ctypes.cast(functions[name], ctypes.c_void_p).value for name in calls_dtype.names or ())
    return np.array([tuple(addresses)], calls_dtype)


class ReaderFaultError(Exception):
    """A fault of a thread: index of the chunk, FAULT_READ or FAULT_GPU, error code, byte position in the file."""

    def __init__(self, chunk: int, place: int, code: int, offset: int) -> None:
        self.chunk, self.place, self.code, self.offset = chunk, place, code, offset
        super().__init__(chunk, place, code, offset)


class ReaderThreads:
    """The shared records of one load, and its threads.

    Attributes:
        n_shares: number of shares of all planned chunks.
        is_stopping: whether `stop` has been called.
    """

    def __init__(
        self,
        n_bytes: list[int],
        most: int,
        buffers: NDArray[np.void],
        share_size: int,
        gpu: Gpu,
        finish: Callable[[], None],
    ) -> None:
        """Prepare a load of tensors with sizes `n_bytes`, in at most `most` chunks and parts.

        Threads read a chunk in shares of `share_size` bytes. `finish` is called when all threads have ended, and again
        if it was interrupted.

        Raises:
            DeviceError: the system has no file descriptor left.
        """
        self.chunks, self.parts = np.zeros(most, chunk_dtype), np.zeros(most, slice_dtype)
        self.left, self.written = np.array(n_bytes, np.int64), np.zeros(len(n_bytes), np.int64)
        self._one = np.ones(1, np.int64)
        self._calls = calls(gpu)
        self._finish: Callable[[], None] | None = finish
        self._lock = threading.RLock()
        self.is_stopping = False
        self._planned = self._progress = -1
        try:
            self._planned = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
            self._progress = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            self._close()
            raise DeviceError(
                f"cannot create an eventfd: {error.strerror}; close some files, or raise the limit (ulimit -n)"
            ) from error
        self._poll = select.poll()  # select.select fails if many files are open
        self._poll.register(self._progress, select.POLLIN)
        self._job = np.zeros(1, job_dtype)
        self._n_chunks = self._n_parts = self._n_released = self.n_shares = 0
        self._share_size = share_size
        self._threads = (ctypes.c_void_p * MAX_THREADS)()
        self._records = np.zeros(MAX_THREADS, thread_dtype)
        self._records["job"], self._records["number"] = self._job.ctypes.data, np.arange(MAX_THREADS)
        for name in ("data", "n_elements", "out"):
            addresses = self._records[name].ctypes.data + thread_dtype.itemsize * np.arange(MAX_THREADS)
            self._records[f"{name}_at"] = addresses
        self._buffers = buffers
        job = self._job[0]
        job["calls"], job["one"] = self._calls.ctypes.data, self._one.ctypes.data
        job["buffers"], job["most_buffers"], job["context"] = buffers.ctypes.data, len(buffers), gpu.context
        job["chunks"], job["parts"] = self.chunks.ctypes.data, self.parts.ctypes.data
        job["n_chunks"], job["n_parts"], job["share_size"] = most, most, share_size
        job["left"], job["written"] = self.left.ctypes.data, self.written.ctypes.data
        job["shares_planned"], job["progress"] = self._planned, self._progress
        job["threads"], job["attributes"] = ctypes.addressof(self._threads), ctypes.addressof(_attributes())
        _running.add(self)

    @property
    def bytes_read(self) -> int:
        """Number of bytes that have been read."""
        return int(self._job["bytes_read"][0])

    @property
    def n_threads(self) -> int:
        """Number of threads that have been started."""
        return sum(map(bool, self._threads))

    @property
    def are_waiting(self) -> bool:
        """Whether the threads have taken all chunks that have been published."""
        return bool(self._job["claimed"][0] >= self._job["planned"][0])

    def set_buffer_count(self, count: int) -> None:
        """Let the threads use the first `count` buffers. Call `publish`, a memory fence, after allocating them."""
        self._job["n_buffers"] = count

    def start(self, count: int) -> None:
        """Start the threads: the first one, which starts the second one, and so on.

        If the system cannot start them all, fewer threads read.

        Raises:
            OSError: the system cannot start the first one.
        """
        self._job["n_threads"] = min(count, MAX_THREADS)
        # Native code writes the handle, so that even after an interrupt every thread is joined.
        entry, record = native.load("read_and_send"), ctypes.c_void_p(self._records.ctypes.data)
        code = _library().pthread_create(ctypes.byref(self._threads), _attributes(), entry, record)
        if code:
            self._threads[0] = None
            raise OSError(code, os.strerror(code))

    def plan(self, chunk: tuple[int, ...], parts: list[tuple[int, ...]]) -> None:
        """Plan a chunk (`file`, `offset`, `n_bytes`, `is_computed`) and its parts."""
        first = self._n_parts
        self._n_parts += len(parts)
        self.parts[first : self._n_parts] = parts
        file, offset, n_bytes, is_computed = chunk
        n_shares = -(-n_bytes // self._share_size)
        location = file, offset, n_bytes
        self.chunks[self._n_chunks] = *location, first, len(parts), is_computed, 0, self.n_shares, n_shares, 0
        self._n_chunks += 1
        self.n_shares += n_shares

    def plan_copy(self, file: int, target: int) -> None:
        """Plan to copy a whole file to `target`. The tensors are its chunks."""
        sizes, n_shares = self.left, -(-self.left // self._share_size)
        starts, numbers = np.cumsum(sizes) - sizes, np.arange(len(sizes))
        self._n_chunks = self._n_parts = len(sizes)
        self.n_shares = int(n_shares.sum())
        chunks = {"file": file, "offset": starts, "n_bytes": sizes, "first_part": numbers, "n_parts": 1}
        chunks |= {"first_share": np.cumsum(n_shares) - n_shares, "shares_left": n_shares}
        for table, columns in (
            (self.chunks, chunks),
            (self.parts, {"tensor": numbers, "n_bytes": sizes, "target": target + starts}),
        ):
            for name, column in columns.items():
                table[name] = column

    def publish(self, ready: int) -> None:
        """Let the threads take the newly planned chunks. They may write after the event `ready`."""
        first, self._n_released = self._n_released, self._n_chunks
        self.chunks["ready"][first : self._n_released] = ready
        shares_before = int(self._job["planned"][0])
        self._job["planned"] = self.n_shares
        os.eventfd_write(self._planned, self.n_shares - shares_before)

    def end(self) -> None:
        """Let the threads end after the last planned chunk."""
        os.eventfd_write(self._planned, MAX_THREADS)

    def wait_for(self, tensor: int, seconds: float) -> bool:
        """Wait until a tensor is complete, for at most `seconds`; return whether it is complete.

        Raises:
            ReaderFaultError: a thread has failed.
            DeviceError: the threads were stopped.
        """
        if not self.left[tensor]:
            return True
        self._poll.poll(1000 * seconds)
        with suppress(OSError):
            os.eventfd_read(self._progress)
        if self._job["is_over"][0]:
            self._join()  # a thread that is still reading may fail at an earlier byte
            faults = self._records[self._records["has_failed"] == 1]
            if not len(faults):
                raise DeviceError("loading was stopped, because the program is ending")
            first = np.sort(faults, order=["fault_chunk", "fault_offset"])[0]
            names = ("fault_chunk", "fault_place", "fault_code", "fault_offset")
            raise ReaderFaultError(*(int(first[name]) for name in names))
        return not self.left[tensor]

    def has_written(self, stream_bit: int, tensor: int) -> bool:
        """Whether work for a tensor has been queued on the stream with this bit."""
        return bool(int(self.written[tensor]) & stream_bit)

    def stop(self) -> None:
        """Let the threads finish their current shares, and wait until they have ended."""
        with self._lock:
            # After an interrupt this can be called again; `_running` keeps the records alive until the end.
            self.is_stopping = True
            self._job["is_over"] = 1
            self._join()
            if self._finish is not None:
                self._finish()
            self._close()
            _running.discard(self)
            self._finish = None

    def _join(self) -> None:
        with self._lock:
            if not self.n_threads:
                return
            self.end()
            join = ctypes.cast(_library().pthread_join, ctypes.c_void_p).value
            crew = np.array([(join, ctypes.addressof(self._threads), MAX_THREADS)], crew_dtype)
            function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(native.load("join_threads").value or 0)
            function(crew.ctypes.data)

    def after_fork(self) -> None:
        """In a forked child: forget the threads, which run only in the parent."""
        self._threads = (ctypes.c_void_p * MAX_THREADS)()
        self._lock = threading.RLock()
        self._close()

    def _close(self) -> None:
        for name in ("_planned", "_progress"):
            descriptor = getattr(self, name)
            setattr(self, name, -1)
            if descriptor >= 0:
                os.close(descriptor)


_running: set[ReaderThreads] = set()
"""Loads that have not been stopped. Their threads may be running, so their records must stay alive."""


def _forget_all() -> None:
    for threads in _running:
        threads.after_fork()
    _running.clear()


@atexit.register
def _stop_all() -> None:
    for threads in list(_running):
        threads.stop()


def stop_interrupted() -> None:
    """Stop the loads whose `stop` was interrupted."""
    for threads in list(_running):
        if threads.is_stopping:
            threads.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
