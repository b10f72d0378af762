"""Run the tests with the package as it is installed: `python tests/installed.py -q`, with arguments for pytest.

The tests, the notebooks and pyproject.toml, which configures pytest, are copied to a temporary folder and run there.
The source of the package is not, so Python finds the installed one. Tests of the repository itself are left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("tests", "notebooks", "pyproject.toml")
OF_THE_REPOSITORY = ("plain/test_docs.py", "plain/test_layers.py", "plain/test_package.py", "plain/test_readme.py")
"""Tests that read pages, workflows, results or source."""
WHERE = "import numba_dequant; print(numba_dequant.__file__)"


def main(arguments: list[str]) -> int:
    """Run them; the exit status is that of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder)
        for name in OF_THE_REPOSITORY:
            (Path(folder) / "tests" / name).unlink()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        where = subprocess.check_output([sys.executable, "-c", WHERE], cwd=folder, env=environment, text=True).strip()
        if Path(where).parent == ROOT / "numba_dequant":
            sys.exit(f"{where} is the source: install the wheel, without -e")
        print(where, flush=True)
        command = [sys.executable, "-m", "pytest", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
