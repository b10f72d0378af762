"""`convert` and `diff` on a GPU that does its work as late as it may."""

import safetensors_bytes
from blocks import assert_same_bits, random_blocks, write_model
from small_model import TENSORS

import numba_dequant as nd
from numba_dequant.cli import comparison, convert, main


def test_convert(late, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SLICE_BYTES", 4000)
    path = write_model(tmp_path / "m.gguf", TENSORS)
    out = tmp_path / "m.safetensors"
    assert main.main(["convert", str(path), str(out), "--dtype", "fp16", "--device", "cuda"]) == 0
    assert late.loaded
    _, arrays = safetensors_bytes.read(out)
    for name, (source, shape, data) in TENSORS.items():
        expected = nd.dequantize(data, source, "float16", shape=shape, device="reference")
        assert_same_bits(arrays[name].astype(expected.dtype) if source == "I32" else arrays[name], expected)


def test_diff(late, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "SLICE_ELEMENTS", 1024)
    paths = [str(write_model(tmp_path / f"{name}.gguf", TENSORS)) for name in "ab"]
    assert main.main(["diff", *paths, "--device", "cuda"]) == 0
    write_model(tmp_path / "b.gguf", TENSORS | {"a.q": ("Q6_K", (6, 1024), random_blocks("Q6_K", 24, seed=1))})
    assert main.main(["diff", *paths, "--device", "cuda"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("~ a.q     Q6_K    6 x 1024  bytes")
