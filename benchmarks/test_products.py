"""Products with compressed weights, beside the floor, cuBLAS, and dequantizing first.

The floor is a kernel of the same run that only reads the bytes of the weights. product_timing.py says how times are
taken. One result of each product is compared with float64.
"""

from functools import lru_cache
from itertools import cycle
from types import SimpleNamespace

import pytest
from conftest import QUANTIZED

import numba_dequant as nd

try:
    import product_timing
    import torch
    from product_timing import MANY_FORMATS, SHAPE_OF_MANY, SHAPES

    from numba_dequant import torch as nt
except ImportError:
    torch, MANY_FORMATS, SHAPES, SHAPE_OF_MANY = None, ["any"], [(0, 0)], (0, 0)

FEW = [1, 8]
MANY = [16, 32, 64, 128, 512, 4096]
ROWS = 16384
"""Rows that `get_rows` takes of 131072."""

MOST_ERROR = 1e-3
"""Rounding the results to float16 is 2e-4 of it."""

_tools = None


def product_time():
    """A timer of GPU time for pytest-benchmark."""
    return _tools.clock()


pytestmark = [
    pytest.mark.skipif(torch is None, reason="PyTorch or a package for GPUs is not installed"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch has some of its own
    pytest.mark.benchmark(timer=product_time),
]


@pytest.fixture
def tools(gpu):
    """The GPU, a clock and what measures the floor."""
    global _tools  # noqa: PLW0603 a timer takes no arguments
    if _tools is None:
        clock = product_timing.Clock()
        _tools = SimpleNamespace(gpu=gpu.itself, clock=clock, reader=product_timing.Reader(gpu.itself, clock))
    return _tools


@lru_cache(maxsize=1)
def weights(name, n_rows, n_elements):
    """The buffers of a weight, used in turn."""
    first = product_timing.blocks_like_weights(name, n_rows, n_elements)
    return [first, *(first.clone() for _ in range(product_timing.turns_of(first.numel()) - 1))]


@lru_cache(maxsize=1)
def dense_weights(n_rows, n_elements):
    count = product_timing.turns_of(2 * n_rows * n_elements)
    return [0.02 * torch.randn(n_rows, n_elements, dtype=torch.float16, device="cuda") for _ in range(count)]


def columns(n_columns, n_elements):
    return torch.randn(n_columns, n_elements, dtype=torch.float16, device="cuda")


def measure(benchmark, tools, work, n_bytes):
    launches = tools.clock.prepare(work)
    with torch.cuda.stream(tools.clock.stream), torch.inference_mode():
        benchmark.pedantic(work, rounds=product_timing.ROUNDS, iterations=launches, warmup_rounds=1)
    benchmark.extra_info |= {"bytes": n_bytes, "late": tools.clock.late}


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("n_columns", FEW)
@pytest.mark.parametrize(("n_rows", "n_elements"), SHAPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_product(benchmark, tools, name, n_rows, n_elements, n_columns, overlaps):
    buffers, x = weights(name, n_rows, n_elements), columns(n_columns, n_elements)
    stream = tools.clock.stream.cuda_stream
    work = product_timing.Product(tools.gpu, nd.FORMATS[name], buffers, x, stream, overlaps=overlaps)
    error = work.error()
    assert error < MOST_ERROR
    n_bytes = buffers[0].numel()
    measure(benchmark, tools, work, n_bytes)
    benchmark.extra_info |= {"floor s": tools.reader.seconds(n_bytes), "error": error}


@pytest.mark.parametrize("way", ["fused", "dequantize first"])
@pytest.mark.parametrize("n_columns", MANY)
@pytest.mark.parametrize("name", MANY_FORMATS)
def test_many_columns(benchmark, tools, name, n_columns, way):
    buffers, x = weights(name, *SHAPE_OF_MANY), columns(n_columns, SHAPE_OF_MANY[1])
    n_bytes = buffers[0].numel()
    work = product_timing.Product(tools.gpu, nd.FORMATS[name], buffers, x, tools.clock.stream.cuda_stream)
    assert work.error() < MOST_ERROR
    if way == "dequantize first":
        turns, values = cycle(buffers), torch.empty(SHAPE_OF_MANY, dtype=torch.float16, device="cuda")

        def work():
            nt.dequantize(next(turns), name, out=values)
            torch.nn.functional.linear(x, values)

    measure(benchmark, tools, work, n_bytes)
    benchmark.extra_info["floor s"] = tools.reader.seconds(n_bytes)


@pytest.mark.parametrize("way", ["get_rows", "dequantize"])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ3_S"])
def test_rows(benchmark, tools, name, way):
    """Rows of a table of embeddings at random, beside as many rows in their order."""
    n_rows, n_elements = SHAPES[0]
    buffers = weights(name, n_rows, n_elements)
    indices = torch.randperm(n_rows, device="cuda")[:ROWS]
    expected = nt.dequantize(buffers[0].index_select(0, indices[:64]), name, torch.float16)
    assert torch.equal(nt.get_rows(buffers[0], indices[:64], name, torch.float16), expected)
    turns = cycle(buffers)
    if way == "get_rows":

        def work():
            nt.get_rows(next(turns), indices, name, torch.float16)
    else:

        def work():
            nt.dequantize(next(turns)[:ROWS], name, torch.float16)

    measure(benchmark, tools, work, ROWS * (buffers[0].shape[1] + 2 * n_elements))


@pytest.mark.parametrize("n_columns", [*FEW, *MANY])
@pytest.mark.parametrize(("n_rows", "n_elements"), SHAPES)
def test_cublas(benchmark, tools, n_rows, n_elements, n_columns):
    """The product with weights that are float16 already."""
    if n_columns in MANY and (n_rows, n_elements) != SHAPE_OF_MANY:
        pytest.skip("not shown")
    turns, x = cycle(dense_weights(n_rows, n_elements)), columns(n_columns, n_elements)
    measure(benchmark, tools, lambda: torch.nn.functional.linear(x, next(turns)), 2 * n_rows * n_elements)
