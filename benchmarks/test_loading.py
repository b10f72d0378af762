"""Opening and loading models to FP16, on the CPU and on a GPU, compared with alternatives."""

import os
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
from conftest import note

import numba_dequant as nd
from numba_dequant.backends.devices import available_cores
from numba_dequant.verify import assert_bit_identical

SMALL = {"n_layers": 1, "n_vocab": 1024}
"""The reduced model for runs without timing."""

LLAMA = {"cpu": {"n_layers": 8}, "cuda": {"n_layers": 56}}
"""On the CPU, a quarter of the layers, whose values fit in the memory of a small machine. On a GPU, 56 layers, not 32,
which are 8 GB."""

GPU_MODELS = [("Gemma-3-270M", "Q4_K_M"), ("Qwen2.5-0.5B", "Q8_0"), ("Llama-3.1-8B", "Q4_K_M")]


def changes(name, is_timed, device):
    """The sizes in which a model differs from the real one."""
    return SMALL if not is_timed else LLAMA[device] if name.startswith("Llama") else {}


@pytest.fixture(scope="module")
def written(tmp_path_factory, request):
    """A function that writes a model, once."""
    is_timed = request.config.getoption("benchmark_enable")

    def write(name, mix, device="cuda"):
        path = tmp_path_factory.mktemp("models") / f"{name}-{mix}.gguf"
        n_tokens = models.ARCHITECTURES[name].n_vocab if is_timed else 1000
        return models.write(path, models.tensors(name, mix, **changes(name, is_timed, device)), n_tokens)

    return cache(write)


@pytest.fixture(scope="module")
def twin(tmp_path_factory, request):
    """A function that writes a safetensors file of tensors of the same shapes, with FP16 values."""
    is_timed = request.config.getoption("benchmark_enable")

    def write(name):
        path = tmp_path_factory.mktemp("twins") / f"{name}.safetensors"
        return models.write_safetensors(path, models.tensors(name, "Q4_K_M", **changes(name, is_timed, "cuda")))

    return cache(write)


def read_by_gguf_py(path):
    reader = gguf.GGUFReader(path)
    return {each.name: gguf.dequantize(each.data, each.tensor_type).astype(np.float16) for each in reader.tensors}


@pytest.mark.parametrize("way", ["ours", "gguf-py"])
def test_open(benchmark, written, way):
    """A file with a vocabulary of 262 144 tokens."""
    path = written("Gemma-3-270M", "Q4_K_M")
    opened = benchmark.pedantic(
        nd.open if way == "ours" else gguf.GGUFReader, (path,), rounds=20 if way == "ours" else 1
    )
    assert len(opened.tensors) == len(nd.open(path).tensors)


def test_open_split(benchmark, tmp_path):
    """A model in 200 files."""
    content = models.tensors("Llama-3.1-8B", "Q4_K_M", n_embd=256, n_ff=256, n_q=256, n_kv=256, n_vocab=256)
    count = 200
    for number in range(count):
        path = tmp_path / f"model-{number + 1:05}-of-{count:05}.gguf"
        models.write(path, content[number::count], split=(number, count, len(content)))
    opened = benchmark.pedantic(nd.open, (tmp_path / f"model-00001-of-{count:05}.gguf",), rounds=15)
    assert sorted(opened.tensors) == sorted(name for name, _, _ in content)


@pytest.mark.parametrize("mix", models.MIXES)
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_load_cpu(benchmark, written, name, mix):
    """A stream of all tensors, of which none is kept."""
    with nd.open(written(name, mix, "cpu")) as model:

        def walk():
            for _, values in model.stream(device="cpu", progress=False):  # noqa: B007 the last one counts too
                pass
            return values

        last = list(model.tensors)[-1]
        assert_bit_identical(walk(), model.load(last, device="reference"), last)
        benchmark.pedantic(walk, rounds=5, warmup_rounds=1)
        n_bytes = sum(tensor.n_bytes for tensor in model.tensors.values())
        n_elements = sum(tensor.n_elements for tensor in model.tensors.values())
        note(benchmark, n_bytes + 2 * n_elements, file_bytes=n_bytes, threads=available_cores())


def load_pageable(path):
    """Without a loader: copy each tensor from the memory map to the GPU, and launch a kernel."""
    with nd.open(path) as model:
        found = {}
        for name, tensor in model.tensors.items():
            found[name] = nd.dequantize(model.read(name, mmap=True), tensor.format, shape=tensor.shape, device="cuda")
        return found


def load_safetensors(path):
    return pytest.importorskip("safetensors.torch").load_file(path, device="cuda")


def load_gguf_py(path):
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(values).cuda() for name, values in read_by_gguf_py(path).items()}


WAYS = {
    "ours": lambda path: nd.load(path, device="cuda", progress=False),
    "ours, 2 threads": lambda path: nd.load(path, device="cuda", progress=False, threads=2),
    "pageable": load_pageable,
    "safetensors": load_safetensors,
    "gguf-py": load_gguf_py,
}


@pytest.fixture
def bus(gpu):
    """Bytes per second of a copy from pinned memory in this run."""
    pinned, room = gpu.itself.pinned(64 << 20), gpu.itself.allocate(64 << 20, 0)
    # An idle bus is slow at first.
    times = [gpu.clock.seconds(lambda: gpu.itself.copy_to_device(room.pointer, pinned, 0)) for _ in range(3)]
    return pinned.nbytes / min(times)


def sizes(path):
    """Bytes of the tensors in a file, and of their values as FP16."""
    tensors = nd.open(path).tensors.values()
    return sum(tensor.n_bytes for tensor in tensors), sum(2 * tensor.n_elements for tensor in tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "mix"), GPU_MODELS)
def test_load_gpu(benchmark, gpu, bus, written, twin, name, mix, way):
    """A file in the page cache to FP16 on the GPU, until the last value has arrived; the roofline is the bus."""
    if way == "gguf-py" and name != "Gemma-3-270M":
        pytest.skip("it takes minutes")
    path = written(name, mix)
    n_bytes, n_values = sizes(path)
    source = twin(name) if way == "safetensors" else path

    kept = []

    def load():
        kept.append(WAYS[way](source))
        gpu.synchronize()

    def let_go():
        kept.clear()  # two of the largest would not fit
        gpu.synchronize()

    if way.startswith("ours"):
        found = WAYS[way](source)
        for tensor in (next(iter(found)), list(found)[-1]):
            rows = slice(0, 64)
            expected = nd.open(path).load(tensor, device="reference", rows=rows)
            assert_bit_identical(found[tensor].copy_to_host()[rows], expected, tensor)
        del found
    rounds = {"ours": 25, "gguf-py": 1}.get(way, 9)
    benchmark.pedantic(load, setup=let_go, rounds=rounds, warmup_rounds=way != "gguf-py")
    kept.clear()
    note(benchmark, n_values if way == "safetensors" else n_bytes, bus, values=n_values, file_bytes=n_bytes)


@pytest.mark.parametrize("part", ["reading", "sending"])
def test_one_part_of_loading(benchmark, gpu, bus, written, monkeypatch, part):
    """Reading without sending, and sending without reading: the functions of the other part do nothing and return."""
    from numba import carray, cfunc, types

    from numba_dequant.kernels.native.intrinsics import pointer

    long = types.int64

    @cfunc(long(long, long, long, long))
    def read(file, address, n_bytes, offset):
        return n_bytes

    @cfunc(types.int32(long, long, long, long))
    def signal(stream, address, value, flags):
        carray(pointer(address), 1, long)[0] = value
        return 0

    @cfunc(types.int32(long))
    def done(anything):
        return 0

    others = {"let_gpu_wait": done, "copy": done, "launch": done, "signal": signal}
    replaced = {"read": read} if part == "sending" else others
    path = written("Llama-3.1-8B", "Q4_K_M")

    def load():
        model.load_all(device="cuda", progress=False)
        gpu.synchronize()

    with nd.open(path) as model, monkeypatch.context() as patch:
        for name, function in replaced.items():
            patch.setitem(gpu.itself.thread_functions, name, function.ctypes)
        benchmark.pedantic(load, rounds=9, warmup_rounds=1)
    note(benchmark, sizes(path)[0], bus)


@pytest.mark.parametrize("n_layers", [5, 112])
def test_memory(benchmark, gpu, tmp_path, n_layers):
    """Peak memory of a load beyond its results, on the host and on the GPU."""
    from cuda.bindings import driver

    from numba_dequant.loading.gpu_buffers import TUNING

    if "torch" in sys.modules:  # it keeps what safetensors has loaded
        sys.modules["torch"].cuda.empty_cache()
    size = {"n_layers": n_layers} if benchmark.enabled else SMALL
    path = models.write(tmp_path / "model.gguf", models.tensors("Llama-3.1-8B", "Q4_K_M", **size))
    n_bytes, n_values = sizes(path)
    nd.load(path, "blk.0.*", device="cuda", progress=False)
    nd.release_buffers()
    gpu.synchronize()
    _, pool = driver.cuDeviceGetDefaultMemPool(0)
    high = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_HIGH
    current = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_CURRENT
    in_use = int(driver.cuMemPoolGetAttribute(pool, current)[1])
    driver.cuMemPoolSetAttribute(pool, high, driver.cuuint64_t(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = host_memory("VmHWM")
    kept = benchmark.pedantic(nd.load, (path,), {"device": "cuda", "progress": False}, rounds=1)
    gpu.synchronize()
    host = host_memory("VmHWM") - before
    pinned = sum(len(buffers) * TUNING.chunk_bytes for buffers in gpu.itself.idle_buffers)
    assert host >= pinned  # it counts as well
    on_gpu = int(driver.cuMemPoolGetAttribute(pool, high)[1]) - in_use - sum(tensor.nbytes for tensor in kept.values())
    assert host < 256 << 20
    assert on_gpu < 256 << 20
    note(benchmark, n_bytes, values=n_values, **{"host MiB": host / 2**20, "GPU MiB": on_gpu / 2**20})


def host_memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def test_cold(benchmark, gpu, written):
    """A file that is not in the page cache; the roofline is `dd`, which runs before each load."""
    path = written("Llama-3.1-8B", "Q4_K_M")
    by_dd = []

    def drop():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_by_dd():
        drop()
        start = time.perf_counter()
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], check=True, capture_output=True)
        by_dd.append(time.perf_counter() - start)
        drop()

    def load():
        nd.load(path, device="cuda", progress=False)
        gpu.synchronize()

    benchmark.pedantic(load, setup=read_by_dd, rounds=7)
    n_bytes = os.path.getsize(path)
    note(benchmark, n_bytes, n_bytes / statistics.median(by_dd))


def test_load_gguf_py(benchmark, written):
    path = written("Gemma-3-270M", "Q4_K_M")
    found = benchmark.pedantic(read_by_gguf_py, (path,), rounds=1)
    expected = nd.load(path, device="cpu", progress=False)
    for name, values in expected.items():
        assert_bit_identical(found[name].reshape(-1), values.reshape(-1), name)
    n_bytes = sum(tensor.n_bytes for tensor in nd.open(path).tensors.values())
    note(benchmark, n_bytes + sum(values.nbytes for values in expected.values()), file_bytes=n_bytes, threads=1)
