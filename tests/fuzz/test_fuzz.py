"""A short run of each target: its corpus, and new inputs that are the same each time. The README has the long run."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import fuzz
import gguf
import pytest
import specification
import targets

import numba_dequant as nd

HERE = Path(__file__).parent

# New inputs, and words that the outcomes of these contain.
SHORT = {
    "header": (2000, ["opened", "refused"]),
    "files": (3000, ["opened", "refused"]),
    "shards": (500, ["opened", "refused"]),
    "strings": (3000, ["all", "end"]),
    "arrays": (100, ["opened", "refused"]),
    "selection": (600, ["loaded", "refused"]),
    "loads": (300, ["loaded", "changed", "refused"]),
    "batches": (600, ["values", "refused"]),
    "products": (800, ["values", "refused"]),
    "plans": (400, ["loaded", "planned", "refused"]),
    "readers": (300, ["opened", "refused"]),
    "commands": (120, ["'info' 0", "'info' 2", "'show' 2", "'verify' 0", "'cache' 0"]),
    "operators": (600, ["values", "refused", "out of range"]),
    "modules": (300, ["file", "module", "refused"]),
}


def inputs(name, count):
    """The corpus, and inputs made of it."""
    corpus = [path.read_bytes() for path in sorted((HERE / "corpus" / name).glob("*"))]
    if name in ("header", "files"):
        assert corpus
    chance = random.Random(name)
    return [*corpus, *(fuzz.mutated(corpus, chance) for _ in range(count))]


@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_finds_no_fault(name):
    if name not in targets.TARGETS:
        pytest.skip("needs PyTorch")
    count, expected = SHORT[name]
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in inputs(name, count):
            try:
                outcomes.add(targets.TARGETS[name](data))
            except Exception as error:
                raise AssertionError(f"{name}: the input {data!r} leads to {type(error).__name__}: {error}") from error
    for word in expected:
        assert any(word in outcome for outcome in outcomes), (word, outcomes)


def test_the_specification_has_the_sizes_of_ggml():
    """gguf-py has them as a table of its own, which is wrong for Q8_1: GGML's block has 36 bytes."""
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    assert sizes.items() <= specification.BLOCKS.items()
    assert {fmt.ggml_id: (fmt.block_size, fmt.type_size) for fmt in nd.FORMATS.values()} == {
        kind: specification.BLOCKS[kind] for kind in (fmt.ggml_id for fmt in nd.FORMATS.values())
    }


def run(*arguments):
    command = [sys.executable, str(HERE / "fuzz.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_a_fault_ends_in_a_file_and_a_traceback(tmp_path, monkeypatch, capsys):
    def wrong(data):
        raise KeyError(data)

    session = fuzz.Session(wrong, 1, tmp_path / "faults")
    for data in (b"one", b"two"):
        session.execute(data)
    assert [path.read_bytes() for path in (tmp_path / "faults").iterdir()] == [b"one"]
    assert "KeyError at test_fuzz.py" in capsys.readouterr().out
    assert "2 executions" in session.summary()
    assert "KeyError" in session.summary()


def test_the_command_of_a_long_run(tmp_path):
    found = run("strings", "--plain", "--seconds", "1", "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "faults none" in found.stdout
    found = run("header", "--replay", str(HERE / "corpus" / "header"), "--out", str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr
    assert not any(tmp_path.iterdir())
