"""A process that forks while other threads are at work: the child computes, and never waits for a thread it has not."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

COMMON = """
import os, signal, sys, threading, time
import numpy as np
import numba_dequant as nd
from numba_dequant.backends import cpu
from numba_dequant.kernels import native
from numba_dequant.locks import compile_lock

def values(name, dtype="float16", device="cpu"):
    data = np.arange(nd.FORMATS[name].type_size * 8, dtype=np.uint8)
    return nd.dequantize(data, name, dtype, device=device)

def child_computes(*names):
    expected = {name: values(name, device="reference") for name in names}
    start = time.perf_counter()
    child = os.fork()
    if not child:
        signal.alarm(60)
        for name in names:
            np.testing.assert_array_equal(values(name), expected[name])
        os._exit(0)
    print("forked after", round(time.perf_counter() - start, 2), "s; status", os.waitpid(child, 0)[1])
    return time.perf_counter() - start

def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
"""


def run(code, tmp_path):
    found = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + code],
        env=os.environ | {"NUMBA_DEQUANT_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "status 0" in found.stdout, found.stdout + found.stderr
    assert found.stderr == ""
    return found.stdout


def test_a_fork_while_another_thread_compiles(tmp_path):
    """The thread is in the middle of importing Numba or of compiling; the child compiles another format."""
    run(
        """
real, inside = native.load_functions, threading.Event()

def load_functions(*arguments, **options):
    inside.set()
    return real(*arguments, **options)

native.load_functions = load_functions
thread = in_thread(lambda: values("IQ3_S"))
inside.wait()
child_computes("Q8_0", "IQ3_S")
thread.join()
assert values("IQ3_S").shape
""",
        tmp_path,
    )


def test_a_fork_while_another_thread_compiles_for_too_long(tmp_path):
    """The child finds the lock free; what it cannot compile it computes by the reference."""
    run(
        """
values("Q8_0")
compile_lock.PATIENCE = 0.2
inside, over = threading.Event(), threading.Event()

def hold():
    with compile_lock:
        inside.set()
        over.wait()

thread = in_thread(hold)
inside.wait()
assert compile_lock.locked()
child_computes("Q8_0", "Q4_K", "F16")
assert compile_lock.locked()
over.set()
thread.join()
assert not compile_lock.locked() and not compile_lock.is_lost
values("Q4_K")
""",
        tmp_path,
    )


def test_what_is_compiled_is_found_without_a_lock(tmp_path):
    run(
        """
values("Q8_0")
thread_has_it, over = threading.Event(), threading.Event()

def hold():
    with compile_lock:
        thread_has_it.set()
        over.wait()

thread = in_thread(hold)
thread_has_it.wait()
values("Q8_0")
assert thread.is_alive()
over.set()
thread.join()
child_computes("Q8_0")
""",
        tmp_path,
    )


def test_forks_while_threads_dequantize_and_stream(tmp_path):
    run(
        """
from importlib.resources import files
sys.setswitchinterval(1e-6)
model = nd.open(str(files(nd) / "sample" / "sample.gguf"))
names = ["sample.f16", "sample.q4_0", "sample.q8_0"]
for _ in model.stream(names, device="cpu"):
    pass
over = threading.Event()

def dequantize():
    while not over.is_set():
        values("Q8_0")

def stream():
    while not over.is_set():
        for _ in model.stream(names, device="cpu", threads=3):
            pass

threads = [in_thread(work) for work in (dequantize, dequantize, stream)]
for _ in range(20):
    child_computes("Q8_0")
over.set()
for thread in threads:
    thread.join()
""",
        tmp_path,
    )


def test_a_fork_in_the_middle_of_a_compilation_by_the_same_thread(tmp_path):
    run(
        """
with compile_lock:
    child_computes("Q8_0")
assert not compile_lock.locked()
values("Q4_K")
""",
        tmp_path,
    )


@pytest.mark.toolkit
@pytest.mark.parametrize("starter", ["this package", "another library"])
def test_a_fork_after_cuda_has_started(tmp_path, starter):
    """With a driver that behaves as the real one: it knows no GPU in a child of the process that started it."""
    started = "devices.why_no_cuda()" if starter == "this package" else "None"
    run(
        f"""
import warnings
from types import SimpleNamespace
from numba_dequant.backends import device_tensor, devices, gpu, gpu_memory

real, starter = gpu.driver, os.getpid()
code = lambda: real.CUresult.CUDA_SUCCESS if os.getpid() == starter else real.CUresult.CUDA_ERROR_NOT_INITIALIZED
gpu.driver = SimpleNamespace(
    CUresult=real.CUresult, cuInit=lambda flags: (code(),), cuDeviceGetCount=lambda: (code(), 2)
)
gpu.current_context = lambda: None
assert {started} is None

def fork(work):
    child = os.fork()
    if not child:
        work()
        sys.exit()  # everything is dropped, as at the end of any program
    status = os.waitpid(child, 0)[1]
    print("status", status)
    assert status == 0

def refused(call):
    try:
        call()
    except nd.DeviceError as error:
        assert "this process was forked after CUDA had started" in str(error), error
        assert "'spawn' or 'forkserver'" in str(error)
    else:
        raise AssertionError("it was not refused")

def in_child():
    signal.alarm(60)
    refused(lambda: values("Q8_0", device="cuda"))
    refused(lambda: values("Q8_0", device="cuda:1"))
    refused(lambda: gpu.gpu_at(1))
    if tensors:
        refused(tensors[0].copy_to_host)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(values("Q8_0", device=None), values("Q8_0", device="reference"))
    assert "computes on the CPU: this process was forked" in str(warned[0].message)

tensors = []
if {starter!r} == "this package":
    memory = gpu_memory.DeviceBytes(0, 64, gpu.gpu_at(0), owner=None)
    tensors.append(device_tensor.DeviceTensor(memory, (32,), np.dtype(np.float16), 0))
fork(in_child)
fork(lambda: fork(in_child))
assert gpu.n_devices() == 2 and devices.why_no_cuda() is None  # in the parent all is as before
""",
        tmp_path,
    )
