"""The program of mutation tests. Its long run is no part of the tests."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "mutation"
SOURCE = ROOT / "numba_dequant"

SAMPLE = '''"""A module."""

import os

LIMIT = 8


def grown(value, by=1):
    """Not a mutant: "a" < "b"."""
    if value >= LIMIT and by:
        raise ValueError(f"{value + 1} is too large")
    return value + by
'''
EXPECTED = [
    ("", "LIMIT = 8 => LIMIT = 9"),
    ("", "LIMIT = 8 => LIMIT = 7"),
    ("", "value, by=1 => value, by=2"),
    ("", "value, by=1 => value, by=0"),
    ("grown", "value >= LIMIT and by => not (value >= LIMIT and by)"),
    ("grown", "value >= LIMIT and by => value >= LIMIT or by"),
    ("grown", "value >= LIMIT and by => by"),
    ("grown", "value >= LIMIT and by => value >= LIMIT"),
    ("grown", "value >= LIMIT and by => value > LIMIT and by"),
    ("grown", "value >= LIMIT and by => value < LIMIT and by"),
    ("grown", "raise ValueError(f'{value + 1} is too large') => pass"),
    ("grown", "return value + by => return"),
    ("grown", "return value + by => return value - by"),
]
TEST = """
import pytest
from numba_dequant.sample import grown


def test_it_grows():
    assert grown(3) == 4


def test_it_ends():
    with pytest.raises(ValueError):
        grown(8)
    assert grown(8, 0) == 8
"""


@pytest.fixture
def program(monkeypatch):
    """Imports a module of the program."""
    monkeypatch.syspath_prepend(str(PROGRAM))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(PROGRAM) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_the_mutants_of_a_source(program):
    found = program("mutants").mutants(SAMPLE)
    assert [(each.function, each.text) for each in found] == EXPECTED
    assert [each.number for each in found] == list(range(len(EXPECTED)))
    assert [each.name for each in found] == ["LIMIT", "LIMIT", "grown", "grown", *[None] * 9]


def test_a_mutant_changes_one_line_and_no_number_of_a_line(program):
    lines = SAMPLE.splitlines()
    for each in program("mutants").mutants(SAMPLE):
        changed = each.apply(SAMPLE).splitlines()
        assert [number for number, line in enumerate(changed) if line != lines[number]] == [each.line - 1]
        compile("\n".join(changed), "sample.py", "exec")


def test_the_same_change_twice_in_a_function_has_two_texts(program):
    found = program("mutants").mutants("def f(x):\n    use(x + 1)\n    use(x + 1)\n")
    texts = [each.text for each in found]
    assert "use(x + 1) => use(x - 1)" in texts
    assert "use(x + 1) => use(x - 1) #2" in texts


def test_what_numpy_takes_for_the_same_is_no_mutant(program):
    found = program("mutants").mutants("def f(x):\n    x.reshape(-1, 8)\n    x.find(-1)\n")
    texts = [each.text for each in found]
    assert "x.reshape(-1, 8) => x.reshape(-2, 8)" not in texts
    assert "x.reshape(-1, 8) => x.reshape(-1, 9)" in texts
    assert "x.find(-1) => x.find(-2)" in texts


def test_what_is_argued_is_a_mutant_and_has_a_reason(program):
    pytest.importorskip("tomllib")
    mutants, modules = program("mutants").mutants, {}
    for (module, function, text), reason in program("argued").entries().items():
        if module not in modules:
            modules[module] = {
                (each.function, each.text) for each in mutants((SOURCE.parent / module).read_text("utf-8"))
            }
        assert (function, text) in modules[module], f"{module}: no mutant of {function!r} is {text!r}"
        assert reason.endswith(".")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and their memory is limited")
def test_a_run_finds_what_no_test_notices(tmp_path):
    """Nothing notices another limit or another default of 1: the value at the limit is refused, and one far below."""
    pytest.importorskip("tomllib")
    shutil.copytree(PROGRAM, tmp_path / "tests" / "mutation", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "mutation" / "argued.toml").write_text(
        '[[argued]]\nmodule = "numba_dequant/sample.py"\nfunction = ""\nreason = "Any."\n'
        'mutants = ["LIMIT = 8 => LIMIT = 7"]\n'
    )
    (tmp_path / "tests" / "plain").mkdir()
    (tmp_path / "tests" / "plain" / "test_sample.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "numba_dequant").mkdir()
    (tmp_path / "numba_dequant" / "__init__.py").write_text("")
    (tmp_path / "numba_dequant" / "sample.py").write_text(SAMPLE + "    print('never')\n")
    command = [
        sys.executable,
        "tests/mutation/run.py",
        "numba_dequant/sample.py",
        "--tests",
        "tests/plain/test_sample.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines[1:-3] == [
        "numba_dequant/sample.py:13 13 grown: print('never') => pass no test executes it",
    ], done.stdout + done.stderr
    assert lines[-1].startswith("| `numba_dequant/sample.py` | 14 | 12 | 1 | 1 | 92.3 % | ")
    assert done.returncode == 1
    assert (tmp_path / "numba_dequant" / "sample.py").read_text() == SAMPLE + "    print('never')\n"
