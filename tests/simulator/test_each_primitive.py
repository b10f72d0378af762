"""Each primitive by itself in Numba's CUDA simulator."""

import numpy as np
import pytest
from blocks import assert_same_bits
from numba import cuda
from primitives import CASES, block, numbers

from numba_dequant.backends.devices import is_simulated
from numba_dequant.dtypes import numpy_dtype

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


@pytest.mark.parametrize("name", CASES)
def test_in_the_simulator(name):
    run, dtype, size = CASES[name]
    expected = np.full(size, 77, "int64" if dtype == "int64" else numpy_dtype(dtype))
    out = cuda.to_device(expected.copy())

    def kernel(block, out):
        with np.errstate(all="ignore"):
            run(block, numbers().tolist(), out)

    with np.errstate(all="ignore"):
        run(block(4), numbers().tolist(), expected)
    cuda.jit(kernel)[1, 1](cuda.to_device(block(4)), out)
    assert_same_bits(out.copy_to_host(), expected)
