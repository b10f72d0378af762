"""From what `doctor` has found to sentences: what works, what does not, and the command that mends it."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from numba_dequant import disk_cache

Facts = dict[str, Any]

OK, OFF, FAULT, SKIPPED = "ok", "off", "fault", "skipped"
"""It works; it is not there, which is no fault; it does not work; it was not tried, because of a fault before it."""

NOT_STARTED, NOT_TRIED = "not started", "not tried"
"""In place of the type of an error: the process could not be started, or it ended before this step."""

DRIVERS = "https://www.nvidia.com/drivers"

NEWEST_NUMPY = re.compile(r"Numba needs NumPy (\d+)\.(\d+) or less\. Got NumPy [0-9.]*\d")
"""What Numba says if NumPy is too new for it."""

OF_PACKAGES = ("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError")
"""Types of errors that come from packages that do not go together."""

OLDEST_CUDA = 12000
"""The CUDA version of the oldest driver that the packages of an extra support."""

OLDEST_OF_CUDA_13 = (7, 5)
"""The least compute capability that CUDA 13 supports."""

DRIVER_ERRORS = {
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (
        "the driver was updated, and its old part is still running",
        "sudo reboot",
    ),
    "CUDA_ERROR_SYSTEM_NOT_READY": (
        "the driver waits for the fabric manager of this machine",
        "sudo systemctl start nvidia-fabricmanager",
    ),
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": (
        "a driver library for data centers was found before that of the driver",
        "unset LD_LIBRARY_PATH",
    ),
    "CUDA_ERROR_UNKNOWN": (
        "the driver does not start, perhaps because the machine was suspended",
        "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm",
    ),
    "CUDA_ERROR_NO_DEVICE": ("the driver finds no GPU", "sudo nvidia-modprobe -u -c 0"),
}
"""By error of the driver, a sentence and a command."""


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: what was tried.
        status: one of `OK`, `OFF`, `FAULT`, `SKIPPED`.
        message: what works, or what is wrong.
        mend: the command, or the address of the page, that mends it; None if there is nothing to mend.
    """

    name: str
    status: str
    message: str
    mend: str | None = None


def diagnose(facts: Facts) -> list[Check]:
    """The checks, in the order in which they are shown.

    Args:
        facts: "packages" (name -> version), "environment", "is_container", "has_gpu" (None if that is not known), and
            for each step of `probes` what it has found.
    """
    if facts["cpu"].get("type") == NOT_STARTED:
        return [
            Check("Python", FAULT, f"nothing could be tried: {facts['cpu']['error']}", "python -m numba_dequant doctor")
        ]
    driver = _driver(facts)
    packages = _packages(facts, driver)
    toolkit = _toolkit(facts, packages)
    return [_cpu(facts), _cache(facts), driver, packages, toolkit, *_gpus(facts, driver, packages, toolkit)]


def _cpu(facts: Facts) -> Check:
    found = facts["cpu"]
    if found.get("is_disabled"):
        return Check("CPU", OFF, "NUMBA_DISABLE_JIT is set, so the slow reference computes", unset("NUMBA_DISABLE_JIT"))
    message = found.get("error") or found.get("problem")
    if message is None:
        return Check("CPU", OK, "a kernel was compiled, and its values are those of the reference")
    if match := NEWEST_NUMPY.search(message):
        reason = f"Numba cannot be imported: {match[0]}"
        return Check("CPU", FAULT, reason, f'pip install "numpy<{match[1]}.{int(match[2]) + 1}"')
    if found.get("type") == "ModuleNotFoundError" and (missing := re.search(r"No module named '(\w+)", message)):
        return Check("CPU", FAULT, f"{missing[1]} is not installed", f"pip install {missing[1]}")
    if found.get("type") == "DeviceError":
        return Check("CPU", FAULT, f"the CPU computes wrong values: {message}", "pip install --upgrade numba llvmlite")
    return Check("CPU", FAULT, message, "pip install --force-reinstall numba llvmlite")


def _cache(facts: Facts) -> Check:
    found, folder = facts["cache"], str(facts["cache"].get("directory", ""))
    problem = found.get("error") or found.get("problem")
    if problem is None and found.get("is_kept"):
        return Check("cache", OK, f"compiled code is kept in {folder}")
    if problem is None:
        message = f"compiled code cannot be written to {folder}; perhaps the disk is full"
        return Check("cache", FAULT, message, "numba-dequant cache --clear")
    if "others may write to it" in problem:
        return Check("cache", FAULT, problem, f"chmod go-w {shlex.quote(folder)}")
    variable = disk_cache.VARIABLE
    new_folder = (
        f"setx {variable} %TEMP%\\numba_dequant" if sys.platform == "win32" else f"export {variable}=$(mktemp -d)"
    )
    return Check("cache", FAULT, problem, new_folder)


def _driver(facts: Facts) -> Check:
    found, cuda = facts["driver"], facts["driver"].get("cuda", 0)
    if "error" in found:
        return Check("driver", FAULT, found["error"], reboot())
    if sys.platform == "darwin":
        return Check("driver", OFF, "there is no CUDA on macOS; the CPU computes")
    if not cuda:
        return _no_driver(facts)
    name = f"driver {found['driver']}" if found.get("driver") else "the driver"
    newest = f"{cuda // 1000}.{cuda % 1000 // 10}"
    if cuda < OLDEST_CUDA:
        message = f"{name} is too old: it supports CUDA {newest}, and CUDA {OLDEST_CUDA // 1000} is needed"
        return Check("driver", FAULT, message, DRIVERS)
    major = cuda_of_packages(facts)
    if major is not None and cuda // 1000 < major:
        message = (
            f"{name} is too old for the installed packages: it supports CUDA {newest}, and they are for CUDA {major}"
        )
        return Check("driver", FAULT, message, 'pip install "numba_dequant[cu12]"')
    return Check("driver", OK, f"{name} supports CUDA {newest}")


def _no_driver(facts: Facts) -> Check:
    if facts["has_gpu"] is None:
        message = (
            "no NVIDIA driver was found; if the machine has an NVIDIA GPU, install its driver (for WSL, in Windows)"
        )
        return Check("driver", OFF, message, DRIVERS)
    if not facts["has_gpu"]:
        return Check("driver", OFF, "no NVIDIA driver was found; the CPU computes")
    if facts["is_container"]:
        message = "the machine has an NVIDIA GPU, and this container was started without it"
        return Check("driver", OFF, message, "docker run --gpus all ...")
    return Check("driver", FAULT, "the machine has an NVIDIA GPU, and no NVIDIA driver was found", DRIVERS)


def _packages(facts: Facts, driver: Check) -> Check:
    found = facts["gpu_packages"]
    name, install = "packages", install_command(facts)
    if "error" in found:
        return _broken_packages(facts, found)
    if found.get("is_simulated"):
        return Check(
            name, OFF, "NUMBA_ENABLE_CUDASIM is set, so a simulator replaces the GPU", unset("NUMBA_ENABLE_CUDASIM")
        )
    missing = " and ".join(found["missing"])
    if not missing:
        return Check(name, OK, "numba-cuda and cuda-core can be imported")
    verb = "is" if len(found["missing"]) == 1 else "are"
    if driver.status == OFF:
        return Check(name, OFF, f"{missing} {verb} not installed; only a GPU needs them")
    return Check(name, FAULT, f"{missing} {verb} not installed", install)


def _broken_packages(facts: Facts, found: Facts) -> Check:
    if found["type"] == NOT_TRIED:
        return Check("packages", SKIPPED, "not tried")
    if NEWEST_NUMPY.search(found["error"]):
        return Check("packages", SKIPPED, "not tried, because Numba cannot be imported")
    names = [each for each in ("numba-cuda", "numba", "numpy") if each in facts["packages"]]
    versions = ", ".join(f"{each} {facts['packages'][each]}" for each in names)
    message = f"{versions} do not work together: {found['error']}"
    return Check("packages", FAULT, message, "pip install --upgrade numba-cuda")


def _toolkit(facts: Facts, packages: Check) -> Check:
    if packages.status != OK:
        return Check("toolkit", OFF if packages.status == OFF else SKIPPED, "not tried")
    found = facts["toolkit"]
    message = found.get("error") or found.get("problem")
    if message is None:
        return Check("toolkit", OK, "a kernel was compiled")
    message = message.partition("; run: ")[0]
    names = ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12")
    there = [each for each in names if each in facts["packages"]]
    # A package that is installed and does not work is not mended by installing it.
    mend = f"pip install --force-reinstall --no-deps {' '.join(there)}" if len(there) > 1 else install_command(facts)
    return Check("toolkit", FAULT, message, mend)


def _gpus(facts: Facts, driver: Check, packages: Check, toolkit: Check) -> list[Check]:
    before = (driver, packages, toolkit)
    if any(check.status != OK for check in before):
        is_fault = any(check.status in (FAULT, SKIPPED) for check in before) and driver.status != OFF
        return [Check("GPU", SKIPPED if is_fault else OFF, "not tried" if is_fault else "no GPU is used")]
    found = facts["gpus"]
    if "error" in found:
        return [_no_gpu(facts, found)]
    return [_gpu(facts, each) for each in found["gpus"]]


def _no_gpu(facts: Facts, found: Facts) -> Check:
    message = found["error"]
    if found.get("type") in OF_PACKAGES:
        return Check("GPU", FAULT, message, upgrade_command(facts))
    if "no NVIDIA driver was found" in message:
        return Check("GPU", FAULT, "cuda-bindings needs a newer driver", DRIVERS)
    hidden = facts["environment"].get("CUDA_VISIBLE_DEVICES")
    if "CUDA_ERROR_NO_DEVICE" in message and hidden is not None:
        reason = f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides every GPU"
        return Check("GPU", FAULT, reason, unset("CUDA_VISIBLE_DEVICES"))
    if "CUDA_ERROR_NO_DEVICE" in message and facts["is_container"]:
        return Check("GPU", FAULT, "this container was started without a GPU", "docker run --gpus all ...")
    for name, (reason, mend) in DRIVER_ERRORS.items():
        if f"({name})" in message:
            return Check("GPU", FAULT, f"{reason} ({name})", mend)
    return Check("GPU", FAULT, message, reboot())


def _gpu(facts: Facts, found: Facts) -> Check:
    capability = found.get("capability")
    name = f"GPU {found['device']}"
    title = f"{found.get('name', 'a GPU')}"
    if capability is not None:
        title += f", compute capability {capability[0]}.{capability[1]}"
    if "error" not in found:
        return Check(name, OK, f"{title}: a kernel ran, and its values are those of the reference")
    message = f"{title}: {found['error']}"
    if capability is not None and tuple(capability) < OLDEST_OF_CUDA_13 and (cuda_of_packages(facts) or 0) >= 13:
        return Check(name, FAULT, f"{title}: CUDA 13 does not support it", 'pip install "numba_dequant[cu12]"')
    if "memory" in message:
        return Check(name, FAULT, message, "nvidia-smi")  # it names the programs that use it
    if "cannot compile" in message or "are wrong" in message or found.get("type") in OF_PACKAGES:
        return Check(name, FAULT, message, upgrade_command(facts))
    return Check(name, FAULT, message, reboot())


def cuda_of_packages(facts: Facts) -> int | None:
    """The CUDA version that the installed packages are for, or None."""
    match = re.match(r"\d+", str(facts["packages"].get("cuda-bindings", "")))
    return int(match[0]) if match else None


def install_command(facts: Facts) -> str:
    """The command that installs the packages of a GPU, for the driver of the machine."""
    is_12 = 0 < facts["driver"].get("cuda", 0) < 13000
    return f'pip install "numba_dequant[{"cu12" if is_12 else "cu13"}]"'


def upgrade_command(facts: Facts) -> str:
    """The command that brings the packages of a GPU to their newest versions."""
    return install_command(facts).replace("install", "install --upgrade", 1)


def unset(variable: str) -> str:
    """The command that unsets a variable."""
    return f"set {variable}=" if sys.platform == "win32" else f"unset {variable}"


def reboot() -> str:
    """The command that starts the machine again."""
    return "shutdown /r" if sys.platform == "win32" else "sudo reboot"
