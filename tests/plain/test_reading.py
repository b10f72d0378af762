"""Chunks, threads and order: what reading a model is made of, without a device."""

import io
import os
import threading
import time

import numpy as np
import pytest
from blocks import QUANTIZED, assert_same_bits, random_blocks, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_dequant as nd
from numba_dequant.gguf.source import Source
from numba_dequant.loading import files
from numba_dequant.loading.chunks import plan_chunks, round_robin_by_disk
from numba_dequant.loading.python_threads import Pipeline, Work

FORMATS = ["Q8_0", "Q4_K", "F32", "I8"]


@pytest.fixture
def model(tmp_path):
    tensors = {
        f"t{number}": (name, (rows, nd.FORMATS[name].block_size), random_blocks(name, rows, seed=number))
        for number, (name, rows) in enumerate([("Q8_0", 200), ("F32", 3), ("Q4_K", 40), ("I8", 1), ("F32", 1000)])
    }
    return nd.open(write_model(tmp_path / "model.gguf", tensors))


@given(
    tensors=st.lists(st.tuples(st.sampled_from(FORMATS), st.integers(0, 300), st.integers(0, 100_000)), max_size=8),
    largest=st.integers(600, 5000),
    in_turn=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_pieces_cover_every_byte_once(tensors, largest, in_turn, data):
    infos, offset = [], 0
    for number, (name, rows, gap) in enumerate(tensors):
        source = nd.FORMATS[name]
        offset += gap
        n_bytes = rows * source.type_size
        place = (f"file{number % 2}", offset, n_bytes, rows * source.block_size, "little", ())
        infos.append(nd.gguf.file.TensorInfo(str(number), source, (rows, source.block_size), *place))
        offset += n_bytes
    order = data.draw(st.permutations(range(len(infos))))
    covered = [[] for _ in infos]
    for chunk in plan_chunks(infos, order, largest, in_turn=in_turn):
        if in_turn:
            assert all(part.n_bytes == infos[part.index].n_bytes for part in chunk.parts[1:])
        assert chunk.n_bytes <= largest
        for part in chunk.parts:
            info = infos[part.index]
            assert chunk.path == info.path
            assert chunk.offset + part.at == info.offset + part.start
            assert 0 <= part.at <= part.at + part.n_bytes <= chunk.n_bytes
            is_plain = info.format.block_size == 1
            assert part.start % (info.format.type_size * (8 if is_plain else 1)) == part.start % 32 == 0
            assert part.n_bytes % info.format.type_size == 0
            covered[part.index].append((part.start, part.n_bytes))
    for info, parts in zip(infos, covered, strict=True):
        at = 0
        for start, n_bytes in sorted(parts):
            assert start == at
            at += n_bytes
        assert at == info.n_bytes


@pytest.mark.parametrize("name", QUANTIZED)
def test_pieces_of_a_large_tensor_share_no_page(name):
    source, largest, rows = nd.FORMATS[name], 4 << 20, 400_000
    infos, offset = [], 992
    for number in range(2):
        shape = (rows, 4 * source.block_size)
        place = ("file", offset, source.n_bytes(shape), rows * shape[1], "little", ())
        infos.append(nd.gguf.file.TensorInfo(str(number), source, shape, *place))
        offset += -(-source.n_bytes(shape) // 32) * 32
    chunks = list(plan_chunks(infos, range(2), largest))
    within = [chunk for chunk in chunks if chunk.parts[0].start]
    assert len(within) > 2
    assert all(chunk.offset % 4096 == 0 for chunk in within)
    assert len(chunks) <= offset / (largest * 7 / 8) + 3


def test_a_read_error_names_the_tensor_that_it_lies_in(tmp_path, monkeypatch):
    tensors = {"small": ("F32", (5,), bytes(20)), "large": ("Q8_0", (40, 32), random_blocks("Q8_0", 40))}
    infos = list(nd.open(write_model(tmp_path / "model.gguf", tensors)).tensors.values())
    end = infos[1].offset + 512

    class Disk(io.FileIO):
        def readinto(self, data):
            if self.tell() >= end:
                raise OSError(5, "Input/output error")
            return super().readinto(data[: end - self.tell()])

    monkeypatch.setattr(files, "open_unchanged", lambda tensor: Disk(tensor.path))
    [chunk] = plan_chunks(infos, range(2), 1 << 20)
    with files.OpenFiles() as opened, pytest.raises(nd.ReadError, match=f"tensor 'large' at byte {end}: Input/output"):
        opened.read(chunk, infos, np.empty(1 << 20, np.uint8))


def running_threads():
    """The threads that run. Of those that a test before this one has left, some may end meanwhile."""
    return set(threading.enumerate())


class Consumer:
    """Keeps the bytes of every tensor."""

    def __init__(self, tensors, delay=0.0):
        self.tensors, self.delay = tensors, delay
        self.found, self.threads = {}, set()

    def prepare(self, index):
        assert index not in self.found
        self.found[index] = np.full(self.tensors[index].n_bytes, 77, np.uint8)

    def consume(self, chunk, data):
        self.threads.add(threading.current_thread())
        time.sleep(self.delay)
        for part in chunk.parts:
            self.found[part.index][part.start : part.start + part.n_bytes] = data[part.at :][: part.n_bytes]

    def pipeline(self, n_threads=3, prefetch=None, watch=lambda done: None):
        return Pipeline(self.tensors, Work(self.prepare, self.consume, 1000), n_threads, prefetch, watch)


@pytest.mark.parametrize("prefetch", [0, 1, None])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_every_tensor_is_whole_when_it_is_handed_out(model, n_threads, prefetch):
    tensors = list(model.tensors.values())
    sink = Consumer(tensors)
    indexes = []
    for index in sink.pipeline(n_threads, prefetch):
        indexes.append(index)
        np.testing.assert_array_equal(sink.found[index], model.read(tensors[index].name))
    assert indexes == list(range(len(tensors)))
    assert not any(thread.is_alive() for thread in sink.threads - {threading.current_thread()})


@pytest.fixture(params=[0, 1, 2])
def few_threads(monkeypatch, request):
    """A system that starts so many threads and no more."""
    real_start, left = threading.Thread.start, [request.param]

    def start(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        real_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return request.param


@pytest.mark.parametrize("prefetch", [0, None])
def test_where_no_more_threads_can_be_started_those_read_that_there_are(model, few_threads, prefetch):
    tensors = list(model.tensors.values())
    sink = Consumer(tensors)
    for number, index in enumerate(sink.pipeline(7, prefetch)):
        assert index == number
        np.testing.assert_array_equal(sink.found[index], model.read(tensors[index].name))
    assert number == len(tensors) - 1
    assert len(sink.threads) <= max(few_threads, 1)
    assert (threading.current_thread() in sink.threads) == (few_threads == 0)


def test_where_no_more_threads_can_be_started_the_cpu_path_does_without(few_threads, monkeypatch):
    from numba_dequant.backends import cpu

    monkeypatch.setattr(cpu, "available_cores", lambda: 3)
    data = random_blocks("Q8_0", 1 << 13)
    expected = nd.dequantize(data, "Q8_0", device="reference")
    before = running_threads()
    cpu._threads.cache_clear()
    try:
        assert_same_bits(nd.dequantize(data, "Q8_0", device="cpu"), expected)
    finally:
        cpu._threads.cache_clear()
    for thread in running_threads() - before:
        thread.join(60)
        assert not thread.is_alive()


def test_one_thread_is_the_caller_s(model):
    sink = Consumer(list(model.tensors.values()))
    list(sink.pipeline(1))
    assert sink.threads == {threading.current_thread()}


def test_reading_ahead_has_a_limit(model):
    tensors = [model.tensors["t0"]._replace(name=str(number)) for number in range(9)]
    sink = Consumer(tensors)
    for index in sink.pipeline(3, prefetch=2):
        time.sleep(0.02)
        assert max(sink.found) <= index + 2
    assert len(sink.found) == 9


def test_dropping_the_iterator_stops_the_threads(model):
    before = running_threads()
    sink = Consumer([model.tensors["t0"]] * 20_000, delay=0.001)  # they need five seconds, and are stopped at once
    results = iter(sink.pipeline(4))
    assert next(results) == 0
    assert running_threads() - before
    del results
    assert not running_threads() - before
    assert len(sink.found) < 20_000


def test_nothing_starts_before_it_is_asked_for(model):
    before = running_threads()
    sink = Consumer([model.tensors["t0"]])
    iter(sink.pipeline(4))
    assert not running_threads() - before
    assert not sink.found


def test_the_watcher_is_called_in_the_caller_s_thread_up_to_the_end(model):
    tensors = list(model.tensors.values())
    seen = []
    list(Consumer(tensors, delay=0.002).pipeline(3, watch=lambda done: seen.append((done, threading.current_thread()))))
    assert {thread for _, thread in seen} == {threading.current_thread()}
    amounts = [done for done, _ in seen]
    assert amounts == sorted(amounts)
    assert amounts[-1] == sum(tensor.n_bytes for tensor in tensors)


def test_tensors_without_bytes(tmp_path):
    path = write_model(tmp_path / "m.gguf", {"a": ("Q8_0", (0, 32), b""), "b": ("F32", (0,), b"")})
    tensors = list(nd.open(path).tensors.values())
    for n_threads in (1, 2):
        assert list(Consumer(tensors).pipeline(n_threads)) == [0, 1]


def test_disks_are_read_in_turn(model):
    def on_disks(*disks):
        tensor = model.tensors["t0"]
        sources = {disk: Source(f"disk{disk}") for disk in disks}
        for disk, source in sources.items():
            source.stamp = tensor.source.stamp._replace(device=disk)
        return [tensor._replace(source=sources[disk]) for disk in disks]

    assert round_robin_by_disk(on_disks(1, 1, 1, 1, 2, 2)) == [0, 4, 1, 2, 5, 3]
    assert round_robin_by_disk(on_disks(1, 1, 1, 1, 1, 1)) == list(range(6))


def test_files_stay_open_no_longer_than_needed(model):
    def n_open():
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    results = iter(Consumer([model.tensors["t0"]] * 20, delay=0.001).pipeline(3))
    next(results)
    results.close()
    assert n_open() == before


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(12, "Cannot allocate memory"), nd.ReadError), (ValueError("mmap length"), nd.GgufError)],
)
def test_a_file_that_cannot_be_mapped(model, monkeypatch, error, kind):
    """A ValueError comes where the file has just been cut short."""
    name = next(iter(model.tensors))

    def memmap(*arguments, **options):
        raise error

    monkeypatch.setattr(np, "memmap", memmap)
    with pytest.raises(kind, match=f"tensor '{name}'|'{name}'"):
        files.map_tensor(model.tensors[name])


class Drip(io.BytesIO):
    """A file that never gives more than seven bytes."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:7])


def test_a_short_read_is_continued():
    content = np.arange(100, dtype=np.uint8)
    data = np.zeros(60, np.uint8)
    assert files.read_into(Drip(content.tobytes()), data, 30) == 60
    np.testing.assert_array_equal(data, content[30:90])
    assert files.read_into(Drip(content.tobytes()), data, 70) == 30
