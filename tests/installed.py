"""Run the tests with the package as it is installed: `python tests/installed.py -q`, with arguments for pytest.

The repository is copied to a temporary folder without the source of the package, so Python finds the installed one.
Tests that read the source are left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", ".github", "benchmarks", "changelog.d", "docs", "notebooks", "tests")
NAMES_THE_SOURCE = 'ROOT / "numba_dequant"'
WHERE = "import numba_dequant; print(numba_dequant.__file__)"


def copy_without_source(target: Path) -> None:
    """Copy the repository, without the package and the tests that read its source."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    for path in (target / "tests").rglob("test_*.py"):
        if NAMES_THE_SOURCE in path.read_text("utf-8"):
            path.unlink()


def main(arguments: list[str]) -> int:
    """Run them; the exit status is that of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        copy_without_source(Path(folder))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        where = subprocess.check_output([sys.executable, "-c", WHERE], cwd=folder, env=environment, text=True).strip()
        if Path(where).parent == ROOT / "numba_dequant":
            sys.exit(f"{where} is the source: install the wheel, without -e")
        print(where, flush=True)
        command = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
