"""Whatever happens while a model is loaded: one clear error, nothing left behind, and the next load works."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading

import faults
import pytest

import numba_dequant as nd
from numba_dequant.loading import host_loader


@pytest.fixture
def path(tmp_path):
    return faults.write(tmp_path / "model.gguf")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Small chunks, so that faults come halfway; and no thread and no open file remains."""
    monkeypatch.setattr(host_loader, "CHUNK_BYTES", faults.Host.chunk_bytes)
    nd.dequantize(bytes(34), "Q8_0", device="cpu")
    threads, files = set(threading.enumerate()), open_files()
    yield
    gc.collect()
    assert not set(threading.enumerate()) - threads
    assert not open_files() - files


def open_files():
    """Number and path of each. What an earlier test left may be closed meanwhile."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_halfway(scenario, path, monkeypatch, threads, layer):
    scenario(faults.Host(), path, monkeypatch, threads, layer)
    faults.assert_loads(path, "cpu")


def test_ctrl_c(path):
    """In a process of its own, in the middle of a load of more than a hundred reads."""
    code = """
import os, signal, sys, threading, time
import numba_dequant as nd
from numba_dequant.loading import files
real, reads = files.read_into, []
def slow(file, data, offset):
    reads.append(offset)
    if len(reads) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return real(file, data, offset)
files.read_into = slow
from numba_dequant.loading import host_loader
host_loader.CHUNK_BYTES = 64 * 340
nd.dequantize(bytes(34), "Q8_0", device="cpu")
before = threading.active_count()
# Python does not listen to it where a shell has started this in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    nd.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]))
except KeyboardInterrupt:
    assert threading.active_count() == before, threading.enumerate()
    assert len(reads) < 20
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
    faults.assert_loads(path, "cpu")
