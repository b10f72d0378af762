"""Many tensors, whose compressed bytes are on the GPU: a model like Gemma-3-270M Q4_K_M, and 2000 small tensors.

`test_gpu` measures the time of the GPU alone. `test_host` measures the time on the host, from the call until the last
value is there: for a prepared batch, for `dequantize_many`, and for one call per tensor.
"""

import math

import numpy as np
import pytest
from conftest import gpu_time, note

import numba_dequant as nd
from numba_dequant.verify import assert_bit_identical

LAYER = [
    *[("F32", (256,))] * 2, *[("F32", (640,))] * 4,
    ("Q5_0", (2048, 640)), ("Q5_0", (2048, 640)), ("Q5_0", (1024, 640)), ("Q5_0", (256, 640)),
    ("Q4_K", (640, 1024)),
]  # fmt: skip
MODELS = {
    "like Gemma-3-270M Q4_K_M": [
        ("Q8_0", (262_144, 640)), ("F32", (640,)), *LAYER * 18,
        *[("Q6_K", (640, 2048)), ("Q8_0", (256, 640))] * 9, *[("Q4_K", (640, 2048)), ("Q5_0", (256, 640))] * 9,
    ],
    "2000 tensors of 4096 elements": [("Q4_K", (4096,))] * 2000,
}  # fmt: skip


class Model:
    """Random blocks in one piece of device memory."""

    def __init__(self, tensors, gpu):
        from numba_dequant.backends.device_tensor import DeviceTensor
        from numba_dequant.backends.gpu_memory import DeviceBytes

        sizes = [nd.FORMATS[name].n_bytes(shape) for name, shape in tensors]
        starts = np.cumsum([0] + [-(-size // 256) * 256 for size in sizes])
        self.bytes = np.random.default_rng(0).integers(0, 256, starts[-1], np.uint8)
        whole = gpu.itself.allocate(self.bytes.size, 0)
        gpu.itself.send(whole.pointer, self.bytes, 0)
        self.tensors, self.host = {}, {}
        for number, ((name, shape), size, start) in enumerate(zip(tensors, sizes, starts, strict=False)):
            piece = DeviceBytes(whole.pointer + int(start), size, gpu.itself, whole.owner)
            data = DeviceTensor(piece, (size,), np.dtype(np.uint8), 0)
            self.tensors[number] = (data, name, shape)
            self.host[number] = (self.bytes[start : start + size], name, shape)

    def moved(self, name=None):
        """Bytes to read and to write as FP16, of one format or of all."""
        return sum(
            data.nbytes + 2 * math.prod(shape) for data, kind, shape in self.tensors.values() if name in (None, kind)
        )

    def check(self, found):
        for number, (blocks, name, shape) in self.host.items():
            if math.prod(shape) < 1 << 22:
                expected = nd.dequantize(blocks, name, shape=shape, device="reference")
                assert_bit_identical(found[number].copy_to_host(), expected, f"tensor {number}, {name}")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    from conftest import NO_GPU

    if NO_GPU:
        pytest.skip(f"needs a GPU: {NO_GPU}")
    return Model(MODELS[request.param], request.getfixturevalue("_first_gpu"))


def seconds_at_the_roofline(model, gpu):
    """Seconds to move the bytes of the model at the roofline speed of each format."""
    from numba_dequant.cli.measure import Workload

    total = 0.0
    for name in {name for _, name, _ in model.tensors.values()}:
        total += model.moved(name) / gpu.roofline(Workload(nd.FORMATS[name], "float16", 1 << 28, gpu.itself))
    return total


@pytest.mark.benchmark(timer=gpu_time)
def test_gpu(benchmark, gpu, model):
    batch = nd.prepare_many(model.tensors)
    model.check(batch.run())
    benchmark.pedantic(batch.run, rounds=15, warmup_rounds=1)  # one at a time: the copy before it clears the cache
    note_model(benchmark, gpu, model)


@pytest.mark.parametrize("way", ["prepared", "together", "one by one"])
def test_host(benchmark, gpu, model, way):
    batch = nd.prepare_many(model.tensors)

    def one_by_one():
        return {number: nd.dequantize(data, name, shape=shape) for number, (data, name, shape) in model.tensors.items()}

    ways = {"prepared": batch.run, "together": lambda: nd.dequantize_many(model.tensors), "one by one": one_by_one}

    def work():
        found = ways[way]()
        gpu.synchronize()
        return found

    model.check(benchmark.pedantic(work, rounds=9, warmup_rounds=2))
    note_model(benchmark, gpu, model)


def note_model(benchmark, gpu, model):
    roofline = model.moved() / seconds_at_the_roofline(model, gpu)
    note(benchmark, model.moved(), roofline, tensors=len(model.tensors))
    if benchmark.enabled:
        benchmark.extra_info["us per tensor"] = benchmark.stats.stats.median / len(model.tensors) * 1e6
