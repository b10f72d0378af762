"""The operators on PyTorch's streams, in its CUDA graphs and in its memory."""

import gc

import pytest
from blocks import write_model
from finite_blocks import finite_blocks

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing

pytestmark = pytest.mark.gpu


def blocks_of(name, n_rows=64, n_columns=1024, seed=0):
    return torch.from_numpy(finite_blocks(name, n_rows, n_columns, seed)).cuda()


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ3_S", "BF16"])
def test_capture_and_replay(name):
    first, second = (blocks_of(name, seed=seed) for seed in (0, 1))
    blocks, input = first.clone(), torch.randn(4, 1024, device="cuda", dtype=torch.float16)
    indices = torch.tensor([[3, 1], [0, 63]], device="cuda")
    out = torch.empty(64, 1024, device="cuda", dtype=torch.bfloat16)

    def work():
        nt.dequantize(blocks, name, out=out)
        return (
            nt.dequantize(blocks, name, torch.float16),
            nt.get_rows(blocks, indices, name),
            nt.linear(input, blocks, name),
        )

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for content in (second, first):
        blocks.copy_(content)
        out.zero_()
        graph.replay()
        found = [*captured, out.clone()]
        for ours, expected in zip(found, [*work(), out], strict=True):
            assert torch.equal(ours, expected)


def test_the_first_call_of_a_format_may_be_captured():
    """Its kernel is compiled and loaded within the capture."""
    blocks = blocks_of("Q2_K")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nt.dequantize(blocks, "Q2_K", torch.bfloat16)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), nt.dequantize(blocks.cpu(), "Q2_K", torch.bfloat16))


def test_side_streams():
    """Data is written on the stream just before, behind long work, and its memory is used anew just after."""
    content = blocks_of("Q4_K", 512)
    expected = nt.dequantize(content, "Q4_K", torch.float16)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(200_000)
                blocks = torch.zeros_like(content)
                blocks.copy_(content)
                results.append(nt.dequantize(blocks, "Q4_K", torch.float16))
                del blocks
                torch.full_like(content, 255)
    for stream in streams:
        stream.synchronize()
    for found in results:
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu():
    blocks, input = blocks_of("Q4_K"), torch.randn(4, 1024, device="cuda")
    indices = torch.tensor([1, 2], device="cuda")
    nt.linear(input, blocks, "Q4_K")
    nt.get_rows(blocks, indices, "Q4_K")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        marker = torch.cuda.Event()
        marker.record()
        nt.dequantize(blocks, "Q4_K")
        nt.get_rows(blocks, indices, "Q4_K")
        nt.linear(input, blocks, "Q4_K")
        assert not marker.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "MXFP4"])
def test_memory(name):
    """A call takes its result from PyTorch's allocator, and nothing else."""
    blocks = blocks_of(name, 1024, 4096)
    nt.dequantize(blocks, name, torch.float16)
    torch.cuda.synchronize()

    def peak(call):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    # The allocator may take a block that is larger than it was asked for.
    expected = peak(lambda: torch.empty(1024, 4096, dtype=torch.float16, device="cuda"))[1]
    found, n_bytes = peak(lambda: nt.dequantize(blocks, name, torch.float16))
    assert n_bytes == expected
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nt.dequantize(blocks, name, out=found)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_a_file_is_loaded_to_memory_of_pytorch(keep_quantized, tmp_path):
    tensors = {name: (name, (64, 1024), finite_blocks(name, 64, 1024)) for name in ("Q4_K", "Q6_K", "BF16")}
    path = write_model(tmp_path / "model.gguf", tensors)
    nt.load_file(path, "cuda")
    gc.collect()  # tensors of other tests
    before = torch.cuda.memory_allocated()
    found = nt.load_file(path, "cuda", torch.float16, keep_quantized=keep_quantized)
    assert torch.cuda.memory_allocated() - before == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in nt.load_file(path, "cpu", torch.float16, keep_quantized=keep_quantized).items():
        assert torch.equal(found[name].cpu(), tensor)


def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    blocks = blocks_of("Q4_K").to("cuda:1")
    with torch.cuda.device(0):
        found = nt.dequantize(blocks, "Q4_K", torch.float16)
        assert found.device == blocks.device
        torch.cuda.synchronize(1)
        assert torch.equal(found.cpu(), nt.dequantize(blocks.cpu(), "Q4_K", torch.float16))
