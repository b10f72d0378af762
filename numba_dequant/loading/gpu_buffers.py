"""Buffers that are kept between loads to a GPU: pinned memory, GPU memory, and streams."""

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
    """Sizes and numbers for loading to a GPU, measured on an H100.

    Attributes:
        chunk_bytes: bytes per copy to the GPU. Each copy has an overhead of 2 us.
        subread_bytes: bytes of a chunk per read. Several threads fill one buffer, so that a few buffers are enough and
            fit in the CPU cache.
        buffers: buffers of a load. Two or three are being filled; the others are being copied or wait for a copy.
        streams: streams that the buffers share: one dequantizes while the other copies. More streams are slower.
        threads: default maximum number of threads. They read faster than the bus can copy.
        max_batch: maximum number of chunks to plan before they are passed to the threads.
        small_file_bytes: size of the largest file that is copied to the GPU as it is (`small_files`).
    """

    chunk_bytes: int = 8 << 20
    subread_bytes: int = 1 << 20
    buffers: int = 8
    streams: int = 2
    threads: int = 12
    max_batch: int = 32
    small_file_bytes: int = 512 << 20


TUNING = LoadTuning()


class Buffers:
    """The buffers and streams of one load. Allocating them is slow: 0.7 ms per MiB of pinned memory."""

    def __init__(self, gpu: Gpu, tuning: LoadTuning) -> None:
        # The first attribute is destroyed first: memory is freed in stream order, so the streams must exist.
        self._memory: list[tuple[NDArray[np.uint8], DeviceBytes]] = []
        self.gpu, self.tuning = gpu, tuning
        self.streams: list[Any] = [gpu.create_stream() for _ in range(tuning.streams)]
        self.records = np.zeros(tuning.buffers, buffer_dtype)
        self._flags = gpu.pinned(8 * len(self.records)).view(np.int64)
        self._flags[:] = 0

    def __len__(self) -> int:
        return len(self._memory)

    def grow(self, count: int) -> None:
        """Allocate buffers until there are `count`."""
        while len(self) < count:
            record, bit = self.records[len(self)], len(self) % len(self.streams)
            stream = int(self.streams[bit].handle)
            # Separate lines: cuda-core cannot free pinned memory while an exception from the same line propagates.
            on_gpu = self.gpu.allocate(self.tuning.chunk_bytes, stream)
            host = self.gpu.pinned(self.tuning.chunk_bytes)
            record["host"], record["gpu"] = host.ctypes.data, on_gpu.pointer
            record["stream"], record["stream_bit"] = stream, 1 << bit
            record["flag"] = self._flags.ctypes.data + 8 * len(self)
            self._memory.append((host, on_gpu))

    def sync(self) -> None:
        """Wait until all streams have done their work."""
        for stream in self.streams:
            stream.sync()


_lock = threading.Lock()


def take(gpu: Gpu) -> Buffers:
    """Idle buffers, or new ones. They belong to one load at a time."""
    with _lock:
        if gpu.idle_buffers:
            idle: Buffers = gpu.idle_buffers.pop()
            return idle
    return Buffers(gpu, TUNING)


def give_back(buffers: Buffers) -> None:
    """Keep buffers for the next load. Calling this twice is harmless."""
    with _lock:
        if all(idle is not buffers for idle in buffers.gpu.idle_buffers):
            buffers.gpu.idle_buffers.append(buffers)


def release(index: int | None = None) -> None:
    """Free the idle buffers of one GPU, or of all GPUs."""
    for gpu in list(OPEN.values()) if index is None else [gpu_at(index)]:
        with _lock:
            dropped, gpu.idle_buffers = gpu.idle_buffers, []
        while dropped:
            dropped.pop().sync()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 a thread that held it does not exist in the forked child
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
