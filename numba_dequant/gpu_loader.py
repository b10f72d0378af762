"""Loading to a GPU: threads read pieces to pinned memory; the GPU copies and dequantizes them behind the reading.

A thread has a lane: a stream, and a few buffers in turn, each of pinned memory with as much memory on the GPU. The
stream keeps the order within a lane; events keep it between lanes and the stream of the caller, and tell when a buffer
may be filled again. The host never waits for anything else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from cuda.core import Device, Event
from numpy.typing import NDArray

from numba_dequant import gpu, runtime
from numba_dequant.device_tensor import DeviceTensor
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DeviceError, NumbaDequantError
from numba_dequant.reading import Part, Piece, Pipeline
from numba_dequant.runtime import DeviceBytes
from numba_dequant.selection import QuantizedTensor, Request
from numba_dequant.staging import Staging

PIECE = 4 << 20
"""Bytes that a thread reads at a time: what a copy must have to run at full speed."""

BUFFERS = 2
"""Buffers of a lane: one is filled while the other is on its way."""


class Lane:
    """What one reading thread has on a GPU. It is expensive to make: pinned memory takes 0.7 ms per MiB."""

    def __init__(self, device: Device) -> None:
        self.stream = runtime.create_stream(device)
        self.handle = int(self.stream.handle)
        self.pinned = [runtime.pinned(PIECE) for _ in range(BUFFERS)]
        self.on_gpu = [runtime.allocate(PIECE, device, self.handle) for _ in range(BUFFERS)]
        self.sent: list[Event | None] = [None] * BUFFERS
        self.next = 0


class Lanes:
    """The lanes of one GPU that no load has in use."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._idle: list[Lane] = []
        self._lock = threading.Lock()

    def take(self) -> Lane:
        """A lane for one thread, a new one if none is idle."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        with runtime.current(self.index) as device:
            return Lane(device)

    def give_back(self, lane: Lane) -> None:
        """Let others use a lane, whatever is still under way on it."""
        with self._lock:
            self._idle.append(lane)

    def close(self) -> None:
        """Free the idle lanes, once nothing is under way on them."""
        with self._lock:
            for lane in self._idle:
                lane.stream.sync()
            self._idle.clear()


@dataclass(slots=True)
class _Result:
    """A tensor that is being loaded.

    Attributes:
        given: what the caller gets.
        target: the memory to write to.
        ready: when that memory may be written.
        written: by lane, when the last of the parts that it wrote is there.
    """

    given: Any
    target: DeviceBytes
    ready: Event
    written: dict[int, Event] = field(default_factory=dict)


def load(
    requests: Sequence[Request],
    lanes: Lanes,
    stream: Any,
    threads: int,
    prefetch: int | None,
    watch: Callable[[int], None],
) -> Generator[Any, None, None]:
    """The results of the requests, in order, each ready once `stream` gets there.

    Raises:
        OutputError, DtypeError: an `out` or an output type is not right. Nothing has been read then.
        ReadError, GgufError, DeviceError: reading or allocating failed halfway.
    """
    handle = runtime.stream_handle(stream)
    _check(requests, lanes.index, handle)
    results = _Results(requests, lanes, handle)
    tensors = [request.tensor for request in requests]
    pipeline = Pipeline(tensors, results, PIECE, threads, prefetch, watch)

    def in_order() -> Generator[Any, None, None]:
        indexes = iter(pipeline)
        try:
            for index in indexes:
                yield results.hand_out(index)
        finally:
            indexes.close()  # the threads have stopped then
            results.close()

    return in_order()


def load_alone(
    requests: Sequence[Request], staging: Staging, stream: Any, watch: Callable[[int], None]
) -> Generator[Any, None, None]:
    """What `load` does, by the thread that iterates, on the caller's stream: each tensor is read when it is asked for.

    Raises:
        OutputError, DtypeError, ReadError, GgufError, DeviceError: as for `load`.
    """
    _check(requests, staging.index, runtime.stream_handle(stream))

    def in_order() -> Generator[Any, None, None]:
        done = 0
        for request in requests:
            result = _staged(request, staging, stream)
            done += request.tensor.n_bytes
            watch(done)
            yield result
            del result

    return in_order()


def _staged(request: Request, staging: Staging, stream: Any) -> Any:
    tensor = request.tensor
    send = partial(staging.send, tensor)
    try:
        if request.dtype is None:
            data = gpu.keep(send, tensor.n_bytes, staging.index, stream)
            return QuantizedTensor(data, tensor.format, tensor.shape)
        where = tensor.shape, staging.index, request.out, stream
        return gpu.load(send, tensor.n_bytes, tensor.format, request.dtype, *where)
    except DeviceError as error:
        raise DeviceError(f"{tensor.path}: tensor {tensor.name!r}: {error}") from error


def _check(requests: Sequence[Request], index: int, stream: int) -> None:
    """Check everything about the results that can be checked before they are made."""
    with runtime.current(index) as device:
        for request in requests:
            source = request.tensor.format
            try:
                if request.dtype is not None:
                    gpu.check_capability(source, request.dtype, index)
                if request.out is not None:
                    shape, n_elements = request.tensor.shape, request.tensor.n_elements
                    kind = source.stored_dtype or numpy_dtype(request.dtype or "")
                    gpu.checked_output(request.out, None, kind, shape, n_elements, device, stream)
            except NumbaDequantError as error:
                raise type(error)(f"tensor {request.tensor.name!r}: {error}") from error


class _Results:
    """All tensors of one load, and the lanes that it has taken."""

    def __init__(self, requests: Sequence[Request], lanes: Lanes, stream: int) -> None:
        self.requests, self.stream = requests, stream
        self.index = lanes.index
        self.unfinished: dict[int, _Result] = {}
        self._lanes = lanes
        self._taken: list[Lane] = []

    def prepare(self, index: int) -> None:
        """Get the memory of a tensor, in the order of the caller's stream."""
        request = self.requests[index]
        tensor = request.tensor
        with runtime.current(self.index) as device:
            try:
                if request.dtype is None:
                    target = runtime.allocate(tensor.n_bytes, device, self.stream)
                    data = DeviceTensor(target, (tensor.n_bytes,), runtime.BYTES, self.stream)
                    given: Any = QuantizedTensor(data, tensor.format, tensor.shape)
                else:
                    what = tensor.format, request.dtype, tensor.n_elements, tensor.shape
                    given, target = gpu.target_for(*what, device, request.out, self.stream)
            except NumbaDequantError as error:
                raise type(error)(f"{tensor.path}: tensor {tensor.name!r}: {error}") from error
            self.unfinished[index] = _Result(given, target, runtime.record(self.index, self.stream))

    def worker(self) -> _Worker:
        """What a thread does, on a lane of its own."""
        lane = self._lanes.take()
        self._taken.append(lane)
        return _Worker(self, lane)

    def hand_out(self, index: int) -> Any:
        """A tensor whose work has all been queued; the caller's stream waits for it."""
        result = self.unfinished.pop(index)
        with runtime.current(self.index):
            for event in result.written.values():
                runtime.wait_for(self.index, self.stream, event)
        return result.given

    def close(self) -> None:
        """Give the lanes back. What has not been handed out is freed, once nothing writes to it any more."""
        if self.unfinished:
            for lane in self._taken:
                lane.stream.sync()
            self.unfinished.clear()
        for lane in self._taken:
            self._lanes.give_back(lane)
        self._taken.clear()


class _Worker:
    """Sends pieces to the GPU, on one lane."""

    def __init__(self, results: _Results, lane: Lane) -> None:
        self._results, self._lane = results, lane

    def room(self) -> NDArray[np.uint8]:
        sent = self._lane.sent[self._lane.next]
        if sent is not None:
            sent.sync()
        return self._lane.pinned[self._lane.next]

    def take(self, piece: Piece, data: NDArray[np.uint8]) -> None:
        lane, results = self._lane, self._results
        handle = lane.handle
        staged = lane.on_gpu[lane.next]
        with runtime.current(results.index):
            if any(self._is_computed(part) for part in piece.parts):
                runtime.copy_to_device(staged.pointer, data, handle)
            for part in piece.parts:
                result = results.unfinished[part.index]
                if id(lane) not in result.written:
                    runtime.wait_for(results.index, handle, result.ready)
                if self._is_computed(part):
                    self._dequantize(part, result, staged, handle)
                else:
                    runtime.copy_to_device(
                        result.target.pointer + part.start, data[part.at : part.at + part.n_bytes], handle
                    )
            sent = runtime.record(results.index, handle)
        for part in piece.parts:
            results.unfinished[part.index].written[id(lane)] = sent
        lane.sent[lane.next] = sent
        lane.next = (lane.next + 1) % BUFFERS

    def _is_computed(self, part: Part) -> bool:
        request = self._results.requests[part.index]
        return request.dtype is not None and request.tensor.format.decode is not None

    def _dequantize(self, part: Part, result: _Result, staged: DeviceBytes, stream: int) -> None:
        request = self._results.requests[part.index]
        source, dtype = request.tensor.format, request.dtype
        assert dtype is not None
        first = part.start // source.type_size * source.block_size
        n_elements = part.n_bytes // source.type_size * source.block_size
        itemsize = numpy_dtype(dtype).itemsize
        index = self._results.index
        data = DeviceBytes(staged.pointer + part.at, part.n_bytes, index, staged.owner)
        place = result.target.pointer + first * itemsize
        out = DeviceBytes(place, n_elements * itemsize, index, result.target.owner)
        gpu.dequantize_into(data, source, dtype, n_elements, out, stream)
