"""A GPU that does its work as late as it may: streams advance at random, and when they must."""

import ctypes
import gc
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from faults import n_threads_of_this_process

import numba_dequant as nd
from numba_dequant.backends import cuda_driver, devices, gpu
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.kernels.launch_shape import launch_shape
from numba_dequant.loading import gpu_loader, native_threads

POISON = 0xA5


def at(address, n_bytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))


class Owner:
    """A chunk of memory of the late GPU; what is freed is poisoned, in the order of the stream that it belongs to."""

    def __init__(self, late, pointer, n_bytes, stream):
        self.late, self.range, self.stream = late, (pointer, pointer + n_bytes), stream

    def used_on(self, stream):
        """Nothing: no test of this GPU uses memory on a stream other than its own."""
        assert int(stream) == int(self.stream)

    def __del__(self):
        self.late.free(self)


class Event:
    """A point of a stream, known by its handle."""

    def __init__(self, late, stream, position):
        self.late, self.stream, self.position = late, stream, position
        self.handle = len(late.events) + 1
        late.events.append(self)

    def sync(self):
        self.late.run(self.stream, self.position)


class Stream:
    def __init__(self, late, handle):
        self.late, self.handle = late, handle

    def sync(self):
        self.late.run(self.handle)


@dataclass
class Operation:
    """Something that a stream has been asked to do, where it writes, and what it waits for."""

    work: Callable[[], None]
    pointer: int
    n_bytes: int
    awaited: tuple[int, int] | None


class LateGpu:
    device_id = 0

    def __init__(self, seed):
        self.memory = np.zeros(64 << 20, np.uint8)
        self.end = 256
        self.queues, self.done = defaultdict(list), defaultdict(int)
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.n_streams = 0
        self.in_use = 0
        self.problems = []
        self.events, self.kernels = [], []
        self.calls, self.functions = self.make_calls()

    def make_calls(self):
        """What the threads' loop calls: the C library's own functions, and in place of the driver's those of this."""
        library = ctypes.CDLL(None)
        real = {"wait_for_share": library.read, "tell": library.write}
        ours = {"set_context": 1, "pause": 1, "let_gpu_wait": 3, "copy": 4, "launch": 11, "signal": 4}
        self.error_number = ctypes.c_int()
        functions = real | {
            "read": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 5)(self.read),
            "error": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 2)(lambda _: ctypes.addressof(self.error_number)),
        }
        for name, count in ours.items():
            functions[name] = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * count)(getattr(self, name))
        return native_threads.addresses(functions), functions

    def read(self, file, pointer, n_bytes, offset):
        try:
            return self.read_into(file, at(pointer, n_bytes), offset)
        except OSError as error:
            self.error_number.value = error.errno
            return -1

    def read_into(self, file, data, offset):
        return os.preadv(file, [data], offset)

    def set_context(self, context):
        return 0

    def pause(self, microseconds):
        with self.lock:
            for handle in list(self.queues):
                self.run(handle, self.done[handle] + self.random.randint(0, 3))
        return 0

    def signal(self, stream, address, value, flags):
        def write():
            ctypes.c_uint32.from_address(address).value = value

        self.queue(stream, write)
        return 0

    def let_gpu_wait(self, stream, event, flags):
        self.wait_for(stream, self.events[event - 1])
        return 0

    def copy(self, pointer, host, n_bytes, stream):
        self.copy_to_device(pointer, at(host, n_bytes), stream)
        return 0

    def launch(self, kernel, grid, _1, _2, threads, _3, _4, _5, stream, arguments, _6):
        fmt, dtype = self.kernels[kernel - 1]
        first, n_elements, out = (
            ctypes.c_int64.from_address(where).value for where in at(arguments, 24).view(np.int64).tolist()
        )
        assert grid == launch_shape("tile", fmt).thread_blocks(n_elements)
        data = cuda_driver.DeviceBytes(first, fmt.n_bytes((n_elements,)), 0, None)
        n_bytes = n_elements * np.dtype(numpy_dtype(dtype)).itemsize
        self.dequantize_into(data, fmt, dtype, n_elements, cuda_driver.DeviceBytes(out, n_bytes, 0, None), stream)
        return 0

    def launcher(self, fmt, dtype, mapping, index, stream):
        self.kernels.append((fmt, dtype))
        return None, SimpleNamespace(handle=len(self.kernels)), launch_shape(mapping, fmt)

    def queue(self, stream, work, pointer=0, n_bytes=0, awaited=None):
        with self.lock:
            self.queues[int(stream)].append(Operation(work, pointer, n_bytes, awaited))
            for handle in list(self.queues):
                if self.random.random() < 0.2:
                    self.run(handle, self.done[handle] + self.random.randint(0, 3))

    def run(self, stream, position=None):
        with self.lock:
            queue = self.queues[int(stream)]
            while self.done[int(stream)] < min(len(queue), position if position is not None else len(queue)):
                operation = queue[self.done[int(stream)]]
                self.done[int(stream)] += 1
                operation.work()
                operation.work = None

    def allocate(self, n_bytes, owner_device, stream, keeper=None):
        with self.lock:
            pointer, self.end = self.end, self.end + -(-max(n_bytes, 1) // 256) * 256
            assert self.end <= self.memory.size
            self.in_use += n_bytes
            self.queue(stream, lambda: self.memory[pointer : pointer + n_bytes].fill(POISON), pointer, n_bytes)
            return cuda_driver.DeviceBytes(pointer, n_bytes, 0, Owner(self, pointer, n_bytes, stream))

    def free(self, owner):
        with self.lock:
            first, last = owner.range
            self.in_use -= last - first
            for stream, queue in self.queues.items():
                for position, operation in enumerate(queue[self.done[stream] :], self.done[stream]):
                    overlaps = operation.pointer < last and first < operation.pointer + operation.n_bytes
                    if overlaps and not self.is_behind(int(owner.stream), stream, position):
                        self.problems.append(f"freed while stream {stream} was still going to write to it")

    def is_behind(self, waiting, stream, position):
        """Whether a stream does nothing more before another one has got past a position."""
        awaited = [operation.awaited for operation in self.queues[waiting][self.done[waiting] :] if operation.awaited]
        return waiting == stream or any(of == stream and upto > position for of, upto in awaited)

    def copy_to_device(self, pointer, host, stream):
        def copy():
            self.memory[pointer : pointer + host.size] = host

        self.queue(stream, copy, pointer, host.size)

    def copy_to_host(self, host, pointer, stream):
        self.run(stream)
        host.reshape(-1).view(np.uint8)[:] = self.memory[pointer : pointer + host.nbytes]

    def copy_on_device(self, target, fmt, n_bytes, stream):
        def copy():
            self.memory[target : target + n_bytes] = self.memory[fmt : fmt + n_bytes]

        self.queue(stream, copy, target, n_bytes)

    def dequantize_into(self, data, fmt, dtype, n_elements, out, stream, mapping="tile"):
        if not n_elements:
            return
        if fmt.stored_dtype is not None:
            self.copy_on_device(out.pointer, data.pointer, out.n_bytes, stream)
            return
        assert data.pointer % 16 == out.pointer % 16 == 0, "neither wide loads nor wide stores"
        first, last = data.pointer, data.pointer + data.n_bytes
        pointer, n_bytes = out.pointer, out.n_bytes

        def dequantize():
            values = nd.dequantize(self.memory[first:last], fmt, dtype, device="reference")
            assert values.size == n_elements
            self.memory[pointer : pointer + n_bytes] = values.view(np.uint8)

        self.queue(stream, dequantize, pointer, n_bytes)

    def create_stream(self, of):
        with self.lock:
            self.n_streams += 1
            return Stream(self, 100 + self.n_streams)

    def new_event(self, of, stream):
        with self.lock:
            return Event(self, int(stream), len(self.queues[int(stream)]))

    def wait_for(self, stream, event):
        with self.lock:
            awaited = event.stream, event.position
            self.queue(stream, lambda: self.run(*awaited), awaited=awaited)

    def __call__(self, index):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def installed(kind, monkeypatch):
    """Yield a late GPU in place of the real one: with an order of things, or with something that a system lacks."""
    found = LateGpu(str(kind))
    for name in ("allocate", "copy_to_device", "copy_to_host", "create_stream"):
        monkeypatch.setattr(cuda_driver, name, getattr(found, name))
    monkeypatch.setattr(cuda_driver, "stream_wait_event", found.wait_for)
    monkeypatch.setattr(cuda_driver, "record_event", found.new_event)
    monkeypatch.setattr(cuda_driver, "context_of", lambda device: 1)
    monkeypatch.setattr(cuda_driver, "supports_stream_write", lambda index: kind != "no signals")
    monkeypatch.setattr(cuda_driver, "raise_if_failed", lambda stream: None)
    monkeypatch.setattr(cuda_driver, "refuse_capture", lambda stream, what: None)
    monkeypatch.setattr(gpu, "launcher", found.launcher)
    monkeypatch.setattr(native_threads, "calls", lambda: found.calls)
    monkeypatch.setattr(native_threads, "IS_SUPPORTED", kind != "alone")
    monkeypatch.setattr(gpu_loader, "POOL", gpu_loader.BufferPool())
    monkeypatch.setattr(cuda_driver, "active_gpu", found)
    monkeypatch.setattr(cuda_driver, "pinned", lambda n_bytes: np.zeros(n_bytes, np.uint8))
    monkeypatch.setattr(cuda_driver, "is_pinned", lambda host: False)
    monkeypatch.setattr(cuda_driver, "copy_on_device", found.copy_on_device)
    monkeypatch.setattr(gpu, "dequantize_into", found.dequantize_into)
    monkeypatch.setattr(gpu, "capability_of", lambda index: (9, 0))
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(gpu_loader, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(gpu_loader, "SUBREAD_BYTES", 1000)
    threads = n_threads_of_this_process()
    yield found
    gc.collect()
    assert n_threads_of_this_process(threads) == threads
    assert not found.problems
    assert not gpu_loader.POOL.idle or isinstance(kind, int)
