"""Whatever happens while a model is loaded to a GPU: one clear error, nothing left behind, and the next load works."""

import gc
import os
import random
import signal
import subprocess
import sys

import faults
import pytest
from blocks import DATA
from cuda.bindings import driver

import numba_dequant as nd
from numba_dequant.backends.gpu import gpu_at
from numba_dequant.kernels import native
from numba_dequant.loading import gpu_buffers

pytestmark = pytest.mark.gpu

TUNING = gpu_buffers.LoadTuning(chunk_bytes=64 * faults.ROW, subread_bytes=16 * faults.ROW)


@pytest.fixture
def path(tmp_path):
    return faults.write(tmp_path / "model.gguf")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Small chunks, so that faults come halfway; and no thread, file or memory remains."""
    nd.open(nothing_but_a_header()).close()
    monkeypatch.setattr(gpu_buffers, "TUNING", TUNING)
    nd.dequantize(bytes(34), "Q8_0", device="cuda")
    native.load("read_and_send")
    before = state()
    yield
    nd.release_buffers()
    after = state(before[1])
    assert after[1:] == before[1:]
    assert after[0] <= before[0]


def nothing_but_a_header():
    return os.fspath(DATA / "gguf" / "good" / "shapes.gguf")


def state(n_threads=0):
    """GPU memory in use, threads (at least so many: one of faulthandler may have ended), open files."""
    gc.collect()
    with gpu_at(0).active() as device:
        device.sync()
        _, pool = driver.cuDeviceGetDefaultMemPool(0)
        _, used = driver.cuMemPoolGetAttribute(pool, driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    n_open = len(os.listdir("/proc/self/fd"))
    return int(used), max(faults.n_threads_of_this_process(n_threads or None), n_threads), n_open


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_halfway(scenario, path, monkeypatch, threads, layer):
    scenario(faults.OnGpu(gpu_at(0)), path, monkeypatch, threads, layer)
    faults.assert_loads(path, "cuda")


def test_ctrl_c(path):
    """In a process of its own, in the middle of a load that takes seconds."""
    code = """
import os, signal, sys, threading, time
import pytest
sys.path[:0] = sys.argv[2:]
import numba_dequant as nd
import test_gpu_faults
from numba_dequant.backends.gpu import gpu_at
from numba_dequant.kernels import native
from numba_dequant.loading import gpu_buffers
native.load("read_and_send")
nd.dequantize(bytes(34), "Q8_0", device="cuda")
gpu_buffers.TUNING = test_gpu_faults.TUNING
patch = pytest.MonkeyPatch()
test_gpu_faults.faults.OnGpu(gpu_at(0)).before_each_read(patch, lambda offset, n_bytes: time.sleep(0.04))
before = test_gpu_faults.faults.n_threads_of_this_process()
# Python does not listen to it where a shell has started this in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.perf_counter()
try:
    nd.load(sys.argv[1], device="cuda", threads=3)
except KeyboardInterrupt:
    assert time.perf_counter() - start < 1.5
    time.sleep(0.1)
    assert test_gpu_faults.faults.n_threads_of_this_process(before) == before
    patch.undo()
    assert len(nd.load(sys.argv[1], device="cuda")) == 4
    print("interrupted")
"""
    command = [sys.executable, "-c", code, path, os.path.dirname(__file__), os.path.dirname(faults.__file__)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "interrupted\n", found.stderr
    assert found.returncode != -signal.SIGINT


def test_a_program_that_ends_within_a_load(path):
    code = """
import sys
import numba_dequant as nd
walk = nd.open(sys.argv[1]).stream(device="cuda", threads=3)
print(next(walk)[0])
"""
    command = [sys.executable, "-c", code, path]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (found.stdout, found.stderr, found.returncode) == ("blk.0.weight\n", "", 0)


def test_two_hundred_loads_with_faults(path, monkeypatch):
    """The memory of the GPU, pinned memory, that of the process, threads and files stay where they were."""
    rng = random.Random(0)
    size = os.path.getsize(path)
    failures = 0

    def load():
        nonlocal failures
        fault = rng.choice([None, faults.input_output_error, "callback", "memory"])
        at = rng.randrange(2000, size)

        def before(offset, n_bytes):
            if callable(fault) and offset <= at < offset + n_bytes:
                fault()

        real, n_allocated = gpu_at(0).allocate, []

        def allocate(n_bytes, stream, keeper=None):
            n_allocated.append(n_bytes)
            if fault == "memory" and len(n_allocated) == 3:
                raise nd.DeviceError("cuda:0 is out of memory")
            return real(n_bytes, stream, keeper)

        def callback(progress):
            if fault == "callback" and progress.bytes_done > size // 2:
                raise ZeroDivisionError

        options = {"threads": rng.randint(1, 4), "prefetch": rng.randint(0, 3), "callback": callback}
        with monkeypatch.context() as patch:
            faults.OnGpu(gpu_at(0)).before_each_read(patch, before)
            patch.setattr(gpu_at(0), "allocate", allocate)
            try:
                for _ in nd.open(path).stream(device="cuda", **options):
                    if rng.random() < 0.05:
                        break
            except (nd.ReadError, nd.DeviceError, ZeroDivisionError):
                failures += 1

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(60):
        load()
    before, was_resident = state(), resident()
    for _ in range(140):
        load()
    after = state(before[1])
    assert 20 < failures < 180
    assert after == before
    assert resident() - was_resident < 16 << 20
    faults.assert_loads(path, "cuda")


def test_the_next_load_reuses_what_it_keeps(path):
    gpu = gpu_at(0)
    with gpu.active():
        nd.load(path, device="cuda", threads=2)
        (kept,) = gpu.idle_buffers
        count = len(kept)
        nd.load(path, device="cuda", threads=2)
        assert gpu.idle_buffers == [kept]
    assert 0 < len(kept) == count <= TUNING.buffers
