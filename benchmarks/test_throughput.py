"""Throughput of every kernel: 2^28 elements of each format, to each output type, by each mapping.

The roofline is a kernel of the same run that only copies the same number of bytes, 16 per access: the fastest of
several shapes. For FP16, the same is measured with PyTorch's own operations, on fewer elements.
"""

import numpy as np
import pytest
from conftest import DTYPES, QUANTIZED, gpu_time, note

import numba_dequant as nd
from numba_dequant.kernels.launch_shape import MAPPINGS
from numba_dequant.verify import assert_bit_identical

N_ELEMENTS, N_ELEMENTS_OF_PYTORCH = 1 << 28, 1 << 26

try:
    import torch
    from eager_torch import DEQUANTIZERS
except ImportError:
    torch, DEQUANTIZERS = None, {}

pytestmark = pytest.mark.benchmark(timer=gpu_time)

ROUNDS = {"rounds": 9, "iterations": 4, "warmup_rounds": 1}


def test_device_copy(benchmark, gpu):
    from numba_dequant.cli import measure

    rooms = [gpu.itself.allocate(measure.HEAD_START, 0) for _ in range(2)]
    pointers = [room.pointer for room in rooms]
    benchmark.pedantic(gpu.itself.copy_on_device, (*pointers, measure.HEAD_START, 0), **ROUNDS)
    note(benchmark, 2 * measure.HEAD_START)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_kernel(benchmark, gpu, name, dtype, mapping):
    from numba_dequant.cli.measure import Workload

    work = Workload(nd.FORMATS[name], dtype, N_ELEMENTS, gpu.itself, mapping)
    work.check()
    roofline = gpu.roofline(work)
    benchmark.pedantic(work, **ROUNDS)
    note(benchmark, work.bytes_moved, roofline, elements=work.n_elements)


@pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("name", DEQUANTIZERS or ["any"])
def test_eager_pytorch(benchmark, gpu, name):
    source = nd.FORMATS[name]
    piece = np.random.default_rng(0).integers(0, 256, (1 << 12, source.type_size), np.uint8)
    dequantize = DEQUANTIZERS[name]
    found = dequantize(torch.from_numpy(piece).cuda(), torch.float16).cpu().numpy().reshape(-1)
    assert_bit_identical(found, nd.dequantize(piece, source, device="reference"), name)
    blocks = torch.from_numpy(piece).cuda().repeat(N_ELEMENTS_OF_PYTORCH // source.block_size >> 12, 1)
    benchmark.pedantic(dequantize, (blocks, torch.float16), rounds=5, iterations=2, warmup_rounds=1)
    note(benchmark, blocks.numel() + 2 * N_ELEMENTS_OF_PYTORCH, elements=N_ELEMENTS_OF_PYTORCH)
