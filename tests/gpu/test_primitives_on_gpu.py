"""Each primitive by itself on a GPU."""

import pytest
from blocks import assert_same_bits
from primitives import ALIGNMENTS, CASES, compiled_outcome, outcome


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Grid size 1 will likely")
@pytest.mark.parametrize("itemsize", ALIGNMENTS)
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name, itemsize):
    from numba_dequant.kernels import intrinsics_cuda
    from numba_dequant.kernels.numba_cuda import cuda

    assert intrinsics_cuda
    run, dtype, size = CASES[name]
    kernel = cuda.jit(run)

    def launch(*arrays):
        on_gpu = [cuda.to_device(array) for array in arrays]
        kernel[1, 1](*on_gpu)
        on_gpu[-1].copy_to_host(arrays[-1])

    for seed in range(4):
        found = compiled_outcome(launch, itemsize, dtype, size, seed)
        assert_same_bits(found, outcome(run, itemsize, dtype, size, seed))
