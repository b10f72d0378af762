"""Loading to a GPU, with one that does its work as late as it may: streams advance at random, and when they must."""

import gc
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant import device, gpu, gpu_loader, reading, runtime, staging

POISON = 0xA5


class Owner:
    """A piece of memory of the late GPU; what is freed is poisoned, in the order of the stream that it belongs to."""

    def __init__(self, late, pointer, n_bytes, stream):
        self.late, self.range, self.stream = late, (pointer, pointer + n_bytes), stream

    def __del__(self):
        self.late.free(self)


class Event:
    def __init__(self, late, stream, position):
        self.late, self.stream, self.position = late, stream, position

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
    awaited: Event | None


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
        return waiting == stream or any(event.stream == stream and event.position > position for event in awaited)

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

    def record(self, of, stream):
        with self.lock:
            return Event(self, int(stream), len(self.queues[int(stream)]))

    def wait_for(self, of, stream, event):
        self.queue(stream, event.sync, awaited=event)

    def __call__(self, index):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture(params=range(4))
def late(request, monkeypatch):
    found = LateGpu(request.param)
    for name in ("allocate", "copy_to_device", "copy_to_host", "create_stream", "record", "wait_for"):
        monkeypatch.setattr(runtime, name, getattr(found, name))
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


@pytest.fixture(params=[None, 2, 3], ids=["one buffer in turn", "2 lanes", "3 lanes"])
def threads(request):
    """Without threads, a model goes through `staging`; with them, through lanes."""
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
    assert late.n_streams <= (threads or 0)
    del found, tensor
    gc.collect()
    lanes = late.n_streams * gpu_loader.BUFFERS * 4096
    assert late.in_use == lanes


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
    assert late.in_use - before == late.n_streams * gpu_loader.BUFFERS * 4096
    for name, tensor in model.load_all(device="cuda", threads=threads).items():
        assert_right(tensor, name)


def test_a_read_error_halfway(model, late, monkeypatch, threads):
    tensor = model.tensors["output"]
    real = reading.read_into

    def read_into(file, data, offset):
        if offset + len(data) > tensor.offset + tensor.n_bytes // 2:
            raise OSError(5, "Input/output error")
        return real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_into", read_into)
        with pytest.raises(nd.ReadError, match="Input/output error"):
            model.load_all(device="cuda", threads=threads)
    gc.collect()
    assert late.in_use == late.n_streams * gpu_loader.BUFFERS * 4096
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
    assert late.in_use == late.n_streams * gpu_loader.BUFFERS * 4096
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
    assert late.n_streams <= 2 * (threads or 0)
