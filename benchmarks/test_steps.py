"""The five kernels of notebooks/02_one_kernel.ipynb, from the simple one to the roofline."""

import numpy as np
import pytest
from cells import run_tagged
from conftest import NO_GPU, gpu_time, note

import numba_dequant as nd

N_ELEMENTS = 1 << 28

pytestmark = pytest.mark.benchmark(timer=gpu_time)


STEPS = {} if NO_GPU else run_tagged("02_one_kernel.ipynb", "step")["STEPS"]


@pytest.mark.parametrize("step", STEPS or ["any"])
def test_step(benchmark, gpu, step):
    from numba_dequant.cli.measure import Workload, jit_launch

    launch = jit_launch(*STEPS[step], np.dtype(np.uint16), np.dtype(np.float16))
    work = Workload(nd.FORMATS["Q8_0"], "float16", N_ELEMENTS, gpu.itself, kernel=launch)
    work.check()
    roofline = gpu.roofline(work)
    benchmark.pedantic(work, rounds=9, iterations=4, warmup_rounds=1)
    note(benchmark, work.bytes_moved, roofline, elements=work.n_elements)
