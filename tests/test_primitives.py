"""Each primitive by itself: a compiled target has the bits of the plain Python body."""

import inspect

import numpy as np
import pytest
from conftest import assert_same_bits
from numba import njit
from primitives import CASES, block, numbers

from numba_dequant import bits
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.kernels import intrinsics_cpu

assert intrinsics_cpu  # it teaches Numba the primitives

ALIGNMENTS = (1, 2, 4, 8)


def empty(dtype, size):
    """Elements of which those that are not written to are known."""
    return np.full(size, 77, "int64" if dtype == "int64" else numpy_dtype(dtype))


def outcome(run, itemsize, dtype, size, seed):
    """What a case writes in plain Python, whose integers a decode has there."""
    out = empty(dtype, size)
    with np.errstate(all="ignore"):
        run(block(itemsize, seed), numbers(seed).tolist(), out)
    return out


def compiled_outcome(compiled, itemsize, dtype, size, seed):
    """What it writes as compiled code, which takes floats of 16 bits as bits."""
    out = empty(dtype, size)
    compiled(block(itemsize, seed), numbers(seed), out.view(np.uint16) if out.itemsize == 2 else out)
    return out


@pytest.mark.parametrize("itemsize", ALIGNMENTS)
@pytest.mark.parametrize("name", CASES)
def test_on_the_cpu(name, itemsize):
    run, dtype, size = CASES[name]
    compiled = njit(run)
    for seed in range(4):
        found = compiled_outcome(compiled, itemsize, dtype, size, seed)
        assert_same_bits(found, outcome(run, itemsize, dtype, size, seed))


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


def test_every_primitive_has_its_case():
    """But for those of a kernel, which the kernels' tests cover: they copy, and exchange values between threads."""
    of_kernels = {"copy_16_bytes", "copy_byte", "is_aligned", "store_float32_in_pairs", "helper"}
    there = {name for name, value in vars(bits).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert there - of_kernels == {name for name in CASES if " " not in name} - {"arithmetic"}
