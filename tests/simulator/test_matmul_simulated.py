"""`matmul` under Numba's CUDA simulator: the product of the host, with the values of the simulated kernel."""

import numpy as np
import pytest
from products import columns, error, weights

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


@pytest.mark.parametrize("stream", [None, 0])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_products(name, stream):
    blocks, values = weights(name, 3, 256)
    x = columns(2, 256).astype(np.float32)
    found = nd.matmul(x, blocks, name, bias=np.ones(3, np.float32), device="cuda", stream=stream)
    assert error(found.copy_to_host(), x.astype(np.float64) @ values.T + 1) < 1e-6
    out = np.empty((2, 3), np.float32)
    assert nd.matmul(x, blocks, name, device="cuda", out=out) is out
    assert error(out, x.astype(np.float64) @ values.T) < 1e-6


def test_a_result_is_multiplied_again():
    blocks, values = weights("Q8_0", 32, 32)
    x = columns(1, 32).astype(np.float32)
    found = nd.matmul(nd.matmul(x, blocks, "Q8_0", device="cuda"), blocks, "Q8_0", device="cuda")
    assert error(found.copy_to_host(), x.astype(np.float64) @ values.T @ values.T) < 1e-6
