"""Host time of an asynchronous call: one tile of Q4_K on the GPU."""

import numpy as np
import pytest
from conftest import note

import numba_dequant as nd

WAYS = ["kernel", "dequantize out", "dequantize", "dequantize pytorch out", "dequantize pytorch", "numba"]


def call(way, data, gpu):
    from numba_dequant.arguments import Job
    from numba_dequant.backends.cuda import dequantize_into
    from numba_dequant.kernels.dequantize import jit
    from numba_dequant.kernels.launch_shape import launch_shape

    source = nd.FORMATS["Q4_K"]
    tensor = nd.dequantize(data.view(np.int8), "I8", device="cuda")
    out = nd.dequantize(tensor, source)
    if way == "kernel":
        job = Job(None, source, "float16", n_elements=out.size)
        return lambda: dequantize_into(tensor.memory, job, out.memory, 0)
    if way == "dequantize out":
        return lambda: nd.dequantize(tensor, source, out=out)
    if way == "dequantize":
        return lambda: nd.dequantize(tensor, source)
    if "pytorch" in way:
        torch = pytest.importorskip("torch")
        blocks = torch.from_dlpack(tensor).clone()
        target = torch.from_dlpack(out).clone() if way.endswith("out") else None
        return lambda: nd.dequantize(blocks, source, out=target)
    from numba import cuda

    shape = launch_shape("tile", source)
    kernel = jit(source, mapping="tile")[1, shape.threads]
    blocks, target = cuda.as_cuda_array(tensor).view(np.uint8), cuda.as_cuda_array(out)
    return lambda: kernel(blocks, out.size, target)


@pytest.mark.filterwarnings("ignore:.*Grid size 1")
@pytest.mark.parametrize("way", WAYS)
def test_launch(benchmark, gpu, way):
    data = np.random.default_rng(0).integers(0, 256, 16 * 144, np.uint8)
    work = call(way, data, gpu)
    benchmark.pedantic(work, rounds=9, iterations=200, warmup_rounds=1)
    gpu.synchronize()
    note(benchmark, data.nbytes + 2 * 4096)
