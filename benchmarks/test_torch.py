"""numba_dequant.torch beside bare kernels, and beside the arithmetic of programs that run GGUF.

ComfyUI-GGUF and diffusers dequantize with operations of PyTorch in float16. `PEERS` is that arithmetic, written from
the formulas of the formats; "compiled" is the same by `torch.compile`.
"""

import os
from collections import deque

import numpy as np
import pytest
from conftest import QUANTIZED, gpu_time, note

import numba_dequant as nd

try:
    import torch
    from eager_torch import PEERS

    from numba_dequant import torch as nt
except ImportError:
    torch, PEERS = None, {}

pytestmark = [
    pytest.mark.skipif(torch is None, reason="PyTorch is not installed"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch has some of its own
]

ON_GPU = pytest.mark.benchmark(timer=gpu_time)
SIZES = [1 << 24, 1 << 28]
UNCACHED = 200 << 20
N_ACTIVATIONS, N_TOKENS = 4096, 48
SHAPES = [(3072, 3072)] * 4 + [(12288, 3072), (3072, 12288)]
"""Linear layers of one block of a diffusion transformer: rows and columns."""


def blocks_of(name, n_elements, seed=0, scales=(1e-4, 1e-3)):
    """Random blocks with scales of that range, on the GPU: shape (blocks, bytes)."""
    fmt = nd.FORMATS[name]
    random = np.random.default_rng(seed)
    piece = random.integers(0, 256, (1 << 12) * fmt.type_size, np.uint8).view(fmt.layout)
    for field in fmt.layout.names:
        if fmt.layout[field].base == np.float16:
            piece[field] = random.uniform(*scales, piece[field].shape)
    bytes_ = torch.from_numpy(piece.view(np.uint8).reshape(-1, fmt.type_size)).cuda()
    n_blocks = n_elements // fmt.block_size
    return bytes_.repeat(-(-n_blocks // len(bytes_)), 1)[:n_blocks].contiguous()


def peak_bytes(work):
    """The peak of the memory that a call allocates, its result included."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@ON_GPU
@pytest.mark.parametrize("n_elements", SIZES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_operator(benchmark, gpu, name, n_elements):
    """The operator, and the bare kernel in the same run; more buffers than the cache holds."""
    from numba_dequant.cli.measure import Workload

    bare = Workload(nd.FORMATS[name], "float16", n_elements, gpu.itself)
    turns = max(2, -(-UNCACHED // bare.bytes_moved))
    data = deque(blocks_of(name, n_elements, seed) for seed in range(turns))
    kept = deque(maxlen=turns)

    def work():
        data.rotate()
        kept.append(nt.dequantize(data[0], name, torch.float16))

    for _ in range(turns + 1):
        work()
    gpu.clock.head_start = 4
    kernel = [gpu.clock.seconds(bare) for _ in range(3)]
    benchmark.pedantic(work, rounds=21, iterations=8, warmup_rounds=1)
    kernel += [gpu.clock.seconds(bare) for _ in range(3)]
    gpu.clock.head_start = 1
    note(benchmark, bare.bytes_moved, gpu.roofline(bare), elements=n_elements)
    extra = peak_bytes(lambda: nt.dequantize(data[0], name, torch.float16)) - 2 * n_elements
    benchmark.extra_info |= {"kernel s": float(np.median(kernel)), "extra bytes": extra}
    assert extra == 0


@ON_GPU
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("n_elements", SIZES)
@pytest.mark.parametrize("name", list(PEERS) or ["any"])
def test_arithmetic_of_programs(benchmark, gpu, name, n_elements, way):
    data = blocks_of(name, n_elements)
    dequantize = PEERS[name]
    if way == "compiled":
        torch.compiler.reset()
        dequantize = torch.compile(dequantize, fullgraph=True)
    found = dequantize(data[:4096], torch.float16).float()
    exact = nt.dequantize(data[:4096], name, torch.float32)
    peak = peak_bytes(lambda: dequantize(data, torch.float16))
    gpu.clock.head_start = 8
    benchmark.pedantic(dequantize, (data, torch.float16), rounds=11, iterations=1, warmup_rounds=2)
    gpu.clock.head_start = 1
    note(benchmark, data.numel() + 2 * n_elements, elements=n_elements)
    benchmark.extra_info |= {
        "peak bytes per value": peak / n_elements,
        "not exactly rounded": float((found != exact.half().float()).float().mean()),
        "error": float((found - exact).norm() / exact.norm()),
    }


@ON_GPU
@pytest.mark.parametrize("n_elements", SIZES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_transformers(benchmark, gpu, name, n_elements):
    """The function of transformers itself, for the formats that it has."""
    theirs = pytest.importorskip("transformers.integrations.gguf.dequant", exc_type=ImportError)
    number = nd.FORMATS[name].ggml_id
    if number not in theirs.GGML_BLOCK:
        pytest.skip(f"transformers has no {name}")
    data = blocks_of(name, n_elements).view(-1)
    part = data[: 4096 * nd.FORMATS[name].type_size]
    found = theirs.dequantize(part, number, torch.float16).float()
    exact = nt.dequantize(part, name, torch.float32)
    peak = peak_bytes(lambda: theirs.dequantize(data, number, torch.float16))
    gpu.clock.head_start = 8
    benchmark.pedantic(theirs.dequantize, (data, number, torch.float16), rounds=11, iterations=1, warmup_rounds=2)
    gpu.clock.head_start = 1
    note(benchmark, data.numel() + 2 * n_elements, elements=n_elements)
    benchmark.extra_info |= {
        "peak bytes per value": peak / n_elements,
        "not exactly rounded": float((found != exact.half().float()).float().mean()),
        "error": float((found - exact).norm() / exact.norm()),
    }


CALLS = {
    "dequantize": lambda data, x, indices, out: nt.dequantize(data, "Q4_K", torch.float16),
    "dequantize out": lambda data, x, indices, out: nt.dequantize(data, "Q4_K", out=out),
    "get_rows": lambda data, x, indices, out: nt.get_rows(data, indices, "Q4_K", torch.float16),
    "linear": lambda data, x, indices, out: nt.linear(x, data, "Q4_K"),
    "F.linear": lambda data, x, indices, out: torch.nn.functional.linear(x, out),
}


@pytest.mark.parametrize("name", CALLS)
def test_host_time(benchmark, gpu, name):
    data = blocks_of("Q4_K", 16 * 256)
    out = torch.empty(16, 256, dtype=torch.float16, device="cuda")
    x, indices = torch.randn(1, 256, dtype=torch.float16, device="cuda"), torch.tensor([1], device="cuda")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # the cores of a virtual machine differ
    benchmark.pedantic(CALLS[name], (data, x, indices, out), rounds=40, iterations=100, warmup_rounds=2)
    os.sched_setaffinity(0, cores)
    torch.cuda.synchronize()


class DiffusersLinear(torch.nn.Module if torch else object):
    """A layer as diffusers' GGUFLinear computes it: values in float16, then the type of the activations."""

    def __init__(self, blocks, name, n_columns):
        super().__init__()
        self.blocks, self.name, self.n_columns = blocks, name, n_columns

    def forward(self, x):
        weight = PEERS[self.name](self.blocks, torch.float16).view(-1, self.n_columns).to(x.dtype)
        return torch.nn.functional.linear(x, weight)


def stack(name, is_ours):
    """The layers of two blocks of the transformer, one after the other."""
    layers = []
    for index, (n_rows, n_columns) in enumerate(SHAPES * 2):
        blocks = blocks_of(name, n_rows * n_columns, index)
        if is_ours:
            layers.append(nt.QuantizedLinear.from_blocks(blocks.view(n_rows, -1), name))
        else:
            layers.append(DiffusersLinear(blocks, name, n_columns))
    return torch.nn.Sequential(*layers)


@ON_GPU
@pytest.mark.parametrize("way", ["theirs", "theirs, compiled", "ours", "ours, compiled", "dense"])
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q8_0"])
def test_diffusion_stack(benchmark, gpu, name, way):
    """A forward of twelve Linear layers, BF16 activations of 4,096 tokens; the first layer against float64."""
    model = stack(name, "theirs" not in way)
    if way == "dense":
        model = torch.nn.Sequential(*[layer.dequantize(torch.bfloat16) for layer in model])
    first = model[0]
    if "compiled" in way:
        torch.compiler.reset()
        model = torch.compile(model, fullgraph=True)
    x = torch.randn(N_ACTIVATIONS, 3072, device="cuda", dtype=torch.bfloat16)
    weight = nt.dequantize(blocks_of(name, 3072 * 3072), name, torch.float32, (3072, 3072)).double()
    with torch.inference_mode():
        exact = x[:64].double() @ weight.T
        error = float((first(x[:64]).double() - exact).norm() / exact.norm())
        peak = peak_bytes(lambda: model(x))
        gpu.clock.head_start = 32
        benchmark.pedantic(model, (x,), rounds=11, iterations=1, warmup_rounds=2)
        gpu.clock.head_start = 1
    benchmark.extra_info |= {"error": error, "peak bytes": peak}


@pytest.mark.parametrize("way", ["theirs", "ours", "dense"])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_decoding(benchmark, gpu, name, way):
    """48 tokens, one by one, of a llama of 150 million parameters whose layers are transformers' packed ones.

    "theirs" dequantizes with operations of PyTorch in each forward, "ours" by `ggml`; "dense" is dequantized once.
    """
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels", exc_type=ImportError)
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.gguf.utils import replace_with_gguf_modules

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half().cuda().eval()
    linears = {f"{name}.weight": each for name, each in model.named_modules() if type(each) is torch.nn.Linear}
    blocks = {
        path: blocks_of(name, layer.weight.numel(), seed, (1e-5, 1e-4)).view(layer.out_features, -1)
        for seed, (path, layer) in enumerate(linears.items())
    }
    with torch.no_grad():
        for path, layer in linears.items():
            layer.weight.copy_(nt.dequantize(blocks[path], name, torch.float16))
    tokens = torch.randint(0, 32000, (1, 16), device="cuda")
    with torch.inference_mode():
        expected = model(tokens).logits.float()
    if way != "dense":
        kernel = kernels.GgufKernel(nt.ggml)
        plan = dict.fromkeys(linears, nd.FORMATS[name].ggml_id)
        for path, layer in replace_with_gguf_modules(model, plan, kernel).items():
            layer.weight.data = blocks[path]
            if way == "theirs":
                layer.forward = unpacked_forward(layer)
        kernels._gguf_kernel = kernel if way == "ours" else False
    del linears, blocks
    options = {"min_new_tokens": N_TOKENS, "max_new_tokens": N_TOKENS, "do_sample": False}
    with torch.inference_mode():
        found = model(tokens).logits.float()

        def decode():
            model.generate(tokens, **options)
            torch.cuda.synchronize()

        benchmark.pedantic(decode, rounds=5, iterations=1, warmup_rounds=1)
    if benchmark.enabled:
        benchmark.extra_info["tokens per second"] = N_TOKENS / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "difference of logits": float((found - expected).norm() / expected.norm()),
        "bytes of weights": sum(each.nbytes for each in model.state_dict().values()),
    }


def unpacked_forward(layer):
    """The forward of transformers' layer for many rows, used for any number: for few rows, it needs a kernel."""

    def forward(x):
        return layer._unpack_matmul(x.reshape(-1, layer.in_features)).view(*x.shape[:-1], layer.out_features)

    return forward
