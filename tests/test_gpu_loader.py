"""Loading to a GPU, with one that does its work as late as it may: streams advance at random, and when they must."""

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
import pytest
from conftest import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant import device, gpu, gpu_loader, pump, reading, runtime, staging
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.mapping import mapping_named

POISON = 0xA5


def at(address, n_bytes):
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))


class Owner:
    """A piece of memory of the late GPU; what is freed is poisoned, in the order of the stream that it belongs to."""

    def __init__(self, late, pointer, n_bytes, stream):
        self.late, self.range, self.stream = late, (pointer, pointer + n_bytes), stream

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
        real = {"wait_for_piece": library.read, "tell": library.write}
        ours = {"set_context": 1, "pause": 1, "let_gpu_wait": 3, "copy": 4, "launch": 11, "signal": 4}
        self.error_number = ctypes.c_int()
        functions = real | {
            "read": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 5)(self.read),
            "error": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 2)(lambda _: ctypes.addressof(self.error_number)),
        }
        for name, count in ours.items():
            functions[name] = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * count)(getattr(self, name))
        return pump.addresses(functions), functions

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
        source, dtype = self.kernels[kernel - 1]
        first, n_elements, out = (
            ctypes.c_int64.from_address(where).value for where in at(arguments, 24).view(np.int64).tolist()
        )
        assert grid == mapping_named("tile", source).thread_blocks(n_elements)
        data = runtime.DeviceBytes(first, source.n_bytes((n_elements,)), 0, None)
        n_bytes = n_elements * np.dtype(numpy_dtype(dtype)).itemsize
        self.dequantize_into(data, source, dtype, n_elements, runtime.DeviceBytes(out, n_bytes, 0, None), stream)
        return 0

    def launcher(self, source, dtype, mapping, index, stream):
        self.kernels.append((source, dtype))
        return None, SimpleNamespace(handle=len(self.kernels)), mapping_named(mapping, source)

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

    def allocate(self, n_bytes, owner_device, stream):
        with self.lock:
            pointer, self.end = self.end, self.end + -(-max(n_bytes, 1) // 256) * 256
            assert self.end <= self.memory.size
            self.in_use += n_bytes
            self.queue(stream, lambda: self.memory[pointer : pointer + n_bytes].fill(POISON), pointer, n_bytes)
            return runtime.DeviceBytes(pointer, n_bytes, 0, Owner(self, pointer, n_bytes, stream))

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

    def copy_on_device(self, target, source, n_bytes, stream):
        def copy():
            self.memory[target : target + n_bytes] = self.memory[source : source + n_bytes]

        self.queue(stream, copy, target, n_bytes)

    def dequantize_into(self, data, source, dtype, n_elements, out, stream, mapping="tile"):
        if not n_elements:
            return
        if source.stored_dtype is not None:
            self.copy_on_device(out.pointer, data.pointer, out.n_bytes, stream)
            return
        assert data.pointer % 16 == out.pointer % 16 == 0, "neither wide loads nor wide stores"
        first, last = data.pointer, data.pointer + data.n_bytes
        pointer, n_bytes = out.pointer, out.n_bytes

        def dequantize():
            values = nd.dequantize(self.memory[first:last], source, dtype, device="reference")
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


@pytest.fixture(params=[0, 1, 2, 3, "alone"])
def late(request, monkeypatch):
    """Four orders of things, and a system without what the threads need."""
    found = LateGpu(str(request.param))
    for name in ("allocate", "copy_to_device", "copy_to_host", "create_stream", "wait_for"):
        monkeypatch.setattr(runtime, name, getattr(found, name))
    monkeypatch.setattr(runtime, "record", found.new_event)
    monkeypatch.setattr(runtime, "context_of", lambda device: 1)
    monkeypatch.setattr(runtime, "check", lambda stream: None)
    monkeypatch.setattr(gpu, "launcher", found.launcher)
    monkeypatch.setattr(pump, "calls", lambda: found.calls)
    monkeypatch.setattr(pump, "IS_POSSIBLE", request.param != "alone")
    monkeypatch.setattr(gpu_loader, "_lanes", {})
    monkeypatch.setattr(gpu_loader, "_staging", {})
    monkeypatch.setattr(runtime, "current", found)
    monkeypatch.setattr(runtime, "pinned", lambda n_bytes: np.zeros(n_bytes, np.uint8))
    monkeypatch.setattr(runtime, "copy_on_device", found.copy_on_device)
    monkeypatch.setattr(gpu, "dequantize_into", found.dequantize_into)
    monkeypatch.setattr(gpu, "capability_of", lambda index: (9, 0))
    monkeypatch.setattr(device, "cuda_problem", lambda: None)
    monkeypatch.setattr(gpu_loader, "PIECE", 4096)
    monkeypatch.setattr(staging, "PIECE", 4096)
    threads = threading.active_count()
    yield found
    gc.collect()
    assert threading.active_count() == threads
    assert not found.problems


@pytest.fixture(params=[1, 3])
def threads(request):
    return request.param


TENSORS = {
    "token_embd": ("Q8_0", (40, 320), random_blocks("Q8_0", 400)),
    "a.norm": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "a.q": ("Q6_K", (6, 1024), random_blocks("Q6_K", 24)),
    "b.norm": ("F32", (17,), np.arange(17, dtype="<f4").tobytes()),
    "ids": ("I32", (3000,), np.arange(3000, dtype="<i4").tobytes()),
    "none": ("Q4_K", (0, 256), b""),
    "b.q": ("Q4_0", (2, 32), random_blocks("Q4_0", 2)),
    "b.k": ("IQ4_XS", (8, 512), random_blocks("IQ4_XS", 16)),
    "output": ("MXFP4", (90, 64), random_blocks("MXFP4", 180)),
}


@pytest.fixture
def model(tmp_path):
    with nd.open(write_model(tmp_path / "model.gguf", TENSORS)) as model:
        yield model


def lane_bytes():
    """GPU memory that is kept for the next load."""
    return sum(len(lanes._idle) for lanes in gpu_loader._lanes.values()) * gpu_loader.BUFFERS * 4096


def assert_right(found, name, dtype="float16"):
    source, shape, data = TENSORS[name]
    expected = nd.dequantize(data, source, dtype, shape, "reference")
    values = found.copy_to_host()
    if source == "I32":
        np.testing.assert_array_equal(values, expected)
    else:
        assert_same_bits(values, expected)


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("stream", [None, 7])
def test_everything(model, late, threads, stream):
    for _ in range(3):
        found = model.load_all(device="cuda", threads=threads, stream=stream)
        assert list(found) == list(TENSORS)
        for name, tensor in found.items():
            assert_right(tensor, name)
    assert lane_bytes() <= (threads or device.n_threads()) * gpu_loader.BUFFERS * 4096
    del found, tensor
    gc.collect()
    assert late.in_use == lane_bytes()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_one_after_the_other(model, late, prefetch, threads):
    dtype = {"*norm": "float32", "*": "bfloat16"}
    for name, tensor in model.stream(dtype=dtype, device="cuda", threads=threads, prefetch=prefetch):
        assert_right(tensor, name, "float32" if name.endswith("norm") else "bfloat16")


def test_the_iterator_is_dropped(model, late, threads):
    before = late.in_use
    for name, tensor in model.stream(device="cuda", threads=threads, prefetch=6):
        assert_right(tensor, name)
        if name == "a.q":
            break
    del tensor
    gc.collect()
    assert late.in_use - before == lane_bytes()
    for name, tensor in model.load_all(device="cuda", threads=threads).items():
        assert_right(tensor, name)


def test_a_read_error_halfway(model, late, monkeypatch, threads):
    tensor = model.tensors["output"]

    def read_into(file, data, offset):
        if offset + len(data) > tensor.offset + tensor.n_bytes // 2:
            raise OSError(5, "Input/output error")
        return os.preadv(file if isinstance(file, int) else file.fileno(), [data], offset)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_into", read_into)
        patch.setattr(late, "read_into", read_into)
        with pytest.raises(nd.ReadError, match=r"tensor 'output' at byte .*Input/output error; check the disk"):
            model.load_all(device="cuda", threads=threads)
    gc.collect()
    assert late.in_use == lane_bytes()
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)


def test_out_of_memory_halfway(model, late, monkeypatch, threads):
    real = runtime.allocate

    def allocate(n_bytes, owner_device, stream):
        if n_bytes == 90 * 64 * 2:
            raise nd.DeviceError("cuda:0 is out of memory")
        return real(n_bytes, owner_device, stream)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "allocate", allocate)
        with pytest.raises(nd.DeviceError, match=r"model\.gguf: tensor 'output': cuda:0 is out of memory"):
            model.load_all(device="cuda", threads=threads)
    gc.collect()
    assert late.in_use == lane_bytes()
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)


def test_kept_as_it_is(model, late, threads):
    for name, tensor in model.load_all(device="cuda", threads=threads, keep_quantized=True).items():
        np.testing.assert_array_equal(tensor.data.copy_to_host(), model.read(name))
        assert tensor.shape == TENSORS[name][1]


def test_rows(model, late, threads):
    found = model.load("token_embd", "float32", device="cuda", threads=threads, rows=slice(3, 31))
    np.testing.assert_array_equal(found.copy_to_host(), model.load("token_embd", "float32", "reference")[3:31])


def test_out(model, late, threads):
    out = {"a.q": model.load("a.q", device="cuda", threads=1), "ids": model.load("ids", device="cuda", threads=1)}
    for tensor in out.values():
        late.memory[tensor.ptr : tensor.ptr + tensor.nbytes] = POISON
    found = model.load_all(device="cuda", threads=threads, out=out)
    for name, tensor in found.items():
        assert_right(tensor, name)
    assert all(found[name] is tensor for name, tensor in out.items())


def test_a_wrong_out_is_found_before_anything_is_read(model, late, threads):
    out = {"b.k": model.load("a.q", device="cuda", threads=1)}
    before = late.end
    with pytest.raises(nd.OutputError, match=r"tensor 'b\.k': out has shape"):
        model.load_all(device="cuda", threads=threads, out=out)
    assert late.end == before


def test_two_loads_at_once(model, late, threads):
    first, second = (model.stream(device="cuda", threads=threads, prefetch=3) for _ in range(2))
    for (name, one), (_, other) in zip(first, second, strict=True):
        assert_right(one, name)
        assert_right(other, name)
    assert lane_bytes() <= 2 * threads * gpu_loader.BUFFERS * 4096
