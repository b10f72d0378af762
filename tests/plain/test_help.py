"""The examples of `--help` and of docs/command-line.md, and what they say of commands."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import random_blocks, write_model
from healthy_machine import HEALTHY

from numba_dequant import disk_cache
from numba_dequant.cli import bench, common, doctor, main, warm

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"

TENSORS = {
    "blk.0.attn_q.weight": ("Q4_K", (4, 256), random_blocks("Q4_K", 4)),
    "output.weight": ("F16", (3, 32), bytes(192)),
}


def parsers():
    [commands] = [each for each in main.command_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return commands.choices


def in_help():
    return [
        line.strip()
        for parser in (main.command_parser(), *parsers().values())
        for line in re.findall("^  numba-dequant .*", parser.epilog, re.MULTILINE)
    ]


def on_page():
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


STATUS = {"diff": 1}
"""Of the examples, which compare two files that differ."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "CPU_ELEMENTS", 1 << 12)
    monkeypatch.setattr(bench, "GPU_ELEMENTS", 1 << 20)
    write_model(tmp_path / "model.gguf", TENSORS, [("general.name", "a model")])
    write_model(tmp_path / "other.gguf", TENSORS, [("general.name", "another model")])


@pytest.mark.parametrize("example", sorted({*in_help(), *on_page()}))
def test_an_example(example, folder, tmp_path, monkeypatch, capsys):
    program, command, *options = shlex.split(example, comments=True)
    assert program == "numba-dequant"
    if "--arch" in options:  # compiling takes long, and other tests do it
        monkeypatch.setattr(warm, "compile_all", lambda tasks: [True] * len(tasks))
    if command == "cache":
        monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "cache"))  # the other tests need theirs
    if example == "numba-dequant verify":
        options = ["--device", "reference"]  # other tests compile all formats
    if command == "doctor":  # it has tests of its own
        monkeypatch.setattr(doctor, "_probed", lambda: HEALTHY)
    status = 0 if "--help" in options else STATUS.get(command, 0)
    assert main.main([command, *options]) == status, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", list(parsers()))
def test_the_help_of_a_command(name, capsys):
    assert main.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"  numba-dequant {name}" in shown
    assert "\n  0    done\n" in shown
    assert ("\n  1    " in shown) == (name in ("verify", "diff", "doctor"))
    assert max(map(len, shown.splitlines())) < 130


def test_the_page_has_every_command_and_every_status():
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"^## `(\w+)`", text, re.MULTILINE)) == set(parsers())
    in_table = re.findall(r"^\| (\d+) \| (.*?) \|$", text, re.MULTILINE)
    assert [(number, meaning) for number, meaning in in_table] == re.findall(
        r"^  (\d+) +(.*)$", main.EXIT_STATUS, re.MULTILINE
    )


def test_a_command_does_not_wait_for_the_others():
    code = "import sys; from numba_dequant.cli import main; main.main(['show', 'Q4_K']); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = found.stdout.splitlines()[-1].split()
    assert {name for name in main.COMMANDS if f"numba_dequant.cli.{name}" in imported} == {"show"}
    assert not {"tqdm", "numba", "llvmlite", "ml_dtypes"} & set(imported)


def test_a_command_is_added_with_its_examples():
    parser = argparse.ArgumentParser()
    added = common.add_command(
        parser.add_subparsers(), "x", lambda options: 5, help="h", description="word " * 50, examples=("x y",)
    )
    shown = added.format_help()
    assert "examples:\n  numba-dequant x y\n\nexit status:\n  0    done\n  2    " in shown
    assert max(map(len, shown.splitlines())) <= max(shutil.get_terminal_size().columns, 80)
    assert parser.parse_args(["x"]).run(None) == 5
