"""The driver starts while Python imports what a GPU needs."""

import subprocess
import sys
import textwrap

import pytest

from numba_dequant.backends import driver_start
from numba_dequant.backends.driver_start import DriverStart
from numba_dequant.locks import compile_lock


class Driver:
    """Records calls; `refuses` is the function that fails."""

    def __init__(self, refuses=None):
        self.refuses, self.calls = refuses, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *(each for each in arguments if isinstance(each, int))))
            return 100 if name == self.refuses else 0

        return call


STEPS = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAllocAsync", "cuMemFreeAsync"]


@pytest.mark.parametrize("refuses", [None, *STEPS])
def test_it_starts_the_driver_one_context_and_its_memory(monkeypatch, refuses):
    driver = Driver(refuses)
    monkeypatch.setattr(driver_start, "driver_library", lambda: driver)
    monkeypatch.setattr(driver_start, "why_no_gpu_packages", lambda: None)
    with DriverStart(3):
        assert compile_lock.locked(), "a fork waits"
    assert [name for name, *_ in driver.calls] == STEPS[: STEPS.index(refuses) + 1 if refuses else None]
    assert driver.calls[:2] == [("cuInit", 0), ("cuDeviceGet", 3)][: len(driver.calls)]
    assert not compile_lock.locked()


def test_it_does_nothing_without_the_packages(monkeypatch):
    monkeypatch.setattr(driver_start, "driver_library", lambda: pytest.fail("started"))
    monkeypatch.setattr(driver_start, "why_no_gpu_packages", lambda: "numba-cuda cannot be imported")
    with DriverStart(0):
        pass


def test_it_hides_no_error_of_the_block(monkeypatch):
    def library():
        raise OSError("no driver")

    monkeypatch.setattr(driver_start, "driver_library", library)
    monkeypatch.setattr(driver_start, "why_no_gpu_packages", lambda: None)
    with pytest.raises(KeyError), DriverStart(0):
        raise KeyError
    assert not compile_lock.locked()


def test_only_the_first_call_for_a_gpu_starts_it():
    code = """
        import warnings
        from numba_dequant.backends import devices
        started = []
        class Start:
            def __init__(self, index):
                started.append(index)
            def __enter__(self):
                pass
            def __exit__(self, *error):
                pass
        devices.DriverStart = Start
        devices.why_no_cuda = lambda: None
        assert devices.parse_device("cpu").kind == "cpu" and not started
        assert str(devices.parse_device("cuda:1")) == "cuda:1" and started == [1]
        import sys
        sys.modules["numba_dequant.backends.gpu"] = None  # imported by now
        devices.parse_device("cuda"), devices.parse_device(None)
        assert started == [1]
    """
    environment = {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
