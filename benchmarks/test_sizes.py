"""GPU time of a call by size, from one block to more than 2^31 elements, with changing buffers.

The roofline is that of the same size, and includes the fixed cost of a launch.
"""

import pytest
from conftest import gpu_time, note

import numba_dequant as nd

pytestmark = pytest.mark.benchmark(timer=gpu_time)

SIZES = [1, *(1 << exponent for exponent in (12, 16, 20, 22, *range(24, 32))), (1 << 31) + (1 << 24)]


@pytest.mark.parametrize("n_elements", SIZES)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_size(benchmark, gpu, name, n_elements):
    from numba_dequant.cli.measure import Workload

    work = Workload(nd.FORMATS[name], "float16", n_elements, gpu.itself)
    work.check()
    benchmark.pedantic(work, rounds=9, iterations=16 if n_elements < 1 << 26 else 4, warmup_rounds=1)
    note(benchmark, work.bytes_moved, gpu.roofline(work), elements=work.n_elements)
    if benchmark.enabled:
        benchmark.extra_info["ps per element"] = benchmark.stats.stats.median / work.n_elements * 1e12
