"""What the benchmarks share: the GPU and its clock, and what goes into the results."""

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
    roofs: dict = field(default_factory=dict)

    def roof(self, work):
        """Bytes per second of a kernel that only moves as many bytes; measured once for such work."""
        key = work.fmt.name, work.dtype, work.n_elements
        if key not in self.roofs:
            self.roofs[key] = work.roof(self.clock)
        return self.roofs[key]

    def synchronize(self):
        self.itself.synchronize(0)


_gpu = None


def gpu_time():
    """A timer for pytest-benchmark: what the GPU takes, see `measure.GpuClock`."""
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
    found = request.getfixturevalue("_first_gpu")
    found.clock.head_start = 1
    return found


def note(benchmark, bytes_moved, roof=None, **more):
    """Add to a result what it means: GB/s of bytes read and written, the roof of this run, and the share of it."""
    benchmark.extra_info |= more | {"bytes": bytes_moved}
    if not benchmark.enabled:
        return
    speed = bytes_moved / benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = speed / 1e9
    if roof:
        benchmark.extra_info |= {"roof GB/s": roof / 1e9, "share": speed / roof}


def pytest_benchmark_generate_machine_info(config):
    from numba_dequant.cli.measure import machine

    arguments = [each for each in config.invocation_params.args if not each.startswith("--benchmark-json")]
    command = " ".join(["python -m pytest", *arguments])
    return machine(_gpu.device if _gpu else None) | {"cpu": _processor(), "command": command}


def pytest_benchmark_generate_commit_info(config):
    return {}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep what a reader of the results needs."""
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
