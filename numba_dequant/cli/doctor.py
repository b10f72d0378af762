"""`numba-dequant doctor`: what works on this machine."""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from numba_dequant import disk_cache, display
from numba_dequant.backends.devices import available_cores
from numba_dequant.cli import diagnosis, json_text, probes
from numba_dequant.cli.colour import painted
from numba_dequant.cli.common import add_command
from numba_dequant.cli.diagnosis import FAULT, OFF, OK, SKIPPED
from numba_dequant.version import VERSION

PACKAGES = (
    "numpy", "numba", "llvmlite", "ml_dtypes", "tqdm",
    "numba-cuda", "cuda-core", "cuda-bindings", "cuda-pathfinder",
    "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12",
    "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-cccl", "nvidia-cuda-cccl-cu12",
    "torch", "cupy-cuda12x", "cupy-cuda13x", "gguf", "transformers", "diffusers", "vllm", "safetensors",
)  # fmt: skip
"""Packages whose versions matter."""

VARIABLES = ("NUMBA_", "CUDA_", "NVIDIA_", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "PYTHONPATH")
"""The beginnings of environment variables that matter."""

LONGEST = 100
"""Characters of a variable that are shown; `--json` has them all."""

SECONDS = {"cpu": 120, "cache": 30, "gpu": 240}
"""Seconds that the process of each part of `probes` may take. They run at the same time."""

COLOURS = {OK: "green", OFF: "yellow", FAULT: "red", SKIPPED: "yellow"}

START = "import sys; sys.path[:] = sys.argv[2:]; from numba_dequant.cli import probes; probes.answer(sys.argv[1])"
"""The code of a process. It imports the package from where this process has it."""


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "doctor",
        run,
        help="find out what works on this machine",
        description="Try what this package needs: compile a kernel for the CPU and for a GPU, compare the values with "
        "the reference, and use the cache. For each thing that does not work, show what is wrong and the command that "
        f"mends it. A machine without a GPU has no fault. It takes some seconds, at most {max(SECONDS.values())}. "
        "Please add the output of --json to a bug report; it has paths and environment variables of this machine.",
        examples=("doctor", "doctor --json"),
        status_1="something does not work",
    )
    parser.add_argument("--json", action="store_true", help="show everything as JSON, for a bug report")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    facts = _facts()
    checks = diagnosis.diagnose(facts)
    n_faults = sum(check.status == FAULT for check in checks)
    if options.json:
        listed = [vars(check) for check in checks]
        print(json_text.text({"works": not n_faults, "checks": listed, **facts}, indent=2))
    else:
        _print(facts, checks, n_faults)
    return 1 if n_faults else 0


def _print(facts: dict[str, Any], checks: list[diagnosis.Check], n_faults: int) -> None:
    shown = display.printable
    print(f"numba_dequant {VERSION}, Python {facts['python']}, {shown(facts['system'])}, {facts['cores']} cores")
    print(shown(", ".join(f"{name} {number}" for name, number in facts["packages"].items())))
    for name, value in facts["environment"].items():
        print(shown(f"{name}={value[:LONGEST]}{'...' * (len(value) > LONGEST)}"))
    print()
    width = max(len(check.name) for check in checks)
    for check in checks:
        status = painted(check.status.ljust(len(SKIPPED)), COLOURS[check.status])
        print(f"{status}  {check.name.ljust(width)}  {shown(check.message)}")
        if check.mend is not None:
            verb = "see" if check.mend.startswith("https://") else "run"
            print(f"{' ' * (len(SKIPPED) + width + 4)}{verb}: {painted(shown(check.mend), 'bold')}")
    print()
    faults = "1 fault." if n_faults == 1 else f"{n_faults} faults."
    print(painted(faults, "red") if n_faults else painted("No fault.", "green"))


def _facts() -> dict[str, Any]:
    """What is known of this machine, and what the processes of `probes` have found."""
    found = _probed()
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {
        "numba_dequant": VERSION,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cores": available_cores(),
        "packages": _versions(),
        "environment": variables,
        "is_container": any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))),
        "has_gpu": _has_gpu(),
        **found,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
        except Exception as error:  # what is installed may be damaged
            versions[package] = f"unknown ({type(error).__name__})"
    return versions


def _has_gpu() -> bool | None:
    """Whether a display adapter of NVIDIA is in the machine; None if that is not known."""
    if sys.platform != "linux" or os.path.exists("/dev/dxg"):  # WSL does not show the adapters of Windows
        return None
    for path in glob.glob("/sys/bus/pci/devices/*"):
        with suppress(OSError), open(f"{path}/vendor") as vendor, open(f"{path}/class") as kind:
            if vendor.read().strip() == "0x10de" and kind.read().startswith("0x03"):
                return True
    return False


def _probed() -> dict[str, Any]:
    """What each step of `probes` has found; "error" says why a step has found nothing."""
    found: dict[str, Any] = {}
    processes = {part: _started(part) for part in probes.PARTS}
    start = time.monotonic()
    try:
        for part, process in processes.items():
            lines, end = _ended(process, start + SECONDS[part] - time.monotonic(), SECONDS[part])
            for line in lines:
                with suppress(ValueError, TypeError, KeyError):  # half a line of a process that has crashed
                    step = json.loads(line)
                    found[step.pop("step")] = step
            kind = "ended" if isinstance(process, subprocess.Popen) else diagnosis.NOT_STARTED
            for name in probes.PARTS[part]:
                if name not in found:
                    found[name] = {"error": end, "type": kind}
                    kind = diagnosis.NOT_TRIED
    finally:
        for each in processes.values():
            if isinstance(each, subprocess.Popen) and each.poll() is None:
                each.kill()
                with suppress(subprocess.TimeoutExpired):
                    each.communicate(timeout=1)
    return found


def _started(part: str) -> subprocess.Popen[str] | OSError:
    environment = dict(os.environ)
    if part != "cache":
        # Nothing is read from the cache, so that everything is tried, and nothing is written to it.
        environment[disk_cache.VARIABLE] = os.path.join(os.devnull, "none")
    command = [sys.executable or "python", "-c", START, part, *sys.path]
    try:
        return subprocess.Popen(  # noqa: S603 it runs this package
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return error


def _killed(process: subprocess.Popen[str], late: subprocess.TimeoutExpired) -> str:
    """Kill a process; returns what it has written."""
    process.kill()
    try:
        return process.communicate(timeout=5)[0]
    except subprocess.TimeoutExpired:  # a process that waits for a driver may not even end when it is killed
        text = late.stdout or b""
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _ended(process: subprocess.Popen[str] | OSError, seconds: float, limit: int) -> tuple[list[str], str]:
    """The lines that a process has written, and how it has ended. It is killed if it takes longer."""
    if isinstance(process, OSError):
        return [], f"{sys.executable or 'Python'} cannot be started: {process.strerror}"
    try:
        out, complaints = process.communicate(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired as late:
        return _killed(process, late).splitlines(), f"it did not end within {limit} seconds"
    last = next((line for line in reversed(complaints.splitlines()) if line.strip()), "")
    if process.returncode < 0:
        try:
            name = signal.Signals(-process.returncode).name
        except ValueError:
            name = f"signal {-process.returncode}"
        return out.splitlines(), f"the process was ended by {name}"
    return out.splitlines(), last[:1000] or f"the process ended with status {process.returncode}"
