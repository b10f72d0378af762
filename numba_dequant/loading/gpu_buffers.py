"""What loading to a GPU keeps from one load to the next: pinned memory, memory on the GPU, and streams."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.backends.gpu import OPEN, Gpu, gpu_at
from numba_dequant.backends.gpu_memory import DeviceBytes
from numba_dequant.kernels.native.records import buffer_dtype


@dataclass(frozen=True)
class LoadTuning:
    """The sizes and numbers that loading to a GPU works with, measured on an H100.

    Attributes:
        chunk_bytes: bytes that are sent at a time: each copy costs the bus 2 us.
        subread_bytes: bytes of a chunk that one thread reads: where several threads fill a buffer, few buffers are
            needed, which the CPU's cache holds.
        buffers: buffers of a load: two or three are being filled, the others are on their way or wait for the bus.
        streams: streams that buffers share: while one dequantizes, the other copies. With more, a GPU loses time
            between them.
        threads: threads at most, unless more are asked for: these read faster than the bus carries.
        max_batch: chunks that are planned before the threads are told.
    """

    chunk_bytes: int = 8 << 20
    subread_bytes: int = 1 << 20
    buffers: int = 8
    streams: int = 2
    threads: int = 12
    max_batch: int = 32


TUNING = LoadTuning()


class Buffers:
    """What the threads of one load share on a GPU. It is expensive to make: pinned memory takes 0.7 ms per MiB."""

    def __init__(self, gpu: Gpu, tuning: LoadTuning) -> None:
        # Declared first, so that it is destroyed first: memory is freed in stream order, so the streams must exist.
        self._memory: list[tuple[NDArray[np.uint8], DeviceBytes]] = []
        self.gpu, self.tuning = gpu, tuning
        self.streams: list[Any] = [gpu.create_stream() for _ in range(tuning.streams)]
        self.records = np.zeros(tuning.buffers, buffer_dtype)
        self._flags = gpu.pinned(8 * len(self.records)).view(np.int64)
        self._flags[:] = 0

    def __len__(self) -> int:
        return len(self._memory)

    def grow(self, count: int) -> None:
        """Make buffers until there are so many."""
        while len(self) < count:
            record, bit = self.records[len(self)], len(self) % len(self.streams)
            stream = int(self.streams[bit].handle)
            # One after the other: cuda-core cannot free pinned memory while an error of the same line is on its way.
            on_gpu = self.gpu.allocate(self.tuning.chunk_bytes, stream)
            host = self.gpu.pinned(self.tuning.chunk_bytes)
            record["host"], record["gpu"] = host.ctypes.data, on_gpu.pointer
            record["stream"], record["stream_bit"] = stream, 1 << bit
            record["flag"] = self._flags.ctypes.data + 8 * len(self)
            self._memory.append((host, on_gpu))

    def sync(self) -> None:
        """Wait until nothing is under way."""
        for stream in self.streams:
            stream.sync()


_lock = threading.Lock()


def take(gpu: Gpu) -> Buffers:
    """Buffers for one load, new ones if none are idle. Loads take turns with them, in whatever thread."""
    with _lock:
        if gpu.idle_buffers:
            idle: Buffers = gpu.idle_buffers.pop()
            return idle
    return Buffers(gpu, TUNING)


def give_back(buffers: Buffers) -> None:
    """Keep buffers for the next load; those that are kept already are not kept twice."""
    with _lock:
        if all(each is not buffers for each in buffers.gpu.idle_buffers):
            buffers.gpu.idle_buffers.append(buffers)


def release(index: int | None = None) -> None:
    """Free the idle buffers of one GPU, or of all."""
    for gpu in list(OPEN.values()) if index is None else [gpu_at(index)]:
        with _lock:
            dropped, gpu.idle_buffers = gpu.idle_buffers, []
        while dropped:
            dropped.pop().sync()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 whoever held it at a fork does not exist in the child
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
