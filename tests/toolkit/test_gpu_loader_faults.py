"""What goes wrong while a model is loaded to a GPU, with one that does its work as late as it may."""

import ctypes
import errno
import gc
import os
import signal
from dataclasses import replace

import faults
import late_gpu
import pytest
from blocks import random_blocks, write_model
from late_gpu import TUNING
from small_model import TENSORS, assert_loads, assert_right, kept_bytes

import numba_dequant as nd
from numba_dequant.loading import gpu_buffers, native_threads


@pytest.fixture
def model(tmp_path):
    with nd.open(write_model(tmp_path / "model.gguf", TENSORS)) as model:
        yield model


@pytest.fixture(params=[0, "no threads"])
def one_order(request, monkeypatch):
    """One order of things is enough for what lies in the file and in the memory."""
    has_threads = request.param != "no threads"
    tuning = replace(TUNING, chunk_bytes=64 * faults.ROW, subread_bytes=16 * faults.ROW)
    yield from late_gpu.installed(request.param, monkeypatch, has_threads=has_threads, tuning=tuning)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_halfway(scenario, tmp_path, one_order, monkeypatch, layer):
    path = faults.write(tmp_path / "model.gguf")
    scenario(faults.OnGpu(one_order), path, monkeypatch, 3, layer)
    gc.collect()
    n_buffers = sum(map(len, one_order.idle_buffers))
    assert one_order.in_use == n_buffers * 64 * faults.ROW
    faults.assert_loads(path, "cuda")


def test_a_read_error_names_the_tensor_that_it_lies_in(tmp_path, late_with_threads, threads):
    tensors = {"small": ("F32", (5,), bytes(20)), "large": ("Q8_0", (40, 32), random_blocks("Q8_0", 40))}
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        end = model.tensors["large"].offset + 512

        def read_into(file, data, offset):
            if offset >= end:
                raise OSError(5, "Input/output error")
            return os.preadv(file, [data[: end - offset]], offset)

        late_with_threads.read_into = read_into
        with pytest.raises(nd.ReadError, match=f"tensor 'large' at byte {end}: Input/output error; check the disk"):
            model.load_all(device="cuda", threads=threads)


@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_the_system_has_few_threads_left(model, late, monkeypatch, n_given):
    """Python starts the first reader thread, and each thread the next one."""
    library, left = ctypes.CDLL(None), [n_given] * n_given
    real = ctypes.CDLL(None).pthread_create

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def create(*arguments):
        return real(*map(ctypes.c_void_p, arguments)) if left and left.pop() else errno.EAGAIN

    library.pthread_create = create
    monkeypatch.setattr(native_threads, "_library", lambda: library)
    if n_given or not late.thread_functions:
        assert_loads(model, 5)
    else:
        with pytest.raises(nd.DeviceError, match="cannot start a reader thread: Resource temporarily unavailable"):
            model.load_all(device="cuda", threads=5)


def test_a_program_that_ends_within_a_load(model, late):
    walk = model.stream(device="cuda", threads=3, prefetch=6)
    next(walk)
    native_threads._stop_all()  # as Python does when it ends
    assert not native_threads._running
    walk.close()
    assert_loads(model, 3)


@pytest.fixture
def no_blas_threads():
    """A fork ends those of BLAS in the parent; they are not what a test counts."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process")  # is multi-threaded, says Python
@pytest.mark.usefixtures("no_blas_threads")
def test_a_child_process_leaves_the_threads_alone(model, late):
    walk = model.stream(device="cuda", threads=3, prefetch=1)
    found = dict([next(walk)])
    running = list(native_threads._running)
    child = os.fork()
    if not child:
        signal.alarm(10)
        for each in running:
            each.stop()
        os._exit(len(native_threads._running))
    assert os.waitpid(child, 0)[1] == 0
    for name, tensor in (found | dict(walk)).items():
        assert_right(tensor, name)


@pytest.mark.parametrize("step", ["_join", "_close"])
def test_ctrl_c_while_a_load_is_being_stopped(model, late_with_threads, monkeypatch, step):
    """Before the threads have ended, or behind it: all of it lives on, and the next load stops it first."""
    walk = model.stream(device="cuda", threads=3, prefetch=6)
    next(walk)
    with monkeypatch.context() as patch:
        patch.setattr(native_threads.ReaderThreads, step, lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            walk.close()
    del walk
    gc.collect()
    (interrupted,) = native_threads._running
    assert bool(interrupted.n_threads) == (step == "_join")
    assert_loads(model, 3)
    assert not native_threads._running
    assert len(late_with_threads.idle_buffers) == 1


def test_a_gpu_that_has_failed_is_named_first(model, late_with_threads, monkeypatch):

    def fail(self):
        raise ValueError("what cuda-core says of the same")

    copy = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * 4)(lambda *_: 700)
    with monkeypatch.context() as patch:
        patch.setattr("late_gpu.Stream.sync", fail)
        patch.setitem(late_with_threads.thread_functions, "copy", copy)
        with pytest.raises(nd.DeviceError, match="ILLEGAL_ADDRESS"):
            model.load_all(device="cuda", threads=3)
    assert not kept_bytes(late_with_threads), "what it has may never be given back"
    for queue in (late_with_threads.queues, late_with_threads.done):
        queue.clear()  # a GPU that has failed does nothing any more
    assert_loads(model, 3)


def test_a_signal_is_refused(model, late_with_threads, monkeypatch):
    """The buffer would be waited for in vain, so no other load gets it."""
    refuse = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * 4)(lambda *_: 2)
    with monkeypatch.context() as patch:
        patch.setitem(late_with_threads.thread_functions, "signal", refuse)
        with pytest.raises(nd.DeviceError, match="OUT_OF_MEMORY"):
            model.load_all(device="cuda", threads=2)
    assert_loads(model, 2)


@pytest.mark.parametrize("n_given", [0, 1])
def test_the_system_has_few_files_left(model, late_with_threads, monkeypatch, n_given):
    model.load_all("a.norm", device="cuda")
    (kept,) = late_with_threads.idle_buffers
    n_files, left, real = len(os.listdir("/proc/self/fd")), [n_given], os.eventfd

    def eventfd(*arguments):
        if not left[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        left[0] -= 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", eventfd)
        with pytest.raises(nd.DeviceError, match="Too many open files; close some files"):
            model.load_all("a.norm", device="cuda")
    assert late_with_threads.idle_buffers == [kept]
    assert len(os.listdir("/proc/self/fd")) == n_files


def test_a_changed_file_is_said_to_be_once(model, late, threads):
    os.truncate(model.path, os.path.getsize(model.path) + 1)
    with pytest.raises(nd.ReadError) as caught:
        model.load_all(device="cuda", threads=threads)
    assert str(caught.value).count("it has changed") == 1


def test_a_time_stamp_alone_is_warned_of_once(model, late, threads):
    os.utime(model.path, (1, 1))
    with pytest.warns(RuntimeWarning, match="time stamp has changed") as warned:
        assert_loads(model, threads)
    assert len(warned) == 1
    assert_loads(model, threads)


def test_a_piece_that_no_buffer_holds(model, late_with_threads, monkeypatch):
    """Machine code that is told too much would write past the end of a buffer."""
    monkeypatch.setattr(gpu_buffers, "TUNING", replace(TUNING, chunk_bytes=20))
    with pytest.raises(nd.DeviceError, match=r"a chunk has \d+ bytes, a buffer only 20"):
        model.load_all(device="cuda")
