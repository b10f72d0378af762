"""`numba-dequant convert`: values, files, names, and what is left behind when something goes wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors_bytes
from blocks import DTYPES, assert_same_bits, write_model
from conversions import TENSORS, assert_holds, files, run
from gguf_bytes import FLOAT32, INT8, INT32, STRING, UINT32, floats, gguf, value

import numba_dequant as nd
from numba_dequant.cli import convert, safetensors_format
from numba_dequant.cli.verify import SAMPLE
from numba_dequant.dtypes import numpy_dtype


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.gguf", TENSORS, [("general.architecture", "llama")])
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slice_bytes", [256, convert.SLICE_BYTES], ids=["slices", "whole"])
def test_values_are_those_of_the_reference(tmp_path, monkeypatch, dtype, slice_bytes):
    monkeypatch.setattr(convert, "SLICE_BYTES", slice_bytes)
    assert run(SAMPLE, tmp_path / "m.safetensors", "--dtype", dtype) == 0
    _, arrays = safetensors_bytes.read(tmp_path / "m.safetensors")
    assert_holds(arrays, SAMPLE, dtype)


def test_the_cpu_converts_to_the_same_values(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert, "SLICE_BYTES", 512)
    assert run("model.gguf", "m.safetensors", "--dtype", "bf16", device="cpu") == 0
    assert capsys.readouterr().out.startswith("m.safetensors: 6 tensors, 7,183 bytes of bfloat16, ")
    metadata, arrays = safetensors_bytes.read(folder / "m.safetensors")
    assert_holds(arrays, "model.gguf", "bfloat16")
    assert metadata == {"format": "pt", "gguf.general.architecture": '"llama"'}
    assert files(folder) == ["m.safetensors"]


def test_another_byte_order(folder):
    path = Path(__file__).parents[1] / "data" / "gguf" / "good" / "big_endian.gguf"
    assert run(path, "m.safetensors", "--dtype", "f32") == 0
    assert_holds(safetensors_bytes.read(folder / "m.safetensors")[1], path, "float32")


def test_safetensors_opens_it(folder):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    assert run("model.gguf", "m.safetensors") == 0
    with safetensors.safe_open("m.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert set(opened.keys()) == set(TENSORS)
        for name in opened.keys():  # noqa: SIM118 it is no mapping
            found = opened.get_tensor(name)
            dtype = torch.int8 if name == "ids" else torch.bfloat16
            assert (found.dtype, tuple(found.shape)) == (dtype, TENSORS[name][1])
            if name != "ids":
                found = found.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
                assert_same_bits(found, np.asarray(nd.load("model.gguf", name, "bfloat16", device="reference")[name]))


def test_transformers_opens_it(folder):
    modeling = pytest.importorskip("transformers.modeling_utils")
    assert run("model.gguf", "m.safetensors") == 0
    assert set(modeling.load_state_dict("m.safetensors")) == set(TENSORS)


def test_shards_and_their_index(folder, capsys):
    assert run("model.gguf", ".", "--dtype", "float32", "--shard-size", "10.2KB") == 0
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert files(folder) == [*names, "model.safetensors.index.json"]
    assert capsys.readouterr().out.startswith("./model.safetensors.index.json: 6 tensors, 14,363 bytes of float32 in 2")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 14363}
    assert set(index["weight_map"]) == set(TENSORS)
    arrays = {}
    for name in names:
        metadata, found = safetensors_bytes.read(folder / name)
        assert ("gguf.general.architecture" in metadata) == (name == names[0])
        assert {index["weight_map"][tensor] for tensor in found} == {name}
        arrays |= found
    assert_holds(arrays, "model.gguf", "float32")


def test_a_tensor_that_is_larger_than_a_shard_has_its_own(folder):
    assert run("model.gguf", "m.safetensors", "--shard-size", "1") == 0
    index = json.loads((folder / "m.safetensors.index.json").read_text())
    assert index["weight_map"]["none"] == index["weight_map"]["ids"]  # it takes no room
    assert len(set(index["weight_map"].values())) == 5
    assert set(index["weight_map"].values()) == set(files(folder)) - {"m.safetensors.index.json"}


@pytest.mark.parametrize(
    ("text", "number"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("7", 7), ("20mb", 20_000_000), ("3K", 3000), ("1TiB", 1 << 40)],
)
def test_sizes(text, number):
    assert convert.number_of_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "0.1", "5 XB", "1e9", "٣GB", "9" * 99, "\x1b[2J"])
def test_wrong_sizes(text, folder, capsys):
    assert run("model.gguf", "m.safetensors", f"--shard-size={text}") == 2
    assert "a size is written like 5GB" in capsys.readouterr().err
    assert files(folder) == []


def test_selected_tensors(folder):
    assert run("model.gguf", "m.safetensors", "--select", "blk.*", "--select", "ids") == 0
    assert set(safetensors_bytes.read(folder / "m.safetensors")[1]) == {
        "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "ids",
    }  # fmt: skip


def test_a_split_model(folder):
    path = Path(__file__).parents[1] / "data" / "gguf" / "good" / "split-00001-of-00003.gguf"
    assert run(path, "m.safetensors", "--dtype", "fp32") == 0
    assert_holds(safetensors_bytes.read(folder / "m.safetensors")[1], path, "float32")


def test_original_shapes(folder):
    entries = [value("comfy.gguf.orig_shape.w", INT32, [2, 3, 1])]
    (folder / "x.gguf").write_bytes(gguf([("w", *floats(6))], entries))
    for option, shape in (([], (6,)), (["--orig-shapes"], (2, 3, 1))):
        assert run("x.gguf", "m.safetensors", "--force", *option) == 0
        assert safetensors_bytes.read(folder / "m.safetensors")[1]["w"].shape == shape


def test_metadata_is_kept(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["numba_dequant.cli.json_text"], "ITEMS_AT_ONCE", 3)
    values = {
        "format": "not PyTorch's", "text": 'a "quote" \x1b \u2028 \N{SNOWMAN}', "number": 7, "float": float("inf"),
        "tokens": ["a", "b\0", "", "d"], "scores": [0.5, float("nan"), 1.5, -float("inf")], "none": [],
        "long": "é" * (1 << 20),
    }  # fmt: skip
    kinds = {"number": UINT32, "float": FLOAT32, "scores": FLOAT32, "none": INT8}
    entries = [value(key, kinds.get(key, STRING), content) for key, content in values.items()]
    (folder / "x.gguf").write_bytes(gguf([("w", *floats(2))], entries))
    assert run("x.gguf", "m.safetensors") == 0
    metadata, _ = safetensors_bytes.read(folder / "m.safetensors")
    assert metadata.pop("format") == "pt"
    found = {key.removeprefix("gguf."): json.loads(text, parse_constant=pytest.fail) for key, text in metadata.items()}
    assert found == values | {"float": "Infinity", "scores": [0.5, "NaN", 1.5, "-Infinity"]}


def test_metadata_that_is_too_long_is_left_out_and_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(safetensors_format, "MAX_METADATA", 1000)
    entries = [value("long\x1b", STRING, "x" * 990), value("array", UINT32, [1] * 600), value("short", STRING, "x")]
    entries.append(value("longest", STRING, "x" * (1 << 21)))
    (folder / "x.gguf").write_bytes(gguf([("w", *floats(2))], entries))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert run("x.gguf", "m.safetensors") == 0
    complaints = capsys.readouterr().err
    assert r"metadata 'long\x1b' is left out" in complaints
    assert "metadata 'array' is left out" in complaints
    assert "metadata 'longest' is left out" in complaints
    assert set(safetensors_bytes.read(folder / "m.safetensors")[0]) == {"format", "gguf.short"}


def test_a_header_that_safetensors_refuses(folder, monkeypatch, capsys):
    monkeypatch.setattr(safetensors_format, "MAX_HEADER", 100)
    assert run("model.gguf", "m.safetensors") == 2
    assert "and safetensors allows 100; pass a smaller --shard-size" in capsys.readouterr().err
    assert files(folder) == []


def test_the_name_of_the_metadata_is_no_tensor(folder, capsys):
    (folder / "x.gguf").write_bytes(gguf([("__metadata__", *floats(2))]))
    assert run("x.gguf", "m.safetensors") == 2
    assert "a tensor is called __metadata__" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("m.bin", "m.bin: the name must end in .safetensors"),
        (".safetensors", "must end in .safetensors"),
        ("none/m.safetensors", "none/m.safetensors: No such file or directory; make the folder first"),
        ("", "must end in .safetensors"),
        ("a\x1b[2J.bin", r"a\x1b[2J.bin: the name must"),
        ("x" * 300 + ".safetensors", "File name too long"),
        ("a\0b.safetensors", "a file name cannot have a NUL"),
    ],
    ids=["suffix", "suffix alone", "folder", "nothing", "steering", "too long", "NUL"],
)
def test_a_wrong_place(folder, capsys, out, message):
    assert run("model.gguf", out) == 2
    assert message in capsys.readouterr().err
    assert files(folder) == []
