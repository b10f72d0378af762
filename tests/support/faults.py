"""A model to load, and faults that are the same wherever it is loaded to."""

import os
import threading
import time
from functools import cache

import pytest
from blocks import assert_same_bits, random_blocks, write_model

import numba_dequant as nd

N_ROWS = 2000
ROW = 10 * 34
TENSORS = {f"blk.{layer}.weight": ("Q8_0", (N_ROWS, 320), random_blocks("Q8_0", 10 * N_ROWS)) for layer in range(4)}


@cache
def expected(name):
    source, shape, data = TENSORS[name]
    return nd.dequantize(data, source, shape=shape, device="reference")


def write(path):
    return write_model(path, TENSORS)


def assert_loads(path, device, threads=3):
    found = nd.load(path, device=device, threads=threads)
    assert list(found) == list(TENSORS)
    for name, values in found.items():
        assert_same_bits(values.copy_to_host() if device == "cuda" else values, expected(name))


def place(path, layer):
    """The tensor in which something happens, and a byte in its middle."""
    tensor = nd.open(path).tensors[f"blk.{layer}.weight"]
    return tensor, tensor.offset + 1000 * ROW


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


def raise_in_the_callback(path, device, threads, layer):
    def callback(progress):
        if progress.bytes_done >= layer * N_ROWS * ROW:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nd.load(path, device=device, threads=threads, callback=callback)
    assert_loads(path, device)


def drop_the_iterator(path, device, threads, layer):
    with nd.open(path) as model:
        for number, (name, values) in enumerate(model.stream(device=device, threads=threads)):
            assert values.shape == TENSORS[name][1]
            if number == layer:
                break
    del values
    assert_loads(path, device)
