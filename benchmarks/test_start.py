"""Start times. Warm: a new process with cached kernels. Cold: compiling them, which needs no GPU."""

import json
import os
import statistics
import subprocess
import sys

import pytest
from conftest import QUANTIZED

import numba_dequant as nd
from numba_dequant import disk_cache

FIRST_CALL = """
import json, time
marks = {}
last = time.perf_counter()
def mark(name):
    global last
    now = time.perf_counter()
    marks[name] = 1e3 * (now - last)
    last = time.perf_counter()
import numpy
mark("import numpy")
import numba_dequant as nd
mark("import numba_dequant")
from numba_dequant.backends.gpu import gpu_at
from numba_dequant.kernels import compiler
mark("import cuda.core")
gpu = gpu_at(0)
with gpu.active():
    gpu.capability
    mark("driver and context")
    gpu.load_kernel(compiler.dequantize_kernel(nd.FORMATS["Q4_K"], "float16"))
    mark("kernel load")
    gpu.allocate(1 << 22, 0)
    mark("memory pool")
data = numpy.arange(144 * 7281).astype(numpy.uint8)
last = time.perf_counter()
tensor = nd.dequantize(data, "Q4_K", device="cuda")
gpu.synchronize(0)
mark("first call")
tensor = nd.dequantize(data, "Q4_K", device="cuda")
gpu.synchronize(0)
mark("second call")
print(json.dumps(marks))
"""


FIRST_VALUE = """
import numpy, numba_dequant as nd
data = numpy.arange(144 * 7281).astype(numpy.uint8)
print(nd.dequantize(data, "Q4_K", device="cuda").copy_to_host()[0], flush=True)
"""


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path))
    return tmp_path


def test_warm_start(benchmark, gpu, empty_cache):
    """A whole process that dequantizes 1 MiB of Q4_K; its parts in ms."""
    found = []

    def start():
        output = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True).stdout
        found.append(json.loads(output))

    start()
    del found[:]
    benchmark.pedantic(start, rounds=7)
    benchmark.extra_info |= {part: statistics.median(each[part] for each in found) for part in found[0]}


def test_first_value(benchmark, gpu, empty_cache):
    """From the start of a process until the first value of 1 MiB of Q4_K is printed, as for an installed package."""
    # A package that pip has installed has compiled modules.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    processes = []

    def start():
        processes.append(subprocess.Popen([sys.executable, "-c", FIRST_VALUE], stdout=subprocess.PIPE, env=environment))
        assert processes[-1].stdout.readline().strip()

    def end():
        while processes:
            with processes.pop() as process:
                pass
            assert process.returncode == 0

    start()
    benchmark.pedantic(start, setup=end, rounds=15)
    end()


@pytest.mark.parametrize("name", QUANTIZED)
def test_compile(benchmark, empty_cache, name):
    """One kernel without a cache, in a process that has compiled before."""
    from numba_dequant.kernels import compiler

    if not benchmark.enabled and name != "Q4_K":
        pytest.skip("one is enough where nothing is measured")
    compiler.function_ptx(lambda data, number, out: None, (9, 0))
    code = benchmark.pedantic(compiler.cubin, (compiler.dequantize_kernel(nd.FORMATS[name], "float16"), (9, 0)))[1]
    assert code.startswith(b"\x7fELF")
    assert len(list(empty_cache.iterdir())) == 1


def test_compile_all(benchmark, empty_cache):
    """A new process that compiles the kernels of all formats, for one tensor and for many, to FP16."""
    command = [sys.executable, "-m", "numba_dequant", "warm", "--arch", "sm_90"]
    if not benchmark.enabled:
        command += ["--formats", "Q4_K"]
    benchmark.pedantic(subprocess.run, (command,), {"check": True, "capture_output": True, "env": dict(os.environ)})
    kernels = [name for name in disk_cache.entries() if name.startswith("sm90-")]
    n_formats = sum(source.decode is not None for source in nd.FORMATS.values()) if benchmark.enabled else 1
    assert len(kernels) == 2 * n_formats
    benchmark.extra_info["kernels"] = len(kernels)
