import os

import gguf_bytes
import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant import formats
from numba_dequant.backends.host import HostBackend
from numba_dequant.bits import load_8_bytes, signed_bytes
from numba_dequant.format import block_layout
from numba_dequant.gguf.source import Source
from numba_dequant.loading import files


@pytest.fixture
def path(tmp_path):
    tensors = {
        "token_embd.weight": ("Q8_0", (4, 64), random_blocks("Q8_0", 8)),
        "blk.0.attn_q.weight": ("Q4_K", (2, 256), random_blocks("Q4_K", 2)),
        "blk.0.attn_norm.weight": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
        "blk.1.attn_q.weight": ("Q6_K", (1, 512), random_blocks("Q6_K", 2)),
        "ids": ("I32", (3,), np.arange(3, dtype="<i4").tobytes()),
    }
    return write_model(tmp_path / "model.gguf", tensors, [("general.architecture", "test")])


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_load(path, device):
    with nd.open(path) as model:
        assert model.metadata["general.architecture"] == "test"
        assert model.tensors["blk.0.attn_q.weight"].shape == (2, 256)
        for name, tensor in model.tensors.items():
            found = model.load(name, "float32", device=device)
            expected = nd.dequantize(model.read(name), tensor.format, "float32", shape=tensor.shape, device="reference")
            assert found.shape == tensor.shape
            np.testing.assert_array_equal(found, expected)


def test_load_into_out(path):
    out = np.full((4, 64), 7, np.float16)
    assert nd.open(path).load("token_embd.weight", device="cpu", out=out) is out
    assert_same_bits(out, nd.open(path).load("token_embd.weight", device="reference"))


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (None, ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "blk.1.attn_q.weight", "ids"]),
        ("blk.*.attn_q.weight", ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]),
        ("blk.0.*", ["blk.0.attn_q.weight", "blk.0.attn_norm.weight"]),
        (lambda tensor: tensor.format.name == "I32", ["ids"]),
        (lambda tensor: False, []),
    ],
    ids=["all", "glob", "layer", "function", "none"],
)
def test_load_all(path, select, names):
    found = nd.load(path, select, device="cpu")
    assert list(found) == names
    for name, values in found.items():
        assert values.dtype == (np.int32 if name == "ids" else np.float16)


def test_a_short_load_shows_no_bar(path, capsys):
    nd.load(path, device="cpu", progress=False)  # compiling may take longer than the delay of a bar
    nd.load(path, device="cpu", progress=True)
    assert capsys.readouterr() == ("", "")


def test_a_file_cut_short_after_opening(path):
    with nd.open(path) as model:
        os.truncate(path, model.tensors["ids"].offset - 100)
        with pytest.raises(nd.GgufError, match=r"the file has .*, but tensor 'blk\.1\.attn_q\.weight' ends at"):
            model.load("blk.1.attn_q.weight", device="cpu")
        with pytest.raises(nd.ReadError, match=r"'token_embd\.weight' at byte \d+: it has changed since it was opened"):
            model.load("token_embd.weight", device="cpu")


def test_wrong_arguments_are_found_before_anything_is_read(path):
    with nd.open(path) as model:
        os.truncate(path, 10)
        with pytest.raises(nd.DtypeError):
            model.load_all(dtype="int4", device="cpu")
        with pytest.raises(nd.DeviceError):
            model.load_all(device="tpu")


def test_repr(path):
    assert repr(nd.open(path)) == f"Model({str(path)!r}, 5 tensors)"


@pytest.mark.model
def test_a_real_model():
    path = os.environ.get("NUMBA_DEQUANT_TEST_MODEL")
    if not path:
        pytest.skip("name a GGUF file in NUMBA_DEQUANT_TEST_MODEL")
    with nd.open(path) as model:
        for name in model.tensors:
            assert_same_bits(model.load(name, device="cpu"), model.load(name, device="reference"))


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_only_a_gpu_has_buffers_to_release(device):
    with pytest.raises(nd.DeviceError, match=f"device is '{device}', but only a GPU has such buffers"):
        nd.release_buffers(device)


@pytest.mark.parametrize("block_size", [40_008, 1_100_000])
def test_blocks_whose_size_is_odd_and_large(tmp_path, monkeypatch, block_size):
    """A chunk was larger than the buffer of a thread, and the file seemed to be too short."""
    layout = block_layout(scale="u1", quants=("i1", block_size))

    def dequantize(blocks):
        return blocks["quants"].astype(np.float32)

    def decode(block, at, run):
        return signed_bytes(load_8_bytes(block, at + 1 + 8 * run))

    fmt = nd.Format("LARGE", 6000, block_size, layout, "large", dequantize, decode)
    shape = (max(1_200_000 // block_size, 1), block_size)
    blocks = np.random.default_rng(0).integers(0, 256, shape[0] * fmt.type_size, "u1")
    monkeypatch.setitem(formats._formats, "LARGE", fmt)
    monkeypatch.setitem(formats._with_id, 6000, fmt)
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf_bytes.gguf([("t", shape, 6000, blocks.tobytes())]))
    for device in ("cpu", "reference"):
        found = nd.load(path, device=device)["t"]
        np.testing.assert_array_equal(found.reshape(-1), dequantize(blocks.view(layout)).reshape(-1))


def test_a_read_that_ends_early_in_a_file_that_has_not_changed(path, monkeypatch):
    """As on a disk that lost its end: the file is as long as before."""
    model = nd.open(path)
    tensor = model.tensors["blk.0.attn_norm.weight"]
    monkeypatch.setattr(files, "read_into", lambda file, data, offset: len(data) - 3)
    message = rf"at byte {tensor.offset}: the file has \d+ .*bytes"
    with pytest.raises(nd.GgufError, match=message) as raised:
        model.load(tensor, device="cpu")
    assert tensor.name in raised.value.field


@pytest.mark.parametrize("threads", [1, 3])
def test_a_header_that_cannot_be_read_again(path, monkeypatch, threads):
    """It is read again where only the time stamp differs."""
    model = nd.open(path)
    os.utime(path, ns=(0, 0))

    def fail(self, file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Source, "_has_same_header", fail)
    with pytest.raises(nd.ReadError, match=r"tensor '.*' at byte \d+: Input/output error; check the disk"):
        model.load_all(device="cpu", threads=threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_too_little_memory_for_the_values_of_a_chunk(path, monkeypatch, threads):
    def write(*arguments, **options):
        raise MemoryError("no room for 16 bytes")

    monkeypatch.setattr(HostBackend, "write", write)
    with pytest.raises(nd.DeviceError, match=r"tensor '.*': out of memory: no room for 16 bytes"):
        nd.load(path, device="cpu", threads=threads)
