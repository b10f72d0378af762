"""The products of the notebook from the loop to the tensor cores are right."""

import sys

import numpy as np
import pytest
from cells import run_tagged
from numba import cuda
from numba.cuda.simulator import kernelapi
from products import columns, error, weights

from numba_dequant.backends.devices import is_simulated

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


@pytest.fixture(scope="module")
def steps():
    return run_tagged("07_a_product.ipynb", "step")["STEPS"]


@pytest.mark.parametrize("number", range(5))
def test_a_step(steps, number, monkeypatch):
    def array(self, shape, dtype, alignment):
        """The simulator refuses an alignment. As in the simulator, an array belongs to a line."""
        return self._allocations.setdefault(sys._getframe(1).f_lineno, np.empty(shape, dtype))

    monkeypatch.setattr(kernelapi.FakeCUDAShared, "array", array)
    kernel, rows, threads = list(steps.values())[number]
    n_rows, n_elements = 16, 768
    blocks, values = weights("Q8_0", n_rows, n_elements)
    x, out = columns(1, n_elements), cuda.to_device(np.full(n_rows, 77, np.float32))
    data, column = (cuda.to_device(each.reshape(-1).view(np.uint16)) for each in (blocks, x))
    kernel[-(-n_rows // rows), threads](data, n_rows, n_elements, column, out)
    assert error(out.copy_to_host(), (x.astype(np.float64) @ values.T)[0]) < 2e-6
