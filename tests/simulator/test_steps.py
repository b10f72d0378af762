"""The kernels of the notebook about one kernel are right, from the literal one on."""

import numpy as np
import pytest
from blocks import random_blocks
from cells import run_tagged
from numba import cuda
from numba.cuda.simulator import kernelapi

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


@pytest.fixture(scope="module")
def steps():
    return run_tagged("02_one_kernel.ipynb", "step")["STEPS"]


@pytest.mark.parametrize("number", range(5))
def test_a_step(steps, number, monkeypatch):
    real = kernelapi.FakeCUDAShared.array
    monkeypatch.setattr(
        kernelapi.FakeCUDAShared, "array", lambda self, shape, dtype, alignment: real(self, shape, dtype)
    )
    kernel, mapping = list(steps.values())[number]
    n_elements = 2 * mapping.tile_elements
    data = random_blocks("Q8_0", n_elements // 32)
    data.view(nd.FORMATS["Q8_0"].layout)["d"] = np.linspace(-2, 2, n_elements // 32)
    out = cuda.to_device(np.zeros(n_elements, np.float16))
    kernel[2, mapping.threads](cuda.to_device(data.view(np.uint16)), n_elements, out)
    np.testing.assert_array_equal(out.copy_to_host(), nd.dequantize(data, "Q8_0", device="reference"))
