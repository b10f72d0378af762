"""Device memory and its owners: the GPU's pool, and PyTorch's caching allocator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from cuda.core import Buffer, Event

from numba_dequant.backends.capture import NOT_CAPTURING, allowed_in_capture, capture_state, is_capturing
from numba_dequant.interop import TORCH, library_that_captures

if TYPE_CHECKING:  # gpu.py imports this module
    from numba_dequant.backends.gpu import Gpu

BYTES = np.dtype(np.uint8)


@dataclass(slots=True)
class DeviceBytes:
    """A contiguous range of device memory.

    Attributes:
        pointer: the address.
        n_bytes: the size in bytes.
        gpu: the GPU.
        owner: the object that keeps the memory alive; a `PoolMemory` or `TorchMemory` if this package allocated it.
        dtype: the dtype, if it is the memory of an array.
        shape: the shape of that array.
        is_readonly: whether the memory must not be written.
    """

    pointer: int
    n_bytes: int
    gpu: Gpu
    owner: Any = field(repr=False)
    dtype: np.dtype[Any] = BYTES
    shape: tuple[int, ...] = ()
    is_readonly: bool = False


class PoolMemory:
    """Memory of the GPU's pool. It is freed in the order of its stream, after all other streams that have used it.

    Args:
        buffer: the memory.
        gpu: the GPU.
        stream: handle of the stream on which it was allocated.
        keeper: an object that keeps this stream alive.
    """

    __slots__ = ("__weakref__", "_keeper", "_others", "buffer", "gpu", "stream")

    def __init__(self, buffer: Buffer, gpu: Gpu, stream: int, keeper: Any) -> None:
        self.buffer, self.gpu, self.stream = buffer, gpu, stream
        self._keeper = keeper
        self._others: dict[int, tuple[Event | None, Any]] | None = None

    def used_on(self, stream: int) -> None:
        """Note that the work now queued on another stream uses this memory."""
        # During a capture there is no work to wait for. The owner of the graph must keep the memory alive.
        if stream != self.stream and not is_capturing(stream):
            with allowed_in_capture():
                self._note(stream, self.gpu.record_event(stream), None)

    def lend(self, stream: int, keeper: Any) -> None:
        """Note that another stream may use this memory until it is dropped."""
        if stream != self.stream:
            self._note(stream, None, keeper)

    def _note(self, stream: int, event: Event | None, keeper: Any) -> None:
        if self._others is None:
            self._others = {}
        # A stream without an event may use the memory until it is dropped, so an event must not replace it.
        before = self._others.get(stream)
        if before is None or before[0] is not None:
            self._others[stream] = event, keeper

    def __del__(self) -> None:
        try:
            if self._others is None and _may_free(self.stream):
                return  # the buffer is freed when it is dropped
            # Another stream may be capturing a CUDA graph.
            with allowed_in_capture():
                if capture_state(self.stream) == NOT_CAPTURING:
                    if self._others is not None:
                        self._wait_for_others()
                    self.buffer.close()
                    return
            # If it were freed now, the graph would contain the freeing.
            later = PoolMemory(self.buffer, self.gpu, self.stream, self._keeper)
            later._others = self._others
            _freed_in_capture.append(later)
        except Exception:  # noqa: S110 the interpreter is shutting down
            pass

    def _wait_for_others(self) -> None:
        assert self._others is not None
        with self.gpu.active():
            for stream, (event, _) in self._others.items():
                if event is not None:
                    self.gpu.stream_wait_event(self.stream, event)
                elif not is_capturing(stream):
                    self.gpu.stream_wait_stream(self.stream, stream)


def _may_free(stream: int) -> bool:
    """Whether no CUDA graph is being captured that forbids freeing on a stream."""
    return library_that_captures() is None and (not stream or capture_state(stream) == NOT_CAPTURING)


_freed_in_capture: list[PoolMemory] = []


def free_deferred() -> None:
    """Free the memory that was dropped during a capture. Memory that cannot be freed yet is deferred again."""
    if _freed_in_capture:
        _freed_in_capture[:] = []


class TorchMemory:
    """Memory of PyTorch's caching allocator, which orders the reuse of memory."""

    __slots__ = ("__weakref__", "gpu", "stream", "tensor")

    def __init__(self, tensor: Any, gpu: Gpu, stream: int) -> None:
        self.tensor, self.gpu, self.stream = tensor, gpu, stream

    def used_on(self, stream: int) -> None:
        """Note that the work now queued on another stream uses this memory."""
        if stream != self.stream:
            TORCH.record_stream(self.tensor, self.gpu.index, stream)

    def lend(self, stream: int, keeper: Any) -> None:
        """Note that another stream may use this memory until it is dropped."""
        self.used_on(stream)
