"""Opening and loading models, from the page cache, to FP16 on the CPU; gguf-py beside us, as its users do it."""

import gguf
import models
import numpy as np
import pytest
from conftest import note

import numba_dequant as nd
from numba_dequant.device import n_threads
from numba_dequant.verify import check_same

SMALL = {"n_layers": 1, "n_vocab": 1024}
"""What a model is reduced to where nothing is timed."""

LLAMA = {"n_layers": 8}
"""A quarter of Llama-3.1-8B, whose values still fit in the memory of a small machine."""


@pytest.fixture(scope="module")
def written(tmp_path_factory, request):
    """A function that writes a model, once."""
    is_timed = request.config.getoption("benchmark_enable")
    paths = {}

    def write(name, mix):
        if (name, mix) not in paths:
            changes = SMALL if not is_timed else LLAMA if name.startswith("Llama") else {}
            path = tmp_path_factory.mktemp("models") / f"{name}-{mix}.gguf"
            n_tokens = models.ARCHITECTURES[name].n_vocab if is_timed else 1000
            paths[name, mix] = models.write(path, models.tensors(name, mix, **changes), n_tokens)
        return paths[name, mix]

    return write


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
    opened = benchmark.pedantic(nd.open, (tmp_path / f"model-00001-of-{count:05}.gguf",), rounds=5)
    assert sorted(opened.tensors) == sorted(name for name, _, _ in content)


@pytest.mark.parametrize("mix", models.MIXES)
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_load_cpu(benchmark, written, name, mix):
    """Tensor by tensor, each let go before the next but two."""
    with nd.open(written(name, mix)) as model:

        def walk():
            for _, values in model.stream(device="cpu", progress=False):  # noqa: B007 the last one counts too
                pass
            return values

        last = list(model.tensors)[-1]
        check_same(walk(), model.load(last, device="reference"), last)
        benchmark.pedantic(walk, rounds=5, warmup_rounds=1)
        n_bytes = sum(tensor.n_bytes for tensor in model.tensors.values())
        n_elements = sum(tensor.n_elements for tensor in model.tensors.values())
        note(benchmark, n_bytes + 2 * n_elements, file_bytes=n_bytes, threads=n_threads())


@pytest.mark.parametrize("threads", [None, 2, 8, 16])
@pytest.mark.parametrize("name", ["Gemma-3-270M", "Llama-3.1-8B"])
def test_load_gpu(benchmark, gpu, written, name, threads):
    """Until the last value is there; the roof is a copy from pinned memory."""
    from numba_dequant import runtime

    with nd.open(written(name, "Q4_K_M")) as model:

        def load():
            found = model.load_all(device="cuda", progress=False, threads=threads)
            gpu.synchronize()
            return found

        last = list(model.tensors)[-1]
        check_same(load()[last].copy_to_host(), model.load(last, device="reference"), last)
        benchmark.pedantic(load, rounds=5, warmup_rounds=1)
        pinned, room = runtime.pinned(256 << 20), runtime.allocate(256 << 20, gpu.device, 0)
        seconds = gpu.clock.seconds(lambda: runtime.copy_to_device(room.pointer, pinned, 0))
        n_bytes = sum(tensor.n_bytes for tensor in model.tensors.values())
        note(benchmark, n_bytes, pinned.nbytes / seconds)


def test_load_gguf_py(benchmark, written):
    path = written("Gemma-3-270M", "Q4_K_M")
    found = benchmark.pedantic(read_by_gguf_py, (path,), rounds=1)
    expected = nd.load(path, device="cpu", progress=False)
    for name, values in expected.items():
        check_same(found[name].reshape(-1), values.reshape(-1), name)
    n_bytes = sum(tensor.n_bytes for tensor in nd.open(path).tensors.values())
    note(benchmark, n_bytes + sum(values.nbytes for values in expected.values()), file_bytes=n_bytes, threads=1)
