"""Whatever happens while a model is loaded: one clear error, nothing left behind, and the next load works."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading

import faults
import numpy as np
import pytest
from blocks import assert_same_bits, write_model
from faults import ROW, TENSORS, assert_loads, input_output_error, overwrite, place

import numba_dequant as nd
from numba_dequant.loading import files, host_loader


@pytest.fixture
def path(tmp_path):
    return faults.write(tmp_path / "model.gguf")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Small chunks, so that faults come halfway; and no thread and no open file remains."""
    monkeypatch.setattr(host_loader, "CHUNK_BYTES", 64 * ROW)
    nd.dequantize(bytes(34), "Q8_0", device="cpu")
    threads, files = threading.active_count(), n_open_files()
    yield
    gc.collect()
    assert threading.active_count() == threads
    assert n_open_files() == files


def n_open_files():
    return len(os.listdir("/proc/self/fd"))


class Disk:
    """Stands for the disk: does something to a file, or to a read, at a certain byte."""

    def __init__(self, monkeypatch, at, fault):
        self.at, self.fault, self.calls = at, fault, 0
        self.real = files.read_into
        monkeypatch.setattr(files, "read_into", self.read_into)

    def read_into(self, file, data, offset):
        if offset <= self.at < offset + len(data):
            self.calls += 1
            self.fault()
        return self.real(file, data, offset)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layer", [0, 2])
class TestHalfway:
    def test_a_read_error(self, path, monkeypatch, threads, layer):
        tensor, at = place(path, layer)
        with monkeypatch.context() as patch:
            Disk(patch, at, input_output_error)
            message = rf"model\.gguf: tensor '{tensor.name}' at byte \d+: Input/output error; check the disk"
            with pytest.raises(nd.ReadError, match=message) as raised:
                nd.load(path, device="cpu", threads=threads)
        assert raised.value.tensor == tensor.name
        assert raised.value.offset <= at < raised.value.offset + host_loader.CHUNK_BYTES
        assert isinstance(raised.value.__cause__, OSError)
        assert_loads(path, "cpu")

    def test_the_file_is_cut_short(self, path, monkeypatch, threads, layer):
        tensor, at = place(path, layer)
        content = path.read_bytes()
        with monkeypatch.context() as patch:
            Disk(patch, at, lambda: os.truncate(path, at))
            with pytest.raises((nd.GgufError, nd.ReadError)) as raised:
                nd.load(path, device="cpu", threads=threads)
        if threads == 1:
            assert str(raised.value).startswith(f"{path}: at byte {tensor.offset}: the file has ")
        assert str(path) in str(raised.value)
        path.write_bytes(content)
        assert_loads(path, "cpu")

    # Another thread may look between the new time and the new bytes.
    @pytest.mark.filterwarnings("ignore:.*time stamp has changed")
    def test_the_header_is_written_to(self, path, monkeypatch, threads, layer):
        _, at = place(path, layer)
        content = path.read_bytes()
        with monkeypatch.context() as patch:
            Disk(patch, at, lambda: overwrite(path, 30))
            with pytest.raises(nd.ReadError, match="it has changed since it was opened; reopen it"):
                nd.load(path, device="cpu", threads=threads)
        path.write_bytes(content)
        assert_loads(path, "cpu")

    def test_values_are_written_to(self, path, monkeypatch, threads, layer):
        """Which cannot be told from a time stamp that somebody has set: it is said, once."""
        _, at = place(path, layer)
        content = path.read_bytes()
        with monkeypatch.context() as patch:
            Disk(patch, at, lambda: overwrite(path, at))
            with pytest.warns(RuntimeWarning, match="time stamp has changed") as warned:
                nd.load(path, device="cpu", threads=threads)
        assert len(warned) == 1
        path.write_bytes(content)
        assert_loads(path, "cpu")

    def test_another_file_takes_its_place(self, path, monkeypatch, threads, layer):
        """Who has it open goes on with the old one; who opens it then is told."""
        _, at = place(path, layer)
        other = write_model(path.parent / "other.gguf", {"x": ("F32", (1,), bytes(4))})
        content = path.read_bytes()
        with monkeypatch.context() as patch:
            Disk(patch, at, lambda: os.replace(other, path) if other.exists() else None)
            with nd.open(path) as model:
                with contextlib.suppress(nd.ReadError):
                    found = model.load_all(device="cpu", threads=threads)
                    for name, (source, shape, data) in TENSORS.items():
                        expected = nd.dequantize(data, source, shape=shape, device="reference")
                        assert_same_bits(found[name], expected)
                with pytest.raises(nd.ReadError, match="changed since it was opened"):
                    model.load("blk.0.weight", device="cpu")
        path.write_bytes(content)
        assert_loads(path, "cpu")

    def test_out_of_memory(self, path, monkeypatch, threads, layer):
        tensor, _ = place(path, layer)
        real, calls = np.empty, []

        def empty(shape, dtype=float):
            if np.dtype(dtype) == np.float16:
                calls.append(shape)
                if len(calls) > layer:
                    raise MemoryError("Unable to allocate 1.22 MiB")
            return real(shape, dtype)

        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", empty)
            with pytest.raises(nd.DeviceError, match=rf"'{tensor.name}': the CPU is out of memory: 1,280,000 bytes"):
                nd.load(path, device="cpu", threads=threads)
        assert_loads(path, "cpu")

    def test_what_the_callback_raises(self, path, threads, layer):
        faults.raise_in_the_callback(path, "cpu", threads, layer)

    def test_dropping_the_iterator(self, path, threads, layer):
        faults.drop_the_iterator(path, "cpu", threads, layer)


def test_a_file_that_gets_another_number(path):
    """As a network file system may do; what the file holds is the same."""
    with nd.open(path) as model:
        content, stat = path.read_bytes(), path.stat()
        path.rename(path.parent / "keeps the old number")
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_ino != stat.st_ino
        assert list(model.load_all(device="cpu", threads=3)) == list(TENSORS)


def test_the_file_is_gone(path):
    with nd.open(path) as model:
        os.remove(path)
        with pytest.raises(nd.ReadError, match="No such file"):
            model.load("blk.0.weight", device="cpu")


def test_ctrl_c(path):
    """In a process of its own, in the middle of a load that would never end."""
    code = """
import os, signal, sys, threading, time
import numba_dequant as nd
from numba_dequant.loading import files
real = files.read_into
def slow(file, data, offset):
    time.sleep(0.05)
    return real(file, data, offset)
files.read_into = slow
from numba_dequant.loading import host_loader
host_loader.CHUNK_BYTES = 64 * 340
nd.dequantize(bytes(34), "Q8_0", device="cpu")
before = threading.active_count()
# Python does not listen to it where a shell has started this in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.perf_counter()
try:
    nd.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]))
except KeyboardInterrupt:
    assert time.perf_counter() - start < 1.5
    time.sleep(0.1)
    assert threading.active_count() == before, threading.enumerate()
    files.read_into = real
    assert len(nd.load(sys.argv[1], device="cpu")) == 4
    print("interrupted")
"""
    for threads in ("1", "3"):
        found = subprocess.run([sys.executable, "-c", code, path, threads], capture_output=True, text=True, check=False)
        assert found.stdout == "interrupted\n", found.stderr
        assert signal.SIGINT not in {-found.returncode, found.returncode}


def test_the_program_ends_in_the_middle(path):
    code = """
import sys
import numba_dequant as nd
from numba_dequant.loading import host_loader
host_loader.CHUNK_BYTES = 64 * 340
unfinished = nd.open(sys.argv[1]).stream(device="cpu", threads=3, prefetch=0)
next(unfinished)
"""
    command = [sys.executable, "-c", code, path]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


def test_two_loads_in_two_threads(path):
    results = {}

    def work(number):
        for _ in range(5):
            results[number] = nd.load(path, device="cpu", threads=2)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for found in results.values():
        for name, (source, shape, data) in TENSORS.items():
            assert_same_bits(found[name], nd.dequantize(data, source, shape=shape, device="reference"))


def test_two_hundred_loads_with_faults(path):
    """Memory, threads and files stay where they were; in a process of its own, whose size can be told."""
    code = """
import gc, os, random, sys, threading
import numba_dequant as nd
from numba_dequant.loading import host_loader, files

host_loader.CHUNK_BYTES = 64 * 340
rng = random.Random(0)
path, size, real = sys.argv[1], os.path.getsize(sys.argv[1]), files.read_into
nd.dequantize(bytes(34), "Q8_0", device="cpu")
failures = 0

def load():
    global failures
    error = rng.choice([None, OSError(5, "Input/output error"), ZeroDivisionError(), MemoryError()])
    at = rng.randrange(1000, size)

    def read_into(file, data, offset):
        if error and offset <= at < offset + len(data):
            raise error
        return real(file, data, offset)

    files.read_into = read_into
    try:
        with nd.open(path) as model:
            for _ in model.stream(device="cpu", threads=rng.randint(1, 4), prefetch=rng.randint(0, 3)):
                if rng.random() < 0.05:
                    break
    except (nd.ReadError, ZeroDivisionError, MemoryError):
        failures += 1

def state():
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, threading.active_count(), len(os.listdir("/proc/self/fd"))

for _ in range(60):
    load()
before = state()
for _ in range(140):
    load()
after = state()
print(failures, after[0] - before[0], after[1] - before[1], after[2] - before[2])
"""
    command = [sys.executable, "-c", code, path]
    # What is freed goes back to the system at once, rather than to the allocator's several heaps.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    failures, n_bytes, n_threads, n_files = map(int, found.stdout.split())
    assert 40 < failures < 160
    assert n_bytes < 8 << 20
    assert n_threads == n_files == 0
    assert_loads(path, "cpu")
