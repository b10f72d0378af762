"""The five kernels of notebooks/02_one_kernel.ipynb, from the literal one to the roof, as they stand there."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import NO_GPU, gpu_time, note

import numba_dequant as nd

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "02_one_kernel.ipynb"
N_ELEMENTS = 1 << 28

pytestmark = pytest.mark.benchmark(timer=gpu_time)


def steps():
    """Name -> a kernel, and how its work is cut."""
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "step" in cell["metadata"].get("tags", ()):
            exec("".join(cell["source"]), names)
    return names["STEPS"]


STEPS = {} if NO_GPU else steps()


@pytest.mark.parametrize("step", STEPS or ["any"])
def test_step(benchmark, gpu, step):
    from numba_dequant.measure import Workload, launcher

    launch = launcher(*STEPS[step], np.dtype(np.uint16), np.dtype(np.float16))
    work = Workload(nd.FORMATS["Q8_0"], "float16", N_ELEMENTS, gpu.device, kernel=launch)
    work.check()
    roof = gpu.roof(work)
    benchmark.pedantic(work, rounds=9, iterations=4, warmup_rounds=1)
    note(benchmark, work.moved, roof, elements=work.n_elements)
