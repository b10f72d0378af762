"""The five products of notebooks/07_a_product.ipynb, from the loop to the tensor cores, and the library's kernel.

python -m pytest benchmarks/test_product_steps.py --benchmark-enable \
    --benchmark-json=benchmarks/results/h100-product-steps.json
"""

from itertools import cycle

import numpy as np
import pytest
from cells import run_tagged
from conftest import NO_GPU
from test_products import columns, measure, product_time, tools, weights  # noqa: F401 `tools` is a fixture

import numba_dequant as nd

try:
    import product_timing
    import torch
except ImportError:
    torch = None

N_ROWS, N_ELEMENTS = 14336, 4096
MOST_ERROR = 1e-5
LIBRARY = {"the library's kernel": False, "the library's kernel, begun early": True}
STEPS = {} if NO_GPU or torch is None else run_tagged("07_a_product.ipynb", "step")["STEPS"]

pytestmark = [
    pytest.mark.skipif(torch is None, reason="PyTorch or a package for GPUs is not installed"),
    pytest.mark.benchmark(timer=product_time),
]


def step_work(step, buffers, x, out, stream):
    """A function that queues the kernel of a step, with the next buffer."""
    from numba import cuda

    kernel, rows, threads = STEPS[step]
    of_numba = cuda.external_stream(stream)
    turns = cycle([cuda.as_cuda_array(each.view(-1).view(torch.uint16)) for each in buffers])
    column, results = cuda.as_cuda_array(x.view(-1).view(torch.uint16)), cuda.as_cuda_array(out.view(-1))
    launch = kernel[-(-N_ROWS // rows), threads, of_numba]
    return lambda: launch(next(turns), N_ROWS, N_ELEMENTS, column, results)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [*STEPS, *LIBRARY])
def test_step(benchmark, tools, step):  # noqa: F811
    buffers, x = weights("Q8_0", N_ROWS, N_ELEMENTS), columns(1, N_ELEMENTS)
    stream = tools.clock.stream.cuda_stream
    if step in LIBRARY:
        work = product_timing.Product(
            tools.gpu, nd.FORMATS["Q8_0"], buffers, x, stream, dtype=torch.float32, overlaps=LIBRARY[step]
        )
        out = work.out
    else:
        out = torch.full((1, N_ROWS), float("nan"), dtype=torch.float32, device="cuda")
        work = step_work(step, buffers, x, out, stream)
    torch.cuda.synchronize()
    work()
    torch.cuda.synchronize()
    values = nd.dequantize(buffers[0].cpu().numpy(), "Q8_0", "float32", shape=(N_ROWS, N_ELEMENTS), device="cpu")
    exact = torch.from_numpy(values.astype(np.float64)).cuda() @ x[0].double()
    error = product_timing.error(out[0], exact)
    assert error < MOST_ERROR
    measure(benchmark, tools, work, buffers[0].numel())
    benchmark.extra_info |= {"floor s": tools.reader.seconds(buffers[0].numel()), "error": error}
