"""Does the package work with the programs that read GGUF files? Tests it with the versions below.

    python tests/programs.py                        # 3 GB of downloads the first time
    python tests/programs.py --torch-index https://download.pytorch.org/whl/cpu     # less: PyTorch without CUDA
    python tests/programs.py --folder environments -- -k lora       # where they are kept, and arguments of pytest

The environment is kept in the user's cache directory, and made anew when the table of versions changes. `uv` makes it
if there is one, otherwise `venv` and `pip`. No GPU is needed. Nothing is downloaded while the tests run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tests/pytorch", "tests/programs")

VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "diffusers": "0.42.1",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "ray": "2.60.0",
    "gguf": "0.19.0",
    "safetensors": "0.8.0",
    "sentencepiece": "0.2.3",
    "protobuf": "7.36.2",
}
"""The programs, and what they need to read GGUF files."""

TOOLS = ("pytest", "pytest-benchmark", "hypothesis")


def cache_folder() -> Path:
    """Where the user keeps what can be made again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "numba_dequant" / "programs"


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def uv() -> str | None:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else shutil.which("uv")


def make(environment: Path, requirements: list[str], torch_index: str | None) -> None:
    """An environment with these packages, and with those that the package itself needs."""
    shutil.rmtree(environment, ignore_errors=True)
    found, python = uv(), str(python_in(environment))
    if found:
        create = [found, "venv", "--python", sys.executable, str(environment)]
        install = [found, "pip", "install", "--python", python]
    else:
        create = [sys.executable, "-m", "venv", str(environment)]
        install = [python, "-m", "pip", "install"]
    if torch_index:
        install += ["--extra-index-url", torch_index, *(["--index-strategy", "unsafe-best-match"] if found else [])]
    for command in (create, [*install, *requirements, "-e", str(ROOT)]):
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"programs.py could not make {environment}; see above. The command was: {' '.join(command)}")


def environment_in(folder: Path, torch_index: str | None) -> Path:
    """The environment in that folder; it is made if it is not there or holds other versions."""
    requirements = [*(f"{name}=={version}" for name, version in VERSIONS.items()), *TOOLS]
    wanted = json.dumps([sys.version, str(ROOT), torch_index, requirements])
    environment = folder / hashlib.sha256(wanted.encode()).hexdigest()[:12]
    mark = environment / "complete.json"
    if not mark.exists():
        make(environment, requirements, torch_index)
        mark.write_text(wanted, encoding="utf-8")
    return environment


def main() -> int:
    """Run the tests; the exit status is that of pytest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="where environments are kept")
    parser.add_argument("--torch-index", metavar="URL", help="where to look for PyTorch as well")
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="for pytest, after --")
    options = parser.parse_args()
    environment = environment_in(options.folder, options.torch_index)
    folders = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    command = [str(python_in(environment)), "-m", "pytest", *folders, *options.pytest]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
