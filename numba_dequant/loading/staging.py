"""A file's bytes to GPU memory, by way of two small pinned buffers: one is filled while the other is on its way."""

from __future__ import annotations

import threading

import numpy as np
from cuda.core import Event
from numpy.typing import NDArray

from numba_dequant.backends import cuda_driver
from numba_dequant.gguf.file import TensorInfo
from numba_dequant.loading.chunks import cut
from numba_dequant.loading.files import Files

PIECE = 4 << 20
"""Bytes per buffer: large enough to hide the cost of a call, small enough to be got quickly."""


class Staging:
    """The pinned buffers of one GPU, kept from tensor to tensor because they are expensive to get."""

    def __init__(self, index: int) -> None:
        self.index = index
        with cuda_driver.current(index):
            self._buffers: list[NDArray[np.uint8]] = [cuda_driver.pinned(PIECE) for _ in range(2)]
        self._sent: list[Event | None] = [None, None]
        self._next = 0
        self._lock = threading.Lock()

    def send(self, tensor: TensorInfo, pointer: int, stream: int) -> None:
        """Queue the copy of a tensor's bytes to a device address.

        Raises:
            GgufError: the file ends before the tensor does.
            ReadError: it cannot be read, or has changed.
        """
        with self._lock, Files() as files:
            for piece in cut([tensor], [0], PIECE):
                start = piece.parts[0].start
                buffer = files.read(piece, [tensor], self._free_buffer())
                cuda_driver.copy_to_device(pointer + start, buffer, stream)
                self._sent[self._next] = cuda_driver.record(self.index, stream)
                self._next = 1 - self._next

    def _free_buffer(self) -> NDArray[np.uint8]:
        sent = self._sent[self._next]
        if sent is not None:
            sent.sync()
        return self._buffers[self._next]
