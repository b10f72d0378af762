"""load_file and load_model."""

import numpy as np
import pytest
from blocks import random_blocks, write_model
from finite_blocks import finite_blocks

import numba_dequant as nd
from numba_dequant.parallel import plan

torch = pytest.importorskip("torch")

from numba_dequant import torch as nt  # noqa: E402 PyTorch may be missing

ROWS, COLUMNS = 48, 256


def floats(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


TENSORS = {
    "token_embd.weight": ("Q6_K", (ROWS, COLUMNS), finite_blocks("Q6_K", ROWS, COLUMNS, 1)),
    "blk.0.ffn.weight": ("Q4_K", (64, COLUMNS), finite_blocks("Q4_K", 64, COLUMNS, 2)),
    "blk.0.ffn.bias": ("F32", (64,), floats(64).tobytes()),
    "blk.0.down.weight": ("Q8_0", (COLUMNS, 64), finite_blocks("Q8_0", COLUMNS, 64, 3)),
    "norm.weight": ("F16", (COLUMNS,), floats(COLUMNS).astype(np.float16).tobytes()),
    "positions": ("I32", (COLUMNS,), np.arange(COLUMNS, dtype=np.int32).tobytes()),
    "experts.weight": ("Q4_0", (2, 3, 64), finite_blocks("Q4_0", 6, 64, 4)),
}


@pytest.fixture
def path(tmp_path):
    return write_model(tmp_path / "model.gguf", TENSORS)


def expected(path, name, dtype=torch.float32):
    values = nd.open(path).load(name, "float32", device="reference")
    tensor = torch.from_numpy(np.array(values))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_load_file(path, device, dtype):
    tensors = nt.load_file(path, device, dtype)
    assert list(tensors) == list(TENSORS)
    for name, tensor in tensors.items():
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), expected(path, name, dtype or torch.float32))


def test_a_dtype_for_each_tensor(path, device):
    tensors = nt.load_file(path, device, {"*norm*": torch.float32, "*": torch.bfloat16}, select=["*norm*", "blk.*"])
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "blk.0.ffn.weight": torch.bfloat16,
        "blk.0.ffn.bias": torch.bfloat16,
        "blk.0.down.weight": torch.bfloat16,
        "norm.weight": torch.float32,
    }


def test_blocks(path, device):
    tensors = nt.load_file(path, device, torch.float16, keep_quantized=True)
    for name, (kind, shape, data) in TENSORS.items():
        fmt = nd.FORMATS[kind]
        if fmt.block_size == 1:
            assert torch.equal(tensors[name].cpu(), expected(path, name, torch.float16))
            continue
        assert tensors[name].dtype == torch.uint8
        assert tensors[name].shape == (*shape[:-1], fmt.n_bytes(shape[-1:]))
        np.testing.assert_array_equal(tensors[name].cpu().numpy().reshape(-1), np.asarray(data).reshape(-1))
        assert torch.equal(nt.dequantize(tensors[name], fmt, torch.float32).cpu(), expected(path, name))


def test_other_devices(path):
    for name, tensor in nt.load_file(path, "meta", torch.float16).items():
        assert tensor.is_meta
        assert tensor.shape == TENSORS[name][1]


def test_wrong_arguments(path):
    with pytest.raises(nd.TensorNotFoundError):
        nt.load_file(path, select="norm.weights")
    with pytest.raises(nd.DtypeError):
        nt.load_file(path, dtype=torch.int8)
    with pytest.raises(nd.OptionError, match="keep_quantized must be True or False"):
        nt.load_file(path, keep_quantized="yes")
    with pytest.raises(nd.MissingFileError):
        nt.load_file(path.parent / "other.gguf")


class Network(torch.nn.Module):
    def __init__(self, device=None, dtype=None):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.embedding = torch.nn.Embedding(ROWS, COLUMNS, **options)
        self.up = torch.nn.Linear(COLUMNS, 64, **options)
        self.down = torch.nn.Linear(64, COLUMNS, bias=False, **options)
        self.norm = torch.nn.LayerNorm(COLUMNS, bias=False, **options)
        self.head = torch.nn.Linear(COLUMNS, ROWS, bias=False, **options)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.zeros(COLUMNS, device=device, dtype=torch.int32))
        self.extra = torch.nn.Parameter(torch.zeros(3, **options))

    def forward(self, tokens):
        return self.head(self.norm(self.down(self.up(self.embedding(tokens)).relu())))


NAMES = {
    "token_embd.weight": "embedding.weight",
    "blk.0.ffn.weight": "up.weight",
    "blk.0.ffn.bias": "up.bias",
    "blk.0.down.weight": "down.weight",
    "norm.weight": "norm.weight",
    "positions": "positions",
}


def dense_network(path, device):
    network = Network(device)
    state = {ours: expected(path, name) for name, ours in NAMES.items()}
    network.load_state_dict(state | {"head.weight": state["embedding.weight"], "extra": torch.zeros(3)})
    return network.to(device)


@pytest.mark.parametrize("is_meta", [False, True])
@pytest.mark.parametrize("keep_quantized", [True, False])
def test_load_model(path, device, is_meta, keep_quantized):
    network = Network("meta" if is_meta else device)
    with torch.device(device):
        result = nt.load_model(network, path, names=NAMES, keep_quantized=keep_quantized)
    assert result == (["extra"], ["experts.weight"])
    if is_meta:
        network.extra = torch.nn.Parameter(torch.zeros(3, device=device))
    kinds = [type(layer) for layer in (network.embedding, network.up, network.down, network.head)]
    if keep_quantized:
        linear = nt.QuantizedLinear
        assert kinds == [nt.QuantizedEmbedding, linear, linear, linear]
        assert [layer.qtype for layer in (network.embedding, network.up, network.down)] == ["Q6_K", "Q4_K", "Q8_0"]
    else:
        assert kinds == [torch.nn.Embedding, *[torch.nn.Linear] * 3]
        assert network.up.weight.requires_grad
    assert network.head.weight is network.embedding.weight
    assert network.positions.dtype == torch.int32
    tokens = torch.tensor([[1, 5, 47]], device=device)
    torch.testing.assert_close(network(tokens), dense_network(path, device)(tokens))


def test_the_dtype_of_the_module_stays_unless_another_is_asked_for(path, device):
    for dtype, asked in ((torch.bfloat16, None), (torch.float32, torch.float16)):
        network = Network(device, dtype)
        nt.load_model(network, path, names=NAMES, dtype=asked)
        result = asked or dtype
        assert network.norm.weight.dtype == network.up.bias.dtype == result
        tokens = torch.tensor([1], device=device)
        assert network.embedding(tokens).dtype == network(tokens).dtype == result


def test_hooks_and_shared_modules_stay(path):
    network = Network()
    seen = []
    network.up.register_forward_hook(lambda *arguments: seen.append(arguments))
    network.again = network.up
    nt.load_model(network, path, names=NAMES)
    assert network.again is network.up
    network(torch.tensor([1]))
    assert seen


def test_a_second_load_into_quantized_layers(path, device):
    network = Network(device)
    nt.load_model(network, path, names=NAMES)
    with torch.no_grad():
        network.up.weight.zero_()
    assert nt.load_model(network, path, names=NAMES.get) == (["extra"], ["experts.weight"])
    assert torch.equal(network.up.weight.cpu(), nt.load_file(path, keep_quantized=True)["blk.0.ffn.weight"])
    network.up = nt.QuantizedLinear(COLUMNS, 64, "Q5_K", device=device)
    with pytest.raises(
        nd.ShapeError, match=r"'blk\.0\.ffn\.weight' is Q4_K of shape \(64, 256\), but the layer is Q5_K"
    ):
        nt.load_model(network, path, names=NAMES)


def test_the_module_itself_is_a_layer(tmp_path):
    data = finite_blocks("Q4_K", 64, COLUMNS, 2)
    path = write_model(tmp_path / "one.gguf", {"weight": ("Q4_K", (64, COLUMNS), data)})
    layer = torch.nn.Linear(COLUMNS, 64, bias=False)
    assert nt.load_model(layer, path) == ([], [])
    assert type(layer) is nt.QuantizedLinear


@pytest.mark.parametrize("fault", ["shape", "cut", "names", "dtype", "two for one", "two for a tied one"])
def test_a_failure_changes_nothing(path, fault):
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    names, error, options = dict(NAMES), nd.ShapeError, {}
    if fault == "shape":
        names["norm.weight"] = "up.bias"
        del names["blk.0.ffn.bias"]
    elif fault == "cut":
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 200)
        error = nd.GgufError
    elif fault == "names":
        names, error = 5, nd.OptionError
    elif fault == "dtype":
        options, error = {"dtype": torch.int8}, nd.DtypeError
    else:
        network.twin = network.up if fault == "two for a tied one" else None
        names["blk.0.down.weight"] = "twin.weight" if network.twin else "up.weight"
        network.down = torch.nn.Linear(COLUMNS, 64, bias=False)
        data = finite_blocks("Q8_0", 64, COLUMNS)
        path = write_model(path, TENSORS | {"blk.0.down.weight": ("Q8_0", (64, COLUMNS), data)})
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        error = nd.OptionError
    with pytest.raises(error):
        nt.load_model(network, path, names=names, **options)
    assert type(network.up) is torch.nn.Linear
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.fixture
def alone():
    """A process group of this process."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_kept_blocks_and_a_dtype_mean_the_same_with_a_plan(alone, tmp_path):
    tensors = {
        "norm": ("F32", (4,), np.arange(4, dtype="<f4").tobytes()),
        "w": ("Q8_0", (2, 32), random_blocks("Q8_0", 2)),
        "empty": ("F32", (0,), b""),
    }
    path = write_model(tmp_path / "model.gguf", tensors)

    def whole(model):
        return plan(model.tensors.values(), 1, [])

    for dtype in (torch.bfloat16, {"n*": "float16", "*": "bfloat16"}):
        with torch.device("meta"):
            planned = nt.load_file(path, "cpu", dtype, keep_quantized=True, plan=whole)
        for name, tensor in nt.load_file(path, "cpu", dtype, keep_quantized=True).items():
            assert planned[name].dtype == tensor.dtype
            assert torch.equal(planned[name], tensor)


def test_types_of_a_module_are_kept(tmp_path):
    """A float64 tensor becomes what was asked for, and integers stay integers."""
    tensors = {
        "weight": ("F64", (2, 4), np.arange(8, dtype="<f8").tobytes()),
        "bias": ("F32", (2,), np.arange(2, dtype="<f4").tobytes()),
        "count": ("I32", (3,), np.arange(3, dtype="<i4").tobytes()),
    }
    path = write_model(tmp_path / "model.gguf", tensors)
    module = torch.nn.Linear(4, 2)
    module.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    assert nt.load_model(module, path, dtype=torch.bfloat16) == ([], [])
    assert {name: each.dtype for name, each in module.state_dict().items()} == {
        "weight": torch.bfloat16, "bias": torch.bfloat16, "count": torch.int64,
    }  # fmt: skip
    assert module.count.tolist() == [0, 1, 2]
