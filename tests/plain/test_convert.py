"""`numba-dequant convert`: values, files, names, and what is left behind when something goes wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors_bytes
from blocks import DTYPES, assert_same_bits, random_blocks, write_model
from gguf_bytes import FLOAT32, INT8, INT32, STRING, UINT32, floats, gguf, value

import numba_dequant as nd
from numba_dequant.cli import convert, main, new_files, safetensors_format
from numba_dequant.cli.verify import SAMPLE
from numba_dequant.dtypes import numpy_dtype

TENSORS = {
    "token_embd.weight": ("Q8_0", (40, 64), random_blocks("Q8_0", 80)),
    "blk.0.attn_norm.weight": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "blk.0.attn_q.weight": ("Q6_K", (4, 256), random_blocks("Q6_K", 4)),
    "ids": ("I8", (3,), bytes(3)),
    "none": ("Q4_K", (0, 256), b""),
    "scalar": ("F16", (), bytes(2)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.gguf", TENSORS, [("general.architecture", "llama")])
    return tmp_path


def run(*arguments, device="reference"):
    return main.main(["convert", *map(str, arguments), "--device", device])


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "model.gguf")


def assert_holds(arrays, path, dtype):
    with nd.open(path) as model:
        assert set(arrays) == set(model.tensors)
        for name, found in arrays.items():
            tensor = model.tensors[name]
            expected = nd.dequantize(model.read(name), tensor.format, dtype, shape=tensor.shape, device="reference")
            expected = np.asarray(expected)
            if expected.dtype.kind == "i":
                np.testing.assert_array_equal(found, expected)
            else:
                assert_same_bits(found, expected)


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


def test_a_work_folder_that_another_process_removes_at_once(folder, monkeypatch):
    """Before it is locked: another one is made."""
    real, removed = new_files._is_locked, []

    def remove_first(handle):
        if not removed:
            removed.extend(path for path in folder.iterdir() if new_files.WORK_NAME.fullmatch(path.name))
            new_files.shutil.rmtree(removed[0])
        return real(handle)

    monkeypatch.setattr(new_files, "_is_locked", remove_first)
    assert run("model.gguf", "m.safetensors") == 0
    assert len(removed) == 1
    assert files(folder) == ["m.safetensors"]


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


@pytest.mark.parametrize("existing", ["m.safetensors", "m.safetensors.index.json", "m-00002-of-00002.safetensors"])
def test_nothing_is_overwritten_unless_forced(folder, capsys, existing):
    """Also a file that a program would load instead of the new ones."""
    (folder / existing).write_text("mine")
    arguments = ["model.gguf", "m.safetensors", "--dtype", "fp32", "--shard-size", "10.2KB"]
    assert run(*arguments) == 2
    assert f"{existing} exists; pass --force to replace it" in capsys.readouterr().err
    assert files(folder) == [existing]
    assert (folder / existing).read_text() == "mine"
    assert run(*arguments, "--force") == 0
    assert files(folder) == [f"m-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["m.safetensors.index.json"]


def test_the_source_is_not_overwritten(folder, capsys):
    (folder / "model.gguf").rename(folder / "m.safetensors")
    before = (folder / "m.safetensors").read_bytes()
    assert run("m.safetensors", "m.safetensors", "--force") == 2
    assert "m.safetensors is the file to convert" in capsys.readouterr().err
    assert (folder / "m.safetensors").read_bytes() == before


def test_a_disk_that_is_too_small(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    assert run("model.gguf", "m.safetensors") == 2
    message = "m.safetensors: 7,183 bytes are needed, and 99 are free; free some space, or write to another disk"
    assert capsys.readouterr().err == f"numba-dequant: {message}\n"
    assert files(folder) == []


def test_a_disk_that_becomes_full(folder, capsys, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(new_files.os, "fsync", fail)
    assert run("model.gguf", "m.safetensors") == 2
    message = "m.safetensors: No space left on device; free some space, or write to another disk"
    assert capsys.readouterr().err == f"numba-dequant: {message}\n"
    assert files(folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of file sizes")
def test_a_system_that_refuses_to_write_more(folder, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        status = run("model.gguf", "m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "m.safetensors: File too large; pass a smaller --shard-size" in capsys.readouterr().err
    assert files(folder) == []


def test_a_file_that_is_damaged_halfway(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert, "SLICE_BYTES", 512)
    real = safetensors_format.header

    def cut(shard, metadata):
        os.truncate("model.gguf", 3000)
        return real(shard, metadata)

    monkeypatch.setattr(safetensors_format, "header", cut)
    assert run("model.gguf", "m.safetensors") == 2
    assert capsys.readouterr().err.startswith("numba-dequant: model.gguf: ")
    assert files(folder) == []


def test_an_interrupt_leaves_nothing(folder, capsys, monkeypatch):
    def interrupt(shards):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_format, "index", interrupt)
    assert run("model.gguf", "m.safetensors", "--shard-size", "5KB") == main.INTERRUPTED
    assert files(folder) == []


def test_a_move_that_fails_takes_back_the_others(folder, capsys, monkeypatch):
    real = os.replace

    def replace(source, target):
        if target.endswith(".json"):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(new_files.os, "replace", replace)
    assert run("model.gguf", "m.safetensors", "--shard-size", "5KB") == 2
    assert "Permission denied; write to another folder" in capsys.readouterr().err
    assert files(folder) == []


KILLED = """
import os, signal, sys
from numba_dequant.cli import convert, main, new_files
convert.SLICE_BYTES, moment = 512, sys.argv[1]
calls = []

def killing(real, count):
    def call(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call

if moment == "while writing":
    convert._write_shard = killing(convert._write_shard, 2)
elif moment == "before the end of a file":
    os.fsync = killing(os.fsync, 1)
elif moment == "before the first move":
    os.replace = killing(os.replace, 1)
elif moment == "before the last move":
    os.replace = killing(os.replace, 3)
options = ["--dtype", "fp32", "--shard-size", "10.2KB", "--device", "reference"]
main.main(["convert", "model.gguf", "m.safetensors", *options])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    "moment", ["while writing", "before the end of a file", "before the first move", "before the last move"]
)
def test_killed_halfway(folder, moment):
    """No name of a model is there that a program would load, and the next run works and leaves nothing else."""
    found = subprocess.run([sys.executable, "-c", KILLED, moment], check=False)
    assert found.returncode == -signal.SIGKILL
    left = [name for name in files(folder) if not new_files.WORK_NAME.fullmatch(name)]
    complete = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert left == (complete if moment == "before the last move" else [])
    assert len(files(folder)) == len(left) + 1
    assert run("model.gguf", "m.safetensors", "--force") == 0
    assert files(folder) == [*left, "m.safetensors"]
    assert_holds(safetensors_bytes.read(folder / "m.safetensors")[1], "model.gguf", "bfloat16")


def test_a_run_at_the_same_time_is_not_disturbed(folder):
    with new_files.NewFiles(".") as first:
        with first.writing("a.safetensors") as file:
            file.write(b"a")
        assert run("model.gguf", "m.safetensors") == 0
        first.publish(["a.safetensors"], [])
    assert files(folder) == ["a.safetensors", "m.safetensors"]


def test_foreign_files_are_not_taken_for_leftovers(folder):
    theirs = folder / f".numba_dequant-convert-{'0' * 16}"
    theirs.mkdir()  # another process has just made it, and has not locked it yet
    (folder / f".numba_dequant-convert-{'1' * 16}").symlink_to(theirs)
    (folder / f".numba_dequant-convert-{'2' * 16}").write_text("a file")
    assert run("model.gguf", "m.safetensors") == 0
    assert len(files(folder)) == 4
    os.utime(theirs, (1, 1))
    assert run("model.gguf", "m.safetensors", "--force") == 0
    assert not theirs.exists()
    assert len(files(folder)) == 3


MEASURED = """
from numba_dequant.cli import convert, main
convert.SLICE_BYTES = 1 << 20

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

before = peak()
assert main.main(["convert", "large.gguf", "m.safetensors", "--dtype", "float16"]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor(folder):
    header = gguf([("w", (1, 50_000_000), "F16", b"")])
    with open("large.gguf", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 100_000_000)
    found = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(found.stdout.splitlines()[-1]) < 50_000_000
