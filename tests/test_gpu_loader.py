"""Loading to a GPU, with one that does its work as late as it may."""

import ctypes
import errno
import gc
import os
import signal
import threading

import numpy as np
import pytest
from conftest import assert_same_bits, random_blocks, write_model
from faults import n_threads_of_this_process
from late_gpu import POISON, LateGpu

import numba_dequant as nd
from numba_dequant import device, gpu, gpu_loader, pump, reading, runtime, selection, staging


@pytest.fixture(params=[0, 1, 2, 3, "alone", "no signals"])
def late(request, monkeypatch):
    """Four orders of things, a system without what the threads need, and a driver."""
    found = LateGpu(str(request.param))
    for name in ("allocate", "copy_to_device", "copy_to_host", "create_stream", "wait_for"):
        monkeypatch.setattr(runtime, name, getattr(found, name))
    monkeypatch.setattr(runtime, "record", found.new_event)
    monkeypatch.setattr(runtime, "context_of", lambda device: 1)
    monkeypatch.setattr(runtime, "can_signal", lambda index: request.param != "no signals")
    monkeypatch.setattr(runtime, "check", lambda stream: None)
    monkeypatch.setattr(gpu, "launcher", found.launcher)
    monkeypatch.setattr(pump, "calls", lambda: found.calls)
    monkeypatch.setattr(pump, "IS_POSSIBLE", request.param != "alone")
    monkeypatch.setattr(gpu_loader, "_idle", {})
    monkeypatch.setattr(gpu_loader, "_staging", {})
    monkeypatch.setattr(runtime, "current", found)
    monkeypatch.setattr(runtime, "pinned", lambda n_bytes: np.zeros(n_bytes, np.uint8))
    monkeypatch.setattr(runtime, "copy_on_device", found.copy_on_device)
    monkeypatch.setattr(gpu, "dequantize_into", found.dequantize_into)
    monkeypatch.setattr(gpu, "capability_of", lambda index: (9, 0))
    monkeypatch.setattr(device, "cuda_problem", lambda: None)
    monkeypatch.setattr(gpu_loader, "PIECE", 4096)
    monkeypatch.setattr(gpu_loader, "SHARE", 1000)
    monkeypatch.setattr(staging, "PIECE", 4096)
    threads = n_threads_of_this_process()
    yield found
    gc.collect()
    assert n_threads_of_this_process(threads) == threads
    assert not found.problems
    assert not gpu_loader._idle or isinstance(request.param, int)


@pytest.fixture(params=[1, 3])
def threads(request):
    return request.param


def has_threads():
    """Whether threads read, as they do where a system and a driver have what they need."""
    return pump.IS_POSSIBLE and runtime.can_signal(0)


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


def kept_bytes():
    """GPU memory that is kept for the next load."""
    return sum(len(buffers) for kept in gpu_loader._idle.values() for buffers in kept) * 4096


MOST_BYTES = gpu_loader.BUFFERS * 4096
"""GPU memory that a load takes for itself."""


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
    assert kept_bytes() <= MOST_BYTES
    del found, tensor
    gc.collect()
    assert late.in_use == kept_bytes()


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_one_after_the_other(model, late, prefetch, threads):
    dtype = {"*norm": "float32", "*": "bfloat16"}
    for name, tensor in model.stream(dtype=dtype, device="cuda", threads=threads, prefetch=prefetch):
        assert_right(tensor, name, "float32" if name.endswith("norm") else "bfloat16")


def test_no_tensor_takes_memory_before_its_turn(tmp_path, late, threads):
    tensors = {f"{number}": ("Q8_0", (1000, 32), random_blocks("Q8_0", 1000)) for number in range(3)}
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        walk = model.stream(device="cuda", threads=threads, prefetch=0)
        before = late.in_use
        _, first = next(walk)
        assert late.in_use - before - MOST_BYTES <= first.nbytes
        walk.close()


def test_the_iterator_is_dropped(model, late, threads):
    before = late.in_use
    for name, tensor in model.stream(device="cuda", threads=threads, prefetch=6):
        assert_right(tensor, name)
        if name == "a.q":
            break
    del tensor
    gc.collect()
    assert late.in_use - before == kept_bytes()
    for name, tensor in model.load_all(device="cuda", threads=threads).items():
        assert_right(tensor, name)


def test_several_threads_fill_a_buffer(tmp_path, late):
    """Each reads shares; a piece is sent once, when the last of them is there."""
    data = random_blocks("Q8_0", 2000)
    path = write_model(tmp_path / "model.gguf", {"large": ("Q8_0", (2000, 32), data)})
    shares, lock = [], threading.Lock()
    real_read, real_copy = late.read_into, late.copy_to_device
    copied = []

    def read_into(file, data, offset):
        with lock:
            shares.append((offset, len(data), threading.get_ident()))
        return real_read(file, data, offset)

    def copy_to_device(pointer, host, stream):
        copied.append(host.size)
        real_copy(pointer, host, stream)

    late.read_into, late.copy_to_device = read_into, copy_to_device
    with nd.open(path) as model:
        tensor = model.tensors["large"]
        found = model.load("large", device="cuda", threads=3)
    assert_same_bits(found.copy_to_host(), nd.dequantize(data, "Q8_0", shape=(2000, 32), device="reference"))
    if has_threads():
        ends = [offset + n_bytes for offset, n_bytes, _ in sorted(shares)]
        assert [offset for offset, _, _ in sorted(shares)] == [tensor.offset, *ends[:-1]]
        assert ends[-1] == tensor.offset + tensor.n_bytes
        assert max(n_bytes for _, n_bytes, _ in shares) == gpu_loader.SHARE
        assert len({thread for _, _, thread in shares}) > 1
        assert sum(copied) == tensor.n_bytes
        assert len(copied) < len(shares) / 2


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
    assert late.in_use == kept_bytes()
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)


def test_a_read_error_names_the_tensor_that_it_lies_in(tmp_path, late, threads):
    tensors = {"small": ("F32", (5,), bytes(20)), "large": ("Q8_0", (40, 32), random_blocks("Q8_0", 40))}
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        end = model.tensors["large"].offset + 512

        def read_into(file, data, offset):
            if offset >= end:
                raise OSError(5, "Input/output error")
            return os.preadv(file, [data[: end - offset]], offset)

        late.read_into = read_into
        if has_threads():
            with pytest.raises(nd.ReadError, match=f"tensor 'large' at byte {end}: Input/output error; check the disk"):
                model.load_all(device="cuda", threads=threads)


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
    assert late.in_use == kept_bytes()
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
    assert kept_bytes() <= 2 * MOST_BYTES


def test_no_threads_at_all_are_one(model, late):
    for name, tensor in model.load_all(device="cuda", threads=-1).items():
        assert_right(tensor, name)


@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_the_system_has_few_threads_left(model, late, monkeypatch, n_given):
    library, left = ctypes.CDLL(None), [n_given] * n_given
    real = library.pthread_create

    def create(*arguments):
        return real(*arguments) if left and left.pop() else errno.EAGAIN

    library.pthread_create = create
    monkeypatch.setattr(pump, "_library", lambda: library)
    if n_given or not has_threads():
        for name, tensor in model.load_all(device="cuda", threads=5).items():
            assert_right(tensor, name)
    else:
        with pytest.raises(nd.DeviceError, match="no thread can be started: Resource temporarily unavailable"):
            model.load_all(device="cuda", threads=5)


def test_a_program_that_ends_within_a_load(model, late):
    walk = model.stream(device="cuda", threads=3, prefetch=6)
    next(walk)
    pump._stop_all()  # as Python does when it ends
    assert not pump._running
    walk.close()
    for name, tensor in model.load_all(device="cuda", threads=3).items():
        assert_right(tensor, name)


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
    running = list(pump._running)
    child = os.fork()
    if not child:
        signal.alarm(10)
        for each in running:
            each.stop()
        os._exit(len(pump._running))
    assert os.waitpid(child, 0)[1] == 0
    for name, tensor in (found | dict(walk)).items():
        assert_right(tensor, name)


def test_ctrl_c_while_a_load_is_being_stopped(model, late, monkeypatch):
    """All of it lives on, and the next load stops it first."""
    if not has_threads():
        pytest.skip("no threads to stop")
    walk = model.stream(device="cuda", threads=3, prefetch=6)
    next(walk)
    with monkeypatch.context() as patch:
        patch.setattr(pump.Pump, "_close", lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            walk.close()
    del walk
    gc.collect()
    assert len(pump._running) == 1
    for name, tensor in model.load_all(device="cuda", threads=3).items():
        assert_right(tensor, name)
    assert not pump._running
    assert [len(kept) for kept in gpu_loader._idle.values()] == [1]


def test_ctrl_c_before_the_threads_have_ended(model, late, monkeypatch):
    if not has_threads():
        pytest.skip("no threads to stop")
    walk = model.stream(device="cuda", threads=3, prefetch=6)
    next(walk)
    with monkeypatch.context() as patch:
        patch.setattr(pump.Pump, "_join", lambda self: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            walk.close()
    del walk
    gc.collect()
    assert not late.problems
    (running,) = pump._running
    assert running.n_threads
    for name, tensor in model.load_all(device="cuda", threads=3).items():
        assert_right(tensor, name)


@pytest.mark.parametrize("select", [None, "*.norm", ["a.q", "b.k"]])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_what_is_reported_is_what_was_asked_for(model, late, select, prefetch):
    """Neither the bytes between two tensors nor those between two pieces."""
    chosen = selection.requests(model.tensors, select, "float16", None, keep_quantized=False)
    reports = []
    for _ in gpu_loader.load(chosen, 0, None, 3, prefetch, reports.append):
        pass
    assert reports == sorted(reports)
    assert reports[-1] == sum(request.tensor.n_bytes for request in chosen)


def with_call(late, name, function):
    """What the threads call, with another function for one of them."""
    calls = late.calls.copy()
    calls[name] = ctypes.cast(function, ctypes.c_void_p).value
    return calls


def test_a_gpu_that_has_failed_is_named_first(model, late, monkeypatch):
    if not has_threads():
        pytest.skip("fails otherwise without threads")

    def fail(self):
        raise ValueError("what cuda-core says of the same")

    launch = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * 11)(lambda *_: 700)
    with monkeypatch.context() as patch:
        patch.setattr("late_gpu.Stream.sync", fail)
        patch.setattr(late, "calls", with_call(late, "launch", launch))
        with pytest.raises(nd.DeviceError, match="ILLEGAL_ADDRESS"):
            model.load_all(device="cuda", threads=3)
    assert not kept_bytes(), "what it has may never be given back"
    for queue in (late.queues, late.done):
        queue.clear()  # a GPU that has failed does nothing any more
    for name, tensor in model.load_all(device="cuda", threads=3).items():
        assert_right(tensor, name)


def test_a_signal_is_refused(model, late, monkeypatch):
    """The buffer would be waited for in vain, so no other load gets it."""
    if not has_threads():
        pytest.skip("nothing is signalled")
    signal = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * 4)(lambda *_: 2)
    with monkeypatch.context() as patch:
        patch.setattr(late, "calls", with_call(late, "signal", signal))
        with pytest.raises(nd.DeviceError, match="OUT_OF_MEMORY"):
            model.load_all(device="cuda", threads=2)
    for name, tensor in model.load_all(device="cuda", threads=2).items():
        assert_right(tensor, name)


@pytest.mark.parametrize("n_given", [0, 1])
def test_the_system_has_few_files_left(model, late, monkeypatch, n_given):
    if not has_threads():
        pytest.skip("no threads to be told")
    model.load_all("a.norm", device="cuda")
    (kept,) = gpu_loader._idle[0]
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
    assert gpu_loader._idle[0] == [kept]
    assert len(os.listdir("/proc/self/fd")) == n_files


def test_a_changed_file_is_said_to_be_once(model, late, threads):
    os.utime(model.path, (1, 1))
    with pytest.raises(nd.ReadError) as caught:
        model.load_all(device="cuda", threads=threads)
    assert str(caught.value).count("it has changed") == 1


def test_a_piece_that_no_buffer_holds(model, late, monkeypatch):
    """Machine code that is told too much would write past the end of a buffer."""
    monkeypatch.setattr(gpu_loader, "PIECE", 100)
    if has_threads():
        with pytest.raises(nd.DeviceError, match="a piece of 544 bytes, and buffers of 100"):
            model.load_all(device="cuda")
