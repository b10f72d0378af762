"""A program may end in the middle of anything: its exit status is its own, it says nothing, and it ends at once."""

import os
import subprocess
import sys

import faults
import pytest

COMMON = '''
import gc, os, sys, threading, time
import numpy as np
import numba_dequant as nd
from numba_dequant.backends import cpu
from numba_dequant.kernels import native
from numba_dequant.loading import host_loader
from numba_dequant.loading.python_threads import Pipeline
from numba_dequant.locks import compile_lock

host_loader.CHUNK_BYTES = 64 * 340
path, blocks = sys.argv[1], np.zeros(34 * 65536, np.uint8)
cpu.available_cores = lambda: 2
nd.dequantize(blocks, "Q8_0", device="cpu")

def running_loads():
    """Found without a function or a class of this module in another one, which would keep the module alive at exit."""
    return [found for found in gc.get_objects() if type(found) is Pipeline]

def in_thread(work, daemon=True):
    begun = threading.Event()
    def run():
        begun.set()
        work()
    threading.Thread(target=run, daemon=daemon).start()
    begun.wait()

def for_ever(work):
    while True:
        work()

def lose(lock):
    """A thread takes the lock, and does not exist any more."""
    thread = threading.Thread(target=lock.__enter__)
    thread.start()
    thread.join()
'''


def run(code, path, status=0):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", COMMON + code, path]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (found.returncode, found.stderr) == (status, "")
    return found.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return faults.write(tmp_path_factory.mktemp("exit") / "model.gguf")


def test_with_everything_alive(path):
    """Also what refers to itself, so that only the collection at the end of Python finds it."""
    run(
        """
model = nd.open(path)
arrays = model.load_all(device="cpu")
kept = model.load("blk.0.weight", keep_quantized=True, device="cpu")
batch = nd.prepare_many({"a": (blocks, "Q8_0")}, device="cpu")
batch.run()
mapped = model.read("blk.0.weight", mmap=True)
shared = np.from_dlpack(arrays["blk.1.weight"])
streams = [model.stream(device="cpu", threads=n, prefetch=n) for n in (1, 3)]
for stream in streams:
    next(stream)
everything = [model, arrays, kept, batch, mapped, shared, streams]
everything.append(everything)
""",
        path,
    )


def test_while_other_threads_are_at_work(path):
    """They are ended wherever they are, also in compiled code."""
    run(
        """
model = nd.open(path)
in_thread(lambda: for_ever(lambda: nd.dequantize(blocks, "Q8_0", device="cpu")))
in_thread(lambda: for_ever(lambda: model.load_all(device="cpu", threads=3)))
in_thread(lambda: for_ever(lambda: next(model.stream(device="cpu", threads=2, prefetch=1))))
in_thread(lambda: for_ever(lambda: nd.matmul(np.zeros((2, 32), np.float32), blocks[:340], "Q8_0", device="cpu")))
time.sleep(0.3)
""",
        path,
    )


def test_while_another_thread_compiles(path, tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path))
    run(
        """
real, inside = native.load_functions, threading.Event()
def load_functions(*arguments, **options):
    inside.set()
    return real(*arguments, **options)
native.load_functions = load_functions
in_thread(lambda: nd.dequantize(bytes(110), "IQ3_S", device="cpu"))
inside.wait()
time.sleep(0.1)
""",
        path,
    )


def test_a_thread_that_is_no_daemon_finishes_its_load(path):
    found = run(
        """
def work():
    main.join()
    print(sum(values.size for values in nd.load(path, device="cpu", threads=3).values()))
main = threading.current_thread()
in_thread(work, daemon=False)
""",
        path,
    )
    assert found == f"{4 * faults.N_ROWS * 320}\n"


@pytest.mark.parametrize("threads", [1, 3])
def test_sys_exit_in_a_callback(path, threads):
    run(f"nd.load(path, device='cpu', threads={threads}, callback=lambda progress: sys.exit(3))", path, status=3)


def test_with_a_lock_that_a_thread_has_taken_with_it(path):
    """Python ends daemon threads between any two instructions. Nothing may wait for a lock that one of them held."""
    run(
        """
unfinished = nd.open(path).stream(device="cpu", threads=3, prefetch=1)
next(unfinished)
(load,) = running_loads()
for lock in (load._changed, compile_lock):
    lose(lock)
""",
        path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_child_that_was_forked_in_the_middle_of_a_load(path, threads):
    """It has neither the threads nor a file of its own: it is told so, starts a load of its own, and ends."""
    found = run(
        f"""
model = nd.open(path)
expected = model.load_all(device="reference")
walk = model.stream(device="cpu", threads={threads}, prefetch=1)
found = dict([next(walk)])
if {threads} > 1:
    (load,) = running_loads()
    lose(load._changed)
child = os.fork()
if not child:
    try:
        next(walk)
    except nd.ReadError as error:
        assert "tensor 'blk.1.weight': this process was forked in the middle of the load; start a new" in str(error)
        for name, values in model.stream(device="cpu", threads={threads}):
            np.testing.assert_array_equal(values, expected[name])
        print("told")
    sys.exit(7)
status = os.waitpid(child, 0)[1]
if {threads} == 1:  # otherwise this process has lost the lock, too
    found.update(walk)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])
print(len(found), os.WEXITSTATUS(status))
""",
        path,
    )
    assert found.split() == ["told", "4" if threads == 1 else "1", "7"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_was_forked_in_the_middle_of_a_load_to_several_devices(path):
    """Each device has a thread, which the child lacks."""
    found = run(
        """
import signal
from numba_dequant.parallel import plan
model = nd.open(path)
parts = plan(model.tensors.values(), 2, [])
walk = model.stream(device=["cpu", "cpu"], plan=parts)
found = [next(walk)]
child = os.fork()
if not child:
    signal.alarm(60)
    try:
        for _ in walk:
            pass
    except nd.ReadError as error:
        assert "this process was forked in the middle of the load; start a new load in it" in str(error)
        assert len(dict(model.stream(device=["cpu", "cpu"], plan=parts))) == 4
        print("told")
    sys.exit(7)
status = os.waitpid(child, 0)[1]
found += walk
print(len(found), os.WEXITSTATUS(status))
""",
        path,
    )
    assert found.split() == ["told", "4", "7"]


def test_with_tensors_and_layers_of_pytorch(path):
    pytest.importorskip("torch")
    found = run(
        """
import torch
from numba_dequant import torch as nt
layer = nt.QuantizedLinear.from_blocks(torch.from_numpy(blocks.reshape(1024, -1)), "Q8_0")
tensor = torch.from_dlpack(nd.dequantize(blocks, "Q8_0", device="cpu"))
x = torch.zeros(1, layer.in_features, requires_grad=True)
alive = layer(x).sum()
everything = [layer, tensor, alive]
everything.append(everything)
def work():
    main.join()
    alive.backward()
    print(nt.dequantize(layer.weight, "Q8_0", torch.float16).shape[0], x.grad.shape[0])
main = threading.current_thread()
in_thread(work, daemon=False)
""",
        path,
    )
    assert found == "1024 1\n"
