"""The two pinned buffers, with a GPU that copies late: only when it is waited for."""

from contextlib import nullcontext

import numpy as np
import pytest
from conftest import random_blocks, write_model

import numba_dequant as nd
from numba_dequant import staging


class LateGpu:
    def __init__(self, n_bytes):
        self.memory = np.zeros(n_bytes, np.uint8)
        self.queue = []

    def copy_to_device(self, pointer, host, stream):
        self.queue.append((pointer, host))

    def from_handle(self, handle):
        return self

    def record(self):
        due = len(self.queue)
        return type("Event", (), {"sync": lambda event: self.run(due)})()

    def run(self, due):
        for pointer, host in self.queue[:due]:
            if host is not None:
                self.memory[pointer : pointer + host.size] = host
        self.queue[:due] = [(0, None)] * due


@pytest.fixture
def model(tmp_path):
    return nd.open(write_model(tmp_path / "m.gguf", {"w": ("Q8_0", (100, 320), random_blocks("Q8_0", 1000))}))


@pytest.fixture
def gpu(monkeypatch):
    gpu = LateGpu(34_000)
    monkeypatch.setattr(staging, "PIECE", 1000)
    monkeypatch.setattr(staging, "Stream", gpu)
    monkeypatch.setattr(staging.runtime, "current", lambda index: nullcontext())
    monkeypatch.setattr(staging.runtime, "pinned", lambda n_bytes: np.zeros(n_bytes, np.uint8))
    monkeypatch.setattr(staging.runtime, "copy_to_device", gpu.copy_to_device)
    return gpu


def test_a_buffer_is_filled_again_only_once_it_has_been_sent(model, gpu):
    stage = staging.Staging(0)
    for _ in range(2):
        gpu.memory[:] = 0
        stage.send(model.tensors["w"], 0, 0)
        gpu.run(len(gpu.queue))
        np.testing.assert_array_equal(gpu.memory, model.read("w"))


def test_a_file_cut_short(model, gpu):
    with open(model.path, "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(nd.GgufError, match="tensor 'w' data"):
        staging.Staging(0).send(model.tensors["w"], 0, 0)
