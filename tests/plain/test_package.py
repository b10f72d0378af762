"""What is published: the wheel, and the workflows that make it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def wheels(tmp_path):
    """Two wheels, built at different times from copies in different folders."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77")
    command = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    found = []
    for name in ("first", "second"):
        copy = tmp_path / name
        copy.mkdir()
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, copy)
        shutil.copytree(ROOT / "numba_dequant", copy / "numba_dequant", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "numba_dequant" / "__init__.py").touch()
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        out = subprocess.run(
            [sys.executable, "-c", command, copy],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not out.returncode, out.stderr
        found.append(copy / out.stdout.split()[-1])
    return found


def test_two_builds_are_equal_and_hold_the_package_alone(wheels):
    first, second = (sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert first == second
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = set(wheel.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "numba_dequant").rglob("*") if path.suffix == ".py"
    }
    data = {"numba_dequant/py.typed", "numba_dequant/sample/sample.gguf"}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == tracked | data
    assert {name.partition("/")[2] for name in about} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip


@pytest.mark.skipif(not WORKFLOWS, reason="the workflows are not part of a source distribution")
def test_actions_are_pinned_and_may_only_read():
    for path in WORKFLOWS:
        text = path.read_text()
        assert re.search(r"^permissions: \{\}$", text, re.MULTILINE), path
        for action in re.findall(r"uses: (.*)", text):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action), f"{path}: {action}"
        granted = re.findall(r"^\s+(\w[\w-]*): (read|write|none)$", text, re.MULTILINE)
        assert set(granted) <= {("contents", "read")}, path
        # Text of a pull request must not become a part of a command.
        assert not re.search(r"run:.*\$\{\{ *github\.(event|head_ref)", text), path
