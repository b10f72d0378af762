"""`numba-dequant completion`: the scripts, run by the shells that are installed."""

import contextlib
import io
import os
import shutil
import subprocess

import pytest

import numba_dequant as nd
from numba_dequant.cli import completion, main
from numba_dequant.dtypes import NAMES


def script(shell):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main.main(["completion", shell]) == 0
    return out.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "a b $(x) *.gguf", "c.txt", "d.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    for shell in completion.SCRIPTS:
        (tmp_path / f".{shell}").write_text(script(shell))
    return tmp_path


def run(shell, code, *arguments):
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    environment = os.environ | {"HOME": os.getcwd(), "XDG_CONFIG_HOME": os.getcwd(), "XDG_DATA_HOME": os.getcwd()}
    found = subprocess.run(
        [path, *options, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return found.stdout.splitlines()


IN_BASH = """
. ./.bash
COMP_WORDS=("$@") COMP_CWORD=$(( $# - 1 ))
_numba_dequant
[ ${#COMPREPLY[@]} -eq 0 ] || printf '%s\\n' "${COMPREPLY[@]}"
"""


def in_bash(*words):
    return run("bash", IN_BASH, "bash", "numba-dequant", *words)


GGUF = ["a.gguf", "a b $(x) *.gguf"]
CASES = [
    (("",), [*main.COMMANDS, "--help", "--version"]),
    (("co",), ["convert", "completion"]),
    (("info", ""), ["folder", *GGUF]),
    (("info", "a b"), GGUF[1:]),
    (("info", "--"), ["--help", "--json"]),
    (("convert", ""), ["folder", *GGUF, "c.txt", "d.safetensors"]),
    (("convert", "--dtype", ""), list(NAMES)),
    (("convert", "--dtype", "b"), ["bfloat16"]),
    (("convert", "--select", ""), []),
    (("show", "IQ1"), ["IQ1_S", "IQ1_M"]),
    (("bench", "--formats", "Q4_K,IQ4"), ["Q4_K,IQ4_NL", "Q4_K,IQ4_XS"]),
    (("bench", "--formats", "Q6"), ["Q6_K"]),
    (("verify", "--device", "c"), ["cpu", "cuda"]),
    (("warm", "--arch", "sm_9"), ["sm_90"]),
    (("completion", ""), ["bash", "zsh", "fish"]),
    (("none", ""), []),
]


@pytest.mark.parametrize(("words", "expected"), CASES, ids=lambda each: " ".join(each)[:30])
def test_bash(folder, words, expected):
    found = in_bash(*words)
    assert {name for name in found if not name.startswith(".")} == set(expected)  # the scripts are files, too


def test_zsh_accepts_the_script(folder):
    run("zsh", "autoload -U compinit; compinit -u -d ./dump; . ./.zsh; whence -w _numba_dequant")


def in_fish(text):
    code = f"source .fish; complete -C {completion._fish_text(f'numba-dequant {text}')}"
    return [line.partition("\t")[0] for line in run("fish", code)]


@pytest.mark.parametrize("number", [1, 4, 7, 9, 10, 12, 14])
def test_fish(folder, number):
    """It suggests more: all files, and what only contains the word."""
    words, expected = CASES[number]
    assert set(expected) <= set(in_fish(" ".join(words)))


def test_every_argument_is_known():
    """A new metavar needs a line in `known_values`."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(["completion", "bash"]) == 0
    assert completion.known_values()["A,B"].words == tuple(name for name, fmt in nd.FORMATS.items() if fmt.decode)


def test_an_unknown_shell(capsys):
    assert main.main(["completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
