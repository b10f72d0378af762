"""Fixtures of the benchmarks: the GPU, its clock, and the contents of the results."""

import sys
from dataclasses import dataclass, field

import pytest

import numba_dequant
from numba_dequant import FORMATS
from numba_dequant.backends.devices import is_simulated, why_no_cuda
from numba_dequant.dtypes import NAMES

QUANTIZED = [name for name, source in FORMATS.items() if source.block_size > 1]
DTYPES = list(NAMES)

NO_GPU = "the CUDA simulator is on" if is_simulated() else why_no_cuda()
if NO_GPU is None:
    from cuda.core import Device

    from numba_dequant.backends.gpu import gpu_at
    from numba_dequant.cli import measure


@dataclass
class Gpu:
    """The first GPU, current in this thread."""

    itself: "numba_dequant.backends.gpu.Gpu"
    device: "Device"
    clock: "measure.GpuClock"
    rooflines: dict = field(default_factory=dict)

    def roofline(self, work):
        """Bytes per second of a kernel that only copies the same number of bytes; measured once per workload."""
        key = work.fmt.name, work.dtype, work.n_elements
        if key not in self.rooflines:
            self.rooflines[key] = work.roofline(self.clock)
        return self.rooflines[key]

    def synchronize(self):
        self.itself.synchronize(0)


_gpu = None


def gpu_time():
    """A timer of GPU time for pytest-benchmark, see `measure.GpuClock`."""
    return _gpu.clock()


@pytest.fixture(scope="session")
def _first_gpu():
    global _gpu  # noqa: PLW0603 a timer takes no arguments
    with gpu_at(0).active() as device:
        _gpu = Gpu(gpu_at(0), device, measure.GpuClock(gpu_at(0)))
        yield _gpu


@pytest.fixture
def gpu(request):
    if NO_GPU:
        pytest.skip(f"needs a GPU: {NO_GPU}")
    first = request.getfixturevalue("_first_gpu")
    first.clock.head_start = 1
    return first


def note(benchmark, bytes_moved, roofline=None, **more):
    """Add to a result: GB/s of bytes read and written, the roofline of this run, and the share of it."""
    benchmark.extra_info |= more | {"bytes": bytes_moved}
    if not benchmark.enabled:
        return
    speed = bytes_moved / benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = speed / 1e9
    if roofline:
        benchmark.extra_info |= {"roof GB/s": roofline / 1e9, "share": speed / roofline}


def pytest_benchmark_generate_machine_info(config):
    from numba_dequant.cli.measure import machine

    arguments = [each for each in config.invocation_params.args if not each.startswith("--benchmark-json")]
    command = " ".join(["python -m pytest", *arguments])
    return machine(_gpu.device if _gpu else None) | {"cpu": _processor(), "command": command}


def pytest_benchmark_generate_commit_info(config):
    return {}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Remove what readers of the results do not need."""
    kept = ("median", "q1", "q3", "iqr", "min", "max", "rounds", "iterations")
    for each in output_json["benchmarks"]:
        each["stats"] = {name: each["stats"][name] for name in kept}
        for name in ("options", "fullname", "param"):
            del each[name]


def _processor():
    if sys.platform != "linux":
        return "a CPU"
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "a CPU")
