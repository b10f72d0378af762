"""The kernels that the notebooks write are right on a GPU, from the literal one on."""

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks
from cells import run_tagged

import numba_dequant as nd


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Grid size")
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("n_tiles", [1, 2, 133])
def test_a_step_of_the_notebook_about_one_kernel(number, n_tiles):
    from numba_dequant.backends.gpu import gpu_at
    from numba_dequant.cli.measure import jit_launch

    kernel, shape = list(run_tagged("02_one_kernel.ipynb", "step")["STEPS"].values())[number]
    n_elements = n_tiles * shape.tile_elements
    data, gpu = random_blocks("Q8_0", n_elements // 32), gpu_at(0)
    with gpu.active():
        blocks, values = gpu.allocate(data.size, 0), gpu.allocate(2 * n_elements, 0)
        gpu.send(blocks.pointer, data, 0)
        jit_launch(kernel, shape, np.dtype(np.uint16), np.dtype(np.float16))(blocks, n_elements, values)
        found = np.empty(n_elements, np.float16)
        gpu.copy_to_host(found, values.pointer, 0)
    assert_same_bits(found, nd.dequantize(data, "Q8_0", device="reference"))
