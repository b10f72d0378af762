"""A model to load, and what may go wrong halfway: one table of scenarios for every device.

After each, there has been one clear error, nothing is left behind, and the next load works. A device says how a read
and an allocation are made to fail there.
"""

import contextlib
import ctypes
import os
import threading
import time
import warnings
from functools import cache

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant.loading import files

N_ROWS = 1000
ROW = 10 * 34
TENSORS = {f"blk.{layer}.weight": ("Q8_0", (N_ROWS, 320), random_blocks("Q8_0", 10 * N_ROWS)) for layer in range(4)}


@cache
def expected(name):
    source, shape, data = TENSORS[name]
    return nd.dequantize(data, source, shape=shape, device="reference")


def write(path):
    return write_model(path, TENSORS)


def assert_right(values, name):
    assert_same_bits(values if isinstance(values, np.ndarray) else values.copy_to_host(), expected(name))


def assert_loads(path, device, threads=3):
    found = nd.load(path, device=device, threads=threads)
    assert list(found) == list(TENSORS)
    for name, values in found.items():
        assert_right(values, name)


def place(path, layer):
    """The tensor in which something happens, and a byte in its middle."""
    tensor = nd.open(path).tensors[f"blk.{layer}.weight"]
    return tensor, tensor.offset + N_ROWS // 2 * ROW


def overwrite(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(100))


def n_threads_of_this_process(expected=None):
    """Also those that Python does not know. One that has ended may be listed for a moment longer."""
    if not os.path.isdir("/proc/self/task"):
        return threading.active_count()
    for _ in range(100):
        found = len(os.listdir("/proc/self/task"))
        if expected is None or found <= expected:
            break
        time.sleep(0.01)
    return found


def input_output_error():
    raise OSError(5, "Input/output error")


class Host:
    """Loading to the CPU; a fault lies below `files.read_into` or in NumPy."""

    name = "cpu"
    out_of_memory = f"the CPU is out of memory: {N_ROWS * 640:,} bytes"
    chunk_bytes = 64 * ROW

    def before_each_read(self, patch, before):
        """Call `before(offset, n_bytes)`, which may raise an OSError."""
        real = files.read_into

        def read_into(file, data, offset):
            before(offset, len(data))
            return real(file, data, offset)

        patch.setattr(files, "read_into", read_into)

    def fail_to_allocate(self, patch, layer):
        """Have no memory for the result of that layer, nor for those after it."""
        real, calls = np.empty, []

        def empty(shape, dtype=float):
            if np.dtype(dtype) == np.float16:
                calls.append(shape)
                if len(calls) > layer:
                    raise MemoryError("Unable to allocate 1.22 MiB")
            return real(shape, dtype)

        patch.setattr(np, "empty", empty)


class OnGpu(Host):
    """Loading to a GPU, the real one or the late one: native threads read, or without them `files.read_into`."""

    name = "cuda"
    out_of_memory = "cuda:0 is out of memory"

    def __init__(self, gpu):
        from numba_dequant.loading.gpu_buffers import TUNING

        self.gpu = gpu
        self.chunk_bytes = TUNING.chunk_bytes if gpu.thread_functions else N_ROWS * ROW

    def before_each_read(self, patch, before):
        super().before_each_read(patch, before)
        if self.gpu.thread_functions is None:
            return
        real = ctypes.CDLL(None).pread
        real.argtypes, real.restype = [ctypes.c_ssize_t] * 4, ctypes.c_ssize_t
        number = ctypes.c_int()

        def read(file, pointer, n_bytes, offset):
            try:
                before(offset, n_bytes)
            except OSError as error:
                number.value = error.errno
                return -1
            return real(file, pointer, n_bytes, offset)

        functions = {
            "read": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 5)(read),
            "error": ctypes.CFUNCTYPE(*[ctypes.c_ssize_t] * 2)(lambda _: ctypes.addressof(number)),
        }
        for name, function in functions.items():
            patch.setitem(self.gpu.thread_functions, name, function)

    def fail_to_allocate(self, patch, layer):
        real, calls = self.gpu.allocate, []

        def allocate(n_bytes, stream, keeper=None):
            calls.append(n_bytes)
            is_result = n_bytes == N_ROWS * 640
            return real(1 << 45 if is_result and calls.count(n_bytes) > layer else n_bytes, stream, keeper)

        patch.setattr(self.gpu, "allocate", allocate)


SCENARIOS = []
"""Functions of a device, a path, pytest's monkeypatch, a number of threads, and the layer at which it happens."""


def scenario(function):
    SCENARIOS.append(function)
    return function


def halfway(device, path, patch, layer, fault):
    """Let `fault` happen where a byte in the middle of a layer is read."""
    _, at = place(path, layer)

    def before(offset, n_bytes):
        if offset <= at < offset + n_bytes:
            fault()

    device.before_each_read(patch, before)


@scenario
def a_read_error(device, path, monkeypatch, threads, layer):
    tensor, at = place(path, layer)
    with monkeypatch.context() as patch:
        halfway(device, path, patch, layer, input_output_error)
        message = rf"model\.gguf: tensor '{tensor.name}' at byte \d+: Input/output error; check the disk"
        with pytest.raises(nd.ReadError, match=message) as raised:
            nd.load(path, device=device.name, threads=threads)
    assert raised.value.tensor == tensor.name
    assert raised.value.offset <= at < raised.value.offset + device.chunk_bytes
    assert isinstance(raised.value.__cause__, OSError) or device.name == "cuda"


@scenario
def the_file_is_cut_short(device, path, monkeypatch, threads, layer):
    tensor, at = place(path, layer)
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        halfway(device, path, patch, layer, lambda: os.truncate(path, at))
        with pytest.raises((nd.GgufError, nd.ReadError), match=r"model\.gguf: ") as raised:
            nd.load(path, device=device.name, threads=threads)
    if device.name == "cpu" and threads == 1:
        assert str(raised.value).startswith(f"{path}: at byte {tensor.offset}: the file has ")
    path.write_bytes(content)


@scenario
def the_header_is_written_to(device, path, monkeypatch, threads, layer):
    content = path.read_bytes()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        # Another thread may look between the new time and the new bytes.
        warnings.filterwarnings("ignore", ".*time stamp has changed")
        halfway(device, path, patch, layer, lambda: overwrite(path, 30))
        with pytest.raises(nd.ReadError, match="it has changed since it was opened; reopen it"):
            nd.load(path, device=device.name, threads=threads)
    path.write_bytes(content)


@scenario
def values_are_written_to(device, path, monkeypatch, threads, layer):
    """A time stamp alone does not tell that they are others: one warning says that it has changed."""
    _, at = place(path, layer)
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        halfway(device, path, patch, layer, lambda: overwrite(path, at))
        with pytest.warns(RuntimeWarning, match="time stamp has changed") as warned:
            nd.load(path, device=device.name, threads=threads)
    assert len(warned) == 1
    path.write_bytes(content)


@scenario
def another_file_takes_its_place(device, path, monkeypatch, threads, layer):
    """A load that has the old file open goes on with it; one that opens the file then is told."""
    other = write_model(path.parent / "other.gguf", {"x": ("F32", (1,), bytes(4))})
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        halfway(device, path, patch, layer, lambda: os.replace(other, path) if other.exists() else None)
        with nd.open(path) as model:
            with contextlib.suppress(nd.ReadError):
                for name, values in model.load_all(device=device.name, threads=threads).items():
                    assert_right(values, name)
            with pytest.raises(nd.ReadError, match="changed since it was opened"):
                model.load("blk.0.weight", device=device.name)
    path.write_bytes(content)


@scenario
def there_is_too_little_memory(device, path, monkeypatch, threads, layer):
    with monkeypatch.context() as patch:
        device.fail_to_allocate(patch, layer)
        message = rf"model\.gguf: tensor 'blk\.{layer}\.weight': {device.out_of_memory}"
        with pytest.raises(nd.DeviceError, match=message):
            nd.load(path, device=device.name, threads=threads)


@scenario
def the_callback_raises(device, path, monkeypatch, threads, layer):
    def callback(progress):
        if progress.bytes_done >= layer * N_ROWS * ROW:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nd.load(path, device=device.name, threads=threads, callback=callback)


@scenario
def the_iterator_is_dropped(device, path, monkeypatch, threads, layer):
    with nd.open(path) as model:
        for number, (name, values) in enumerate(model.stream(device=device.name, threads=threads)):
            assert values.shape == TENSORS[name][1]
            if number == layer:
                break


@scenario
def the_file_is_gone(device, path, monkeypatch, threads, layer):
    content = path.read_bytes()
    with nd.open(path) as model:
        os.remove(path)
        with pytest.raises(nd.ReadError, match="No such file"):
            model.load(f"blk.{layer}.weight", device=device.name, threads=threads)
    path.write_bytes(content)


@scenario
def the_file_gets_another_number(device, path, monkeypatch, threads, layer):
    """As a network file system may do; what the file holds is the same."""
    with nd.open(path) as model:
        content, stat = path.read_bytes(), path.stat()
        path.rename(path.parent / "keeps the old number")
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_ino != stat.st_ino
        assert list(model.load_all(device=device.name, threads=threads)) == list(TENSORS)


@scenario
def two_threads_load_at_once(device, path, monkeypatch, threads, layer):
    loaded = []

    def work():
        loaded.extend(nd.load(path, device=device.name, threads=threads) for _ in range(2))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(loaded) == 4
    for each in loaded:
        for name, values in each.items():
            assert_right(values, name)
