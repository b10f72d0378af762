import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from blocks import random_blocks, write_model
from measured import assert_measured

import numba_dequant as nd
from numba_dequant import verify
from numba_dequant.backends import devices
from numba_dequant.cli import main
from numba_dequant.cli.verify import SAMPLE as SAMPLE_PATH

SAMPLE = str(SAMPLE_PATH)


def run(*arguments, **options):
    command = [sys.executable, "-W", "error", "-m", "numba_dequant", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_the_sample_holds_every_format():
    assert {tensor.format.name for tensor in nd.open(SAMPLE).tensors.values()} == set(nd.FORMATS)


def test_verify_without_a_file():
    found = run("verify", "--device", "cpu")
    assert found.returncode == 0, found.stderr
    assert "on cpu" in found.stdout
    assert "Every bit agrees" in found.stdout
    lines = {line.split()[0]: line for line in found.stdout.splitlines()[2:-1]}
    assert set(lines) == set(nd.FORMATS)
    assert all(line.endswith("exact") for line in lines.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_verify_other_types(dtype, capsys):
    assert main.main(["verify", "--device", "cpu", "--dtype", dtype]) == 0
    assert dtype in capsys.readouterr().out


def test_verify_says_which_device_and_why(capsys, monkeypatch):
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "no GPU, says the test")
    assert main.main(["verify"]) == 0
    assert "on cpu (no GPU, says the test)" in capsys.readouterr().out


def test_verify_finds_a_wrong_bit(tmp_path, capsys, monkeypatch):
    path = write_model(tmp_path / "m.gguf", {"w": ("Q8_0", (4, 64), random_blocks("Q8_0", 8))})
    right = verify.dequantize

    def wrong(data, fmt, dtype, *, shape=None, device=None):
        values = right(data, fmt, dtype, shape=shape, device=device)
        if device == "cpu" and values.ndim == 2:
            values[3, 7] += 1
        return values

    monkeypatch.setattr(verify, "dequantize", wrong)
    assert main.main(["verify", str(path), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "1 differ, by up to" in shown
    assert "DIFFERENT from the reference: Q8_0" in shown


@pytest.mark.parametrize(
    ("found", "expected", "count", "worst"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0.0),
        ([1.0, 2.5], [1.0, 2.0], 1, 0.5),
        ([0.0, 2.0], [-0.0, 2.0], 1, 0.0),
        ([np.nan, 2.0], [np.nan, 2.0], 0, 0.0),
        ([np.nan, 2.0], [1.0, 2.0], 1, np.inf),
    ],
    ids=["same", "value", "sign of zero", "both NaN", "one NaN"],
)
def test_difference(found, expected, count, worst):
    assert verify.count_mismatches(np.array(found, np.float16), np.array(expected, np.float16)) == (count, worst)


def test_info(tmp_path):
    path = write_model(
        tmp_path / "m.gguf", {"a.weight": ("Q4_K", (3, 512), random_blocks("Q4_K", 6))}, [("general.name", "x" * 100)]
    )
    found = run("info", str(path))
    assert found.returncode == 0, found.stderr
    assert "general.name" in found.stdout
    assert "a.weight  Q4_K    3 x 512    864" in found.stdout


def test_info_does_not_let_a_file_steer_the_terminal(tmp_path):
    path = write_model(tmp_path / "m.gguf", {"a\x1b[2J": ("F32", (1,), bytes(4))}, [("k\x1b]0;x\x07", "\x1b[31m")])
    found = run("info", str(path))
    assert found.returncode == 0
    assert "\x1b" not in found.stdout


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_missing_file(command, tmp_path):
    found = run(command, str(tmp_path / "none.gguf"))
    assert found.returncode == 2
    assert found.stderr.strip() == f"numba-dequant: {tmp_path / 'none.gguf'}: No such file or directory"


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_file_that_is_not_gguf(command, tmp_path):
    (tmp_path / "x.gguf").write_text("hello")
    found = run(command, str(tmp_path / "x.gguf"))
    assert found.returncode == 2
    assert "this is not a GGUF file" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_reader_that_leaves():
    process = subprocess.Popen(
        [sys.executable, "-m", "numba_dequant", "info", SAMPLE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert error == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "numba_dequant", "info", SAMPLE],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.strip() == "numba-dequant: No space left on device"


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["info", "--help"], ["--version"]])
def test_help(arguments):
    found = run(*arguments)
    assert found.returncode == 0
    assert found.stdout


def test_no_command():
    assert run().returncode == 2


@pytest.mark.parametrize("what", ["none.gguf", "./none", "folder/none.bin", "dangling", "folder", "Q4_K/"])
def test_show_of_a_file_that_is_none(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkdir("Q4_K")
    os.symlink("nowhere", "dangling")
    assert main.main(["show", what]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"numba-dequant: {what}: ")
    assert "format" not in shown
    assert main.main(["show", "Q4_K"]) == 0  # a folder of that name is none of a model


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--device", ""],
        ["verify", "--device", "cuda:٣x"],
        ["show", SAMPLE, ""],
        ["show", SAMPLE, "--block", "9" * 5000],
        ["show", SAMPLE, "--block", "9" * 50],
        ["show", SAMPLE, "--element", "-1"],
        ["show", "Q4_K", "--element", "9" * 50],
        ["bench", "--device", "cpu", "--formats", ""],
        ["bench", "--device", "cpu", "--formats", "Q8_0,"],
        ["bench", "--device", "cpu", "--formats", "I8"],
        ["warm", "--cpu", "--formats", "I8"],
        ["warm", "--arch", "sm_" + "9" * 5000],
        ["warm", "--arch", "sm_٩٠"],
        ["warm", "--arch", ""],
        ["info", ""],
        ["info", os.devnull],
        ["nothing"],
        [],
    ],
    ids=lambda arguments: " ".join(each[:20] for each in arguments) or "none",
)
def test_wrong_arguments_have_status_2_and_no_traceback(arguments, capsys):
    assert main.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "numba-dequant" in shown.err
    assert "Traceback" not in shown.err


def test_an_unknown_device():
    found = run("verify", "--device", "tpu")
    assert found.returncode == 2
    assert "unknown device 'tpu'" in found.stderr


def test_the_command_is_installed():
    command = shutil.which("numba-dequant", path=os.path.dirname(sys.executable))
    if command is None:
        pytest.skip("the package is not installed")
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
        .stdout.strip()
        .endswith(nd.__version__)
    )


def test_bench(capsys, monkeypatch):
    from numba_dequant.cli import bench

    monkeypatch.setattr(bench, "CPU_ELEMENTS", 1 << 16)
    assert main.main(["bench", "--device", "cpu", "--formats", "Q8_0,IQ2_XXS", "--dtype", "bfloat16"]) == 0
    assert_measured(capsys.readouterr().out, "bfloat16", ["Q8_0", "IQ2_XXS"])


def test_bench_refuses_a_wrong_result(capsys, monkeypatch):
    from numba_dequant.cli import bench

    monkeypatch.setattr(bench, "CPU_ELEMENTS", 1 << 10)
    monkeypatch.setitem(nd.FORMATS["Q8_0"].__dict__, "dequantize", lambda blocks: np.ones((len(blocks), 32), "f4"))
    assert main.main(["bench", "--device", "cpu", "--formats", "Q8_0"]) == 2
    assert "of 1,024 elements of Q8_0 to float16 are wrong" in capsys.readouterr().err


def test_bench_of_the_reference(capsys):
    assert main.main(["bench", "--device", "reference"]) == 2
    assert "bench cannot measure reference; pass --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "text"), [(0.0, "·" * 40), (0.5, "█" * 20 + "·" * 20), (1.2, "█" * 40)])
def test_bar(share, text):
    from numba_dequant.cli import bench

    assert bench.bar(share) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "hopper"], "unknown architecture 'hopper'; pass a name such as sm_90"),
        (["--cpu", "--formats", "Q4_J"], "unknown format 'Q4_J'"),
        ([], "no GPU, says the test; pass --arch or --cpu"),
    ],
    ids=["arch", "format", "nothing"],
)
def test_warm_for_nothing(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "no GPU, says the test")
    assert main.main(["warm", *arguments]) == 2
    assert message in capsys.readouterr().err
