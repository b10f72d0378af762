"""What PyTorch makes of the operators: checks, graphs, exports, fake and meta tensors, vmap."""

import enum
import warnings

import pytest
from finite_blocks import finite_blocks

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing

OPERATORS = torch.ops.numba_dequant


class Kind(enum.IntEnum):
    Q4_K = 12


@pytest.fixture
def blocks(device):
    return torch.from_numpy(finite_blocks("Q4_K", 8, 512)).to(device)


def is_fine(operator, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has some of its own
        found = torch.library.opcheck(operator, arguments, named)
    assert set(found.values()) == {"SUCCESS"}, found


def test_opcheck(blocks, device):
    input = torch.randn(3, 512, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    is_fine(OPERATORS.dequantize.default, blocks, "Q4_K", torch.float16)
    is_fine(OPERATORS.dequantize.default, blocks.view(2, 4, -1), "Q4_K", torch.bfloat16)
    is_fine(OPERATORS.dequantize.out, blocks, "Q4_K", out=torch.empty(8, 512, device=device))
    is_fine(OPERATORS.get_rows.default, blocks, torch.tensor([[1, 2], [0, 7]], device=device), "Q4_K", torch.float16)
    is_fine(OPERATORS.linear.default, input, blocks, "Q4_K", bias)
    is_fine(OPERATORS.linear.default, input.detach(), blocks, "Q4_K", None)


def everything(input, blocks, indices):
    values = nt.dequantize(blocks, Kind.Q4_K, torch.float32, (8, -1))
    out = torch.empty_like(values)
    nt.dequantize(blocks, 12, out=out)
    rows = nt.get_rows(blocks, indices, "q4_k")
    return nt.linear(input, blocks, "Q4_K").relu() + (values - out).sum() + rows.sum(), nt.dequantize(blocks, 12)


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_one_graph_and_the_same_values(blocks, device, backend, is_dynamic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has some of its own
        torch.compiler.reset()
        compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=is_dynamic)
        for n in (3, 5):
            input = torch.randn(n, 512, device=device, requires_grad=True)
            indices = torch.tensor([[0, 1], [7, 3]], device=device)
            found, expected = compiled(input, blocks, indices), everything(input, blocks, indices)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
            (ours,) = torch.autograd.grad(found[0].sum(), input)
            (theirs,) = torch.autograd.grad(expected[0].sum(), input)
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_layers_in_one_graph(blocks, device, backend):
    model = torch.nn.Sequential(
        nt.QuantizedEmbedding.from_blocks(blocks, "Q4_K"),
        nt.QuantizedLinear.from_blocks(blocks, "Q4_K", torch.randn(8, device=device)),
        torch.nn.SiLU(),
    )
    indices = torch.tensor([[0, 1], [7, 3]], device=device)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PyTorch has some of its own
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(indices), model(indices))


def test_export(blocks, device):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nt.QuantizedEmbedding.from_blocks(blocks, "Q4_K")
            self.linear = nt.QuantizedLinear.from_blocks(blocks, "Q4_K", torch.randn(8, device=device))

        def forward(self, indices):
            return self.linear(self.embedding(indices))

    module, indices = Module(), torch.tensor([[1, 2], [0, 7]], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (indices,))
    assert torch.equal(program.module()(indices), module(indices))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"numba_dequant.get_rows.default", "numba_dequant.linear.default"} <= called


def test_tensors_without_memory(blocks):
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = blocks.to("meta")
    found = nt.dequantize(meta, "Q4_K", torch.bfloat16)
    assert (found.shape, found.dtype, found.device.type) == ((8, 512), torch.bfloat16, "meta")
    assert nt.dequantize(meta, "Q4_K", shape=(16, 256)).shape == (16, 256)
    assert nt.get_rows(meta, torch.empty(2, 3, dtype=torch.int64, device="meta"), "Q4_K").shape == (2, 3, 512)
    assert nt.linear(torch.empty(5, 512, device="meta"), meta, "Q4_K").shape == (5, 8)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(blocks)
        found = nt.dequantize(fake, "Q4_K", torch.float16)
        assert type(found) is type(fake)
        assert (found.shape, found.device) == ((8, 512), blocks.device)


def test_vmap(blocks):
    many = blocks.view(2, 4, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls an operator once per row, and may say so
        found = torch.vmap(lambda each: nt.dequantize(each, "Q4_K"))(many)
    assert torch.equal(found, nt.dequantize(many, "Q4_K"))
