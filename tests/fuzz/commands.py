"""A target for the command line: odd arguments, and odd files."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import structured
from breaks import broken
from choices import Choices
from common import folder

from numba_dequant.cli import main

WORDS = ["--help", "--version", "-h", "", "-", "--", "--device", "cpu", "reference", "cuda", "cuda:99999", "--dtype"]
WORDS += [
    "float16",
    "float64",
    "--block",
    "--element",
    "0",
    "-1",
    "1",
    "999999999999999999999",
    "1e3",
    "0x10",
    "٣",
    "1_0",
]
WORDS += [
    "Q4_K",
    "q4_k",
    "F32",
    "I8",
    "Q9_9",
    "2",
    "--formats",
    "Q8_0,",
    ",",
    "--cpu",
    "--arch",
    "sm_90",
    "sm_0",
    "sm_999",
]
WORDS += [
    "token_embd.weight",
    "ids",
    "t",
    "*",
    "\0",
    "\x1b[2J",
    "\n",
    "\ud800",
    "\udcff",
    "x" * 5000,
    "%s",
    "{0}",
    "--d",
]
NUMBERS = ["0", "-1", "1", "5", "255", "256", "4294967296", "-99999999999999999999", "²", "0.5", ""]


def written(path: Path, choices: Choices) -> list[str]:
    """Writes a file that breaks a rule, or none; returns the names of its tensors."""
    described = structured.valid(choices)
    if choices.one_in(3):
        broken(choices, described)
    path.write_bytes(described.content())
    return [tensor.name.decode(errors="replace") for tensor in described.tensors]


def arguments(choices: Choices) -> list[str]:
    """Arguments that mostly mean something."""
    path = folder() / "command.gguf"
    names = written(path, choices) or ["none"]
    file = choices.pick([str(path), str(path), str(path), str(path.parent), "/dev/null", "none.gguf", ""])
    name = choices.pick([choices.pick(names), choices.pick(names), choices.pick(structured.NAMES), "no such tensor"])
    way = choices.below(11)
    if way in (0, 1):
        given = ["info", file]
    elif way == 2:
        given = ["verify", file, "--device", choices.pick(["reference", "reference", "cuda:7", "gpu", ""])]
    elif way == 3:
        given = ["show", file, name, "--block", choices.pick(NUMBERS), "--element", choices.pick(NUMBERS)]
    elif way == 4:
        given = ["show", str(path), *choices.some([name], 1), "--element", choices.pick(["0", "1", "31", "255"])]
    elif way == 5:
        given = ["show", choices.pick(["Q4_K", "f32", "IQ1_M", "99", "-3", ""]), "--element", choices.pick(NUMBERS)]
    elif way == 6:
        given = ["info", "--json", str(path)]
    elif way == 7:
        other = folder() / "other.gguf"
        written(other, choices)
        given = ["diff", file, choices.pick([str(other), str(path)]), "--device", "reference"]
        given += ["--select", name] if choices.one_in(3) else []
    elif way == 8:
        out = choices.pick([str(path.parent / "out.safetensors"), str(path.parent / "out.safetensors"), "none", ""])
        given = ["convert", file, out, "--device", "reference", *choices.some(["--force"], 1)]
        given += ["--shard-size", choices.pick(["1", "5KB", "1GB", "0"])] if choices.one_in(2) else []
    elif way == 9:
        given = [choices.pick(["cache", "info", "show", "verify"])]
    else:
        given = [choices.pick(["cache", "info", "show", "verify", "all", "inf"]), *choices.some(WORDS, 4)]
    if choices.one_in(4):
        given.insert(choices.below(len(given) + 1), choices.pick(WORDS))
    if choices.one_in(6):
        del given[choices.below(len(given))]
    # These compile for minutes, measure, or clear the cache that other targets need.
    given = [word for word in given if word not in ("warm", "bench", "doctor", "--clear", "--cpu")]
    return [*given, "--device", "reference"] if "verify" in given and "--device" not in given else given


def commands(data: bytes) -> str:
    """The exit status is one of those of --help, and an error is one line."""
    choices = Choices(data)
    given = arguments(choices)
    encoding, errors = choices.pick(
        [("utf-8", "strict"), ("utf-8", "strict"), ("ascii", "strict"), ("cp1252", "strict")]
    )
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    complaints = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaints):
        status = main.main(given)
        out.flush()
        complaints.flush()
    shown = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    said = complaints.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    # 1 means that verify found a wrong value, or that files differ; others mean a crash.
    assert status in (0, 2) or (status == 1 and given[:1] == ["diff"]), f"{given}: {status}: {said}"
    assert "Traceback" not in said, (given, said)
    has_warnings = "is left out, because the header would be too long" in said
    assert (status < 2) == (not said or has_warnings), (given, status, said)
    if status == 0 and given[:1] == ["info"] and "--json" in given and "--help" not in given and "-h" not in given:
        json.loads(shown, parse_constant=lambda name: 1 / 0)
    lines = said.splitlines()
    assert status != 2 or len([line for line in lines if "numba-dequant" in line]) >= 1, (given, said)
    for text in (shown, said):
        assert all(line.isprintable() for line in text.replace(os.linesep, "\n").split("\n")), (given, text)
    return f"{next(iter(given), '-')[:6]!r} {status}" if given[:1] and given[0] in NAMES else f"other {status}"


NAMES = ("info", "verify", "show", "cache", "diff", "convert")
