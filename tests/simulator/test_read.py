"""The kernel that only reads, under Numba's CUDA simulator: each 16 bytes are read exactly once."""

import numpy as np
import pytest
from numba import cuda
from numba.cuda.simulator import kernelapi

from numba_dequant.backends.devices import is_simulated
from numba_dequant.kernels.copy import READS, make_read_kernel

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")

THREADS, THREAD_BLOCKS = 8, 2
STEP = THREADS * THREAD_BLOCKS


@pytest.fixture(autouse=True)
def local_arrays_without_alignment(monkeypatch):
    real = kernelapi.FakeCUDALocal.array
    monkeypatch.setattr(
        kernelapi.FakeCUDALocal, "array", lambda self, shape, dtype, alignment: real(self, shape, dtype)
    )


def has_found(words, value):
    """Whether a thread of the kernel finds `value` in rows of two words."""
    out = cuda.to_device(np.zeros(1, np.uint8))
    data = cuda.to_device(words.view(np.uint8).reshape(-1))
    cuda.jit(make_read_kernel(THREADS))[THREAD_BLOCKS, THREADS](data, len(words), value, out)
    return bool(out.copy_to_host()[0])


@pytest.mark.parametrize("n_loads", [1, STEP, (READS - 1) * STEP, 2 * READS * STEP, (READS + 3) * STEP + 5])
def test_a_thread_combines_all_that_is_its_own(n_loads):
    words = np.random.default_rng(n_loads).integers(-(2**63), 2**63, (n_loads, 2), np.int64)
    for thread in {0, min(n_loads, STEP) - 1}:
        expected = int(np.bitwise_xor.reduce(words[thread::STEP].reshape(-1)))
        assert has_found(words, expected)
        assert not has_found(words, expected ^ 1)
