"""The processes of `numba-dequant doctor`: packages, drivers and caches that do not work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from healthy_machine import HEALTHY, NO_HOME, diagnosed

import numba_dequant as nd
from numba_dequant import disk_cache
from numba_dequant.backends import devices
from numba_dequant.cli import diagnosis, doctor, main, probes
from numba_dequant.kernels import compiler


@pytest.mark.long
def test_here(capsys, monkeypatch):
    """The real thing, whatever this machine has."""
    status = main.main(["doctor", "--json"])
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert shown.isascii()
    checks = {check["name"]: check for check in found["checks"]}
    assert status == (0 if found["works"] else 1)
    assert checks["CPU"]["status"] == checks["cache"]["status"] == "ok", checks
    assert found["packages"]["numpy"]
    assert found["numba_dequant"] == nd.__version__
    assert not [name for name in disk_cache.entries() if name.startswith("doctor")]
    if devices.why_no_cuda() is None:
        assert checks["GPU cuda:0"]["status"] == "ok"
    elif compiler.why_no_toolkit() is None:
        assert checks["toolkit"]["status"] == "ok"
    # The same facts, for people.
    monkeypatch.setattr(doctor, "_facts", lambda: {**found, "environment": {"CUDA_X": "\x1b[2J", "CUDA_Y": 300 * "y"}})
    assert main.main(["doctor"]) == status
    shown = capsys.readouterr().out
    assert shown.replace("\n", "").isprintable()
    assert "CUDA_X=\\x1b[2J\n" in shown
    assert f"CUDA_Y={100 * 'y'}...\n" in shown
    assert shown.splitlines()[-1] == "No fault." or not found["works"]


def probed(monkeypatch, part):
    monkeypatch.setattr(probes, "PARTS", {part: probes.PARTS[part]})
    return doctor._probed()


BROKEN = {
    "nvvm": """
import cuda.pathfinder
def fail(name):
    raise RuntimeError(f'Failure finding "lib{name}.so":\\n  No such file')
cuda.pathfinder.load_nvidia_dynamic_lib = fail
""",
    "numba.cuda": """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.cuda":
            raise AttributeError("module 'numpy' has no attribute 'row_stack'")
sys.meta_path.insert(0, Finder())
""",
    "numba": """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5.")
sys.meta_path.insert(0, Finder())
""",
}


def break_package(folder, monkeypatch, what):
    """In the processes that are started from now on."""
    (folder / "sitecustomize.py").write_text(BROKEN[what])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.parametrize(
    ("what", "part", "step", "message"),
    [
        pytest.param("nvvm", "gpu", "toolkit", 'incomplete (Failure finding "libnvvm.so":)', marks=pytest.mark.toolkit),
        pytest.param("numba.cuda", "gpu", "gpu_packages", "'numpy' has no attribute", marks=pytest.mark.toolkit),
        ("numba", "cpu", "cpu", "Numba needs NumPy 2.4 or less"),
    ],
)
def test_a_package_that_is_broken(tmp_path, monkeypatch, what, part, step, message):
    break_package(tmp_path, monkeypatch, what)
    found = probed(monkeypatch, part)
    assert message in (found[step].get("error") or found[step]["problem"])
    assert set(found) == set(probes.PARTS[part])


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    gcc = shutil.which("gcc")
    if sys.platform != "linux" or gcc is None:
        pytest.skip("needs Linux and gcc")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[1] / "support" / "fake_driver.c"
    subprocess.run([gcc, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    shutil.copy(folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")
    return str(folder)


@pytest.mark.parametrize(
    ("what", "message", "mend"),
    [
        ("11040", r"driver 470.57\x1b[2J is too old: it supports CUDA 11.4", diagnosis.DRIVERS),
        ("hangs", "it did not end within 2 seconds", "sudo reboot"),
        ("crashes", "the process was ended by SIGABRT", "sudo reboot"),
    ],
)
def test_a_driver_that_does_not_work(fake_driver, monkeypatch, capsys, what, message, mend):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")  # without it, kernels are compiled, too
    monkeypatch.setenv("LD_LIBRARY_PATH", fake_driver)
    monkeypatch.setenv("FAKE_DRIVER", what)
    monkeypatch.setattr(doctor, "SECONDS", {"gpu": 2 if what == "hangs" else 60})
    found = probed(monkeypatch, "gpu")
    monkeypatch.setattr(doctor, "_probed", lambda: {**HEALTHY, **found})
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    assert main.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 fault."
    at = next(number for number, line in enumerate(lines) if line.startswith("fault    driver"))
    assert message in lines[at]
    assert lines[at + 1].strip() in (f"run: {mend}", f"see: {mend}")


def cached(monkeypatch, folder):
    monkeypatch.setenv(disk_cache.VARIABLE, str(folder))
    return probes._cache()


def test_a_cache(tmp_path, monkeypatch):
    assert cached(monkeypatch, tmp_path / "new") == {
        "problem": None, "directory": str(tmp_path / "new"), "entries": 0, "bytes": 0, "is_kept": True,
    }  # fmt: skip
    assert list((tmp_path / "new").iterdir()) == []


def test_a_cache_that_is_read_only(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere
        monkeypatch.setattr(disk_cache.os, "access", lambda path, mode: False)
    assert "it cannot be written" in cached(monkeypatch, folder)["problem"]


def test_a_cache_on_a_full_disk(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", fail)
    assert cached(monkeypatch, tmp_path)["is_kept"] is False
    assert list(tmp_path.iterdir()) == []


def test_no_home(monkeypatch):
    monkeypatch.delenv(disk_cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(disk_cache.sys, "platform", "linux")
    monkeypatch.setenv("HOME", "nowhere")
    found = probes._cache()
    assert found == {"problem": NO_HOME}
    assert diagnosed({"cache": found})["cache"].status == diagnosis.FAULT


@pytest.mark.parametrize("executable", ["", "/none/python"])
def test_no_python_to_start(monkeypatch, executable):
    monkeypatch.setattr(doctor.sys, "executable", executable)
    monkeypatch.setenv("PATH", "")
    found = probed(monkeypatch, "cpu")
    [check] = diagnosed(found).values()
    assert check.status == diagnosis.FAULT
    assert "cannot be started: No such file" in check.message
    assert check.mend == "python -m numba_dequant doctor"


def test_metadata_that_is_damaged(monkeypatch):
    def damaged(name):
        raise KeyError("Version")

    monkeypatch.setattr(doctor, "version", damaged)
    assert doctor._versions()["numpy"] == "unknown (KeyError)"
