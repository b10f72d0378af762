"""`numba-dequant doctor`: what it finds in machines that lack something, and what it says."""

import sys

import pytest
from healthy_machine import HEALTHY, NO_HOME, diagnosed

from numba_dequant.cli import diagnosis

NO_GPU = {"driver": {"cuda": 0, "driver": None}, "has_gpu": False, "gpus": {"error": "no NVIDIA driver was found"}}


def test_a_machine_in_which_everything_works():
    found = diagnosed()
    assert {check.status for check in found.values()} == {diagnosis.OK}
    assert all(check.mend is None for check in found.values())
    assert found["GPU cuda:0"].message.startswith("NVIDIA H100, compute capability 9.0: a kernel ran")


def test_a_machine_without_a_gpu_has_no_fault():
    for packages in ([], ["numba-cuda", "cuda-core"]):
        found = diagnosed(NO_GPU, {"gpu_packages": {"missing": packages, "is_simulated": False}})
        assert found["driver"] == diagnosis.Check("driver", "off", "no NVIDIA driver was found; the CPU computes")
        assert found["GPU"].status == diagnosis.OFF
        assert diagnosis.FAULT not in {check.status for check in found.values()}


@pytest.mark.skipif(sys.platform == "darwin", reason="there is no CUDA here")
def test_a_machine_that_may_have_a_gpu_has_no_fault():
    found = diagnosed(NO_GPU, {"has_gpu": None})
    assert found["driver"].message.endswith(
        "if the machine has an NVIDIA GPU, install its driver (for WSL, in Windows)"
    )
    assert found["driver"].mend == DRIVERS
    assert diagnosis.FAULT not in {check.status for check in found.values()}


def test_a_container_without_the_gpu_of_its_machine_has_no_fault():
    found = diagnosed(NO_GPU, {"has_gpu": True, "is_container": True})
    assert found["driver"].message == "the machine has an NVIDIA GPU, and this container was started without it"
    assert found["driver"].mend == "docker run --gpus all ..."
    assert diagnosis.FAULT not in {check.status for check in found.values()}


def broken(step, message, kind="RuntimeError"):
    return {step: {"error": message, "type": kind}}


LOCKED = "/c is not used: others may write to it (mode 0777); set NUMBA_DEQUANT_CACHE_DIR to a folder that only you may"
OLD = {"driver": {"cuda": 11040, "driver": "470.57"}}
CUDA_12 = {"driver": {"cuda": 12040, "driver": "550.54"}}
NVVM = "pip install --force-reinstall --no-deps nvidia-nvvm nvidia-nvjitlink"
CU12, CU13 = (f'pip install "numba_dequant[{each}]"' for each in ("cu12", "cu13"))
DRIVERS = "https://www.nvidia.com/drivers"
FAULTS = {
    "Numba and NumPy": (
        [
            {"cpu": {"problem": "x (Numba needs NumPy 2.4 or less. Got NumPy 2.5.)"}},
            broken("gpu_packages", "Numba needs NumPy 2.4 or less. Got NumPy 2.5."),
        ],
        "CPU",
        "Numba cannot be imported: Numba needs NumPy 2.4 or less. Got NumPy 2.5",
        'pip install "numpy<2.5"',
    ),
    "Numba": (
        [broken("cpu", "No module named 'llvmlite'")],
        "CPU",
        "llvmlite",
        "pip install --force-reinstall numba llvmlite",
    ),
    "a dependency": (
        [broken("cpu", "No module named 'tqdm'", "ModuleNotFoundError")],
        "CPU",
        "tqdm is not installed",
        "pip install tqdm",
    ),
    "wrong values": (
        [broken("cpu", "1 of 4 elements are wrong", "DeviceError")],
        "CPU",
        "wrong values",
        "pip install --upgrade numba llvmlite",
    ),
    "a crash": ([broken("cpu", "the process was ended by SIGSEGV", "ended")], "CPU", "SIGSEGV", "pip install --force-"),
    "no home": ([{"cache": {"problem": NO_HOME}}], "cache", "no home directory", "export NUMBA_DEQUANT_CACHE_DIR=$("),
    "modes": (
        [{"cache": {"problem": LOCKED, "directory": "/my c"}}],
        "cache",
        "others may write",
        "chmod go-w '/my c'",
    ),
    "a full disk": (
        [{"cache": {"problem": None, "directory": "/c", "is_kept": False}}],
        "cache",
        "perhaps the disk is full",
        "numba-dequant cache --clear",
    ),
    "no driver": ([NO_GPU, {"has_gpu": True}], "driver", "has an NVIDIA GPU, and no NVIDIA driver", DRIVERS),
    "an old driver": ([OLD], "driver", "driver 470.57 is too old: it supports CUDA 11.4, and CUDA 12", DRIVERS),
    "a driver for CUDA 12": ([CUDA_12], "driver", "it supports CUDA 12.4, and they are for CUDA 13", CU12),
    "a driver that hangs": (
        [broken("driver", "it did not end within 240 seconds", "ended")],
        "driver",
        "did not end",
        "sudo reboot",
    ),
    "no packages": (
        [{"gpu_packages": {"missing": ["numba-cuda"], "is_simulated": False}}],
        "packages",
        "numba-cuda is not installed",
        CU13,
    ),
    "no packages for CUDA 12": (
        [CUDA_12, {"packages": {}, "gpu_packages": {"missing": ["numba-cuda", "cuda-core"], "is_simulated": False}}],
        "packages",
        "numba-cuda and cuda-core are not installed",
        CU12,
    ),
    "numba-cuda and NumPy": (
        [broken("gpu_packages", "module 'numpy' has no attribute 'row_stack'", "AttributeError")],
        "packages",
        "numba-cuda 0.30.4, numba 0.68.1, numpy 2.4.6 do not work together: module 'numpy'",
        "pip install --upgrade numba-cuda",
    ),
    "no NVVM": (
        [{"toolkit": {"problem": "the CUDA toolkit is incomplete (libnvvm.so is missing); run: pip install x"}}],
        "toolkit",
        "the CUDA toolkit is incomplete (libnvvm.so is missing)",
        NVVM,
    ),
    "no toolkit": (
        [{"packages": {}, "toolkit": {"problem": "the CUDA toolkit is incomplete"}}],
        "toolkit",
        "incomplete",
        CU13,
    ),
    "hidden": (
        [
            {
                "gpus": {"error": "no GPU can be used (CUDA_ERROR_NO_DEVICE)"},
                "environment": {"CUDA_VISIBLE_DEVICES": "\x1b"},
            }
        ],
        "GPU",
        r"CUDA_VISIBLE_DEVICES is '\x1b', which hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "a container with a driver": (
        [{"gpus": {"error": "no GPU can be used (CUDA_ERROR_NO_DEVICE)"}, "is_container": True}],
        "GPU",
        "started without a GPU",
        "docker run --gpus all ...",
    ),
    "an updated driver": (
        [{"gpus": {"error": "no GPU can be used (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)"}}],
        "GPU",
        "the driver was updated",
        "sudo reboot",
    ),
    "a package that lacks something": (
        [{"gpus": {"error": "cannot import name 'x'", "type": "ImportError"}}],
        "GPU",
        "cannot import name 'x'",
        'pip install --upgrade "numba_dequant[cu13]"',
    ),
    "a driver that lacks something": (
        [{"gpus": {"error": "no NVIDIA driver was found", "type": "DeviceError"}}],
        "GPU",
        "cuda-bindings needs a newer driver",
        DRIVERS,
    ),
    "another error": ([{"gpus": {"error": "the process was ended by SIGABRT"}}], "GPU", "SIGABRT", "sudo reboot"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are those of other systems")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_a_sentence_and_a_command(name):
    changes, place, message, mend = FAULTS[name]
    found = diagnosed(*changes)
    assert found[place].status == diagnosis.FAULT
    assert message in found[place].message
    assert found[place].mend.startswith(mend)
    assert [check.name for check in found.values() if check.status == diagnosis.FAULT] == [place]


@pytest.mark.parametrize(
    ("error", "capability", "mend"),
    [
        ("cannot compile", [7, 0], CU12),
        ("the CUDA toolkit cannot compile sm90", [9, 0], 'pip install --upgrade "numba_dequant[cu13]"'),
        ("cuda:0 is out of memory", [9, 0], "nvidia-smi"),
        ("the CUDA driver returned CUDA_ERROR_ECC_UNCORRECTABLE", None, "sudo reboot"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are those of other systems")
def test_a_gpu_that_does_not_work(error, capability, mend):
    gpus = [
        {"device": "cuda:0", "capability": capability, "error": error},
        HEALTHY["gpus"]["gpus"][0] | {"device": "cuda:1"},
    ]
    found = diagnosed({"gpus": {"gpus": gpus}})
    assert (found["GPU cuda:0"].status, found["GPU cuda:0"].mend) == (diagnosis.FAULT, mend)
    assert found["GPU cuda:1"].status == diagnosis.OK


@pytest.mark.parametrize(
    ("change", "place", "variable"),
    [
        ({"cpu": {"is_disabled": True}}, "CPU", "NUMBA_DISABLE_JIT"),
        ({"gpu_packages": {"missing": [], "is_simulated": True}}, "packages", "NUMBA_ENABLE_CUDASIM"),
    ],
)
def test_what_the_user_has_switched_off_is_no_fault(change, place, variable):
    found = diagnosed(NO_GPU, change)
    assert found[place].status == diagnosis.OFF
    assert found[place].mend.endswith((variable, f"{variable}="))
    assert diagnosis.FAULT not in {check.status for check in found.values()}
