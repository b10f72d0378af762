"""Dequantizing on a GPU, one tensor and many, with a GPU that does its work as late as it may."""

import copy
import gc
import inspect
from dataclasses import replace

import numpy as np
import pytest
from blocks import DTYPES, assert_same_bits, random_blocks
from late_gpu import LateGpu

import numba_dequant as nd
from numba_dequant.backends import cuda_batch
from numba_dequant.backends.device_tensor import DeviceTensor
from numba_dequant.backends.gpu import Gpu

pytestmark = pytest.mark.usefixtures("late")


def on_gpu(data, stream=None):
    """Blocks as an array on the GPU."""
    return nd.dequantize(data.view(np.int8), "I8", device="cuda", stream=stream)


def part_of(tensor, start, n_bytes, dtype):
    """An array that is a part of another one's memory."""
    memory = replace(tensor.memory, pointer=tensor.ptr + start, n_bytes=n_bytes)
    return DeviceTensor(memory, (n_bytes // np.dtype(dtype).itemsize,), np.dtype(dtype), 0)


def reference(data, name, dtype="float16", shape=None):
    return nd.dequantize(data, name, dtype, shape=shape, device="reference")


def mixture(names=("Q4_K", "Q8_0", "F32", "I8", "IQ2_XXS"), sizes=(0, 1, 3, 40)):
    blocks = {(name, size): random_blocks(name, size, seed=size) for size in sizes for name in names}
    return {key: (data, key[0], (key[1], nd.FORMATS[key[0]].block_size)) for key, data in blocks.items()}


def assert_all_same(results, tensors, dtype="float16"):
    assert list(results) == list(tensors)
    for key, (data, name, shape) in tensors.items():
        assert_same_bits(results[key].copy_to_host(), reference(data, name, dtype, shape))


def methods(of):
    """The public methods and their parameters; properties and attributes by name."""
    found = {name for name in dir(of) if not name.startswith("_")} - {"kernels", "idle_buffers"}
    return {
        name: list(inspect.signature(getattr(of, name)).parameters) if inspect.isfunction(getattr(of, name)) else None
        for name in found
    }


def test_it_has_the_methods_of_a_gpu():
    late = methods(LateGpu)
    for name, parameters in methods(Gpu).items():
        if name != "thread_functions":
            assert late[name] == parameters, name
    assert {"index", "kernels", "idle_buffers", "thread_functions"} <= set(vars(LateGpu)) | set(vars(LateGpu(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "MXFP4", "F32", "F64", "I8"])
def test_data_on_the_host(name, dtype):
    data = random_blocks(name, 40)
    found = nd.dequantize(data, name, dtype, device="cuda", shape=(40, -1))
    assert_same_bits(found.copy_to_host(), reference(data, name, dtype, (40, -1)))
    assert found.device == 0


@pytest.mark.parametrize("mapping", ["tile", "block"])
@pytest.mark.parametrize("stream", [None, 7])
def test_data_on_the_gpu(mapping, stream):
    data = random_blocks("Q6_K", 40)
    found = nd.dequantize(on_gpu(data), "Q6_K", mapping=mapping, stream=stream)
    assert_same_bits(found.copy_to_host(), reference(data, "Q6_K"))


def test_data_may_be_dropped_or_changed_at_once(late):
    before = late.in_use
    data = random_blocks("Q8_0", 100)
    expected = reference(data, "Q8_0")
    from_host = nd.dequantize(data, "Q8_0", device="cuda", stream=5)
    blocks = on_gpu(data, stream=3)
    data[:] = 0
    from_gpu = nd.dequantize(blocks, "Q8_0", stream=4)
    del blocks
    gc.collect()
    for found in (from_host, from_gpu):
        assert_same_bits(found.copy_to_host(), expected)
    del found, from_host, from_gpu
    gc.collect()
    assert late.in_use == before


@pytest.mark.parametrize("n_blocks", [0, 1, 33])
def test_out(n_blocks):
    data, other = random_blocks("Q4_0", n_blocks), random_blocks("Q4_0", n_blocks, seed=1)
    out = nd.dequantize(data, "Q4_0", device="cuda")
    assert nd.dequantize(other, "Q4_0", device="cuda", out=out, stream=9) is out
    assert out.stream == 9
    assert_same_bits(out.copy_to_host(), reference(other, "Q4_0"))


def test_an_out_at_an_odd_address():
    """The kernel stores 16 bytes at a time, so the values go by way of other memory."""
    data = random_blocks("Q8_0", 10)
    whole = nd.dequantize(random_blocks("Q8_0", 11), "Q8_0", "float32", device="cuda")
    before = whole.copy_to_host()
    out = part_of(whole, 4, 1280, np.float32)
    nd.dequantize(data, "Q8_0", "float32", device="cuda", out=out)
    nd.dequantize_many({"a": (data, "Q8_0")}, "float32", device="cuda", out={"a": out})
    after = whole.copy_to_host()
    assert_same_bits(after[1:321], reference(data, "Q8_0", "float32"))
    assert_same_bits(np.delete(after, np.s_[1:321]), np.delete(before, np.s_[1:321]))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"out": "float32"}, nd.OutputError, "out holds float32, the result is float16"),
        ({"out": "shape"}, nd.OutputError, r"out has shape \(32,\), the result has 64 elements"),
        ({"out": "host"}, nd.OutputError, "out is a ndarray on the host, but the device is cuda:0"),
        ({"out": "data"}, nd.OutputError, "out shares memory with data"),
        ({"shape": (3, 3)}, nd.ShapeError, "does not have as many elements"),
        ({"stream": "x"}, nd.DeviceError, "expected a stream, got 'x'"),
        ({"device": "cpu"}, nd.DeviceError, "the data is on a GPU, but the device is cpu"),
    ],
)
def test_what_is_refused_before_anything_is_launched(late, arguments, kind, message):
    data = on_gpu(random_blocks("Q8_0", 2))
    outputs = {
        "float32": lambda: nd.dequantize(bytes(68), "Q8_0", "float32", device="cuda"),
        "shape": lambda: nd.dequantize(bytes(34), "Q8_0", device="cuda"),
        "host": lambda: np.empty(64, np.float16),
        "data": lambda: part_of(data, 0, 128, np.float16),
    }
    if "out" in arguments:
        arguments = arguments | {"out": outputs[arguments["out"]]()}
    late.launch = lambda *_: pytest.fail("launched")
    with pytest.raises(kind, match=message):
        nd.dequantize(data, "Q8_0", **arguments)


def test_bfloat16_needs_a_later_gpu(late):
    late.capability = (7, 5)
    with pytest.raises(nd.DtypeError, match=r"bfloat16 needs a GPU of compute capability 8\.0 or later, but this GPU"):
        nd.dequantize(bytes(34), "Q8_0", "bfloat16", device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", [None, 7])
def test_many(dtype, stream):
    tensors = mixture()
    assert_all_same(nd.dequantize_many(tensors, dtype, device="cuda", stream=stream), tensors, dtype)


def test_many_take_data_from_everywhere_in_one_launch_per_format(late, monkeypatch):
    monkeypatch.setattr(cuda_batch, "SHARED_MEMORY", 2000)
    tensors = mixture()
    given = {
        key: (on_gpu(data, stream=3) if number % 2 else data, name, shape)
        for number, (key, (data, name, shape)) in enumerate(tensors.items())
    }
    launches, real = [], late.launch
    late.launch = lambda *arguments: (launches.append(arguments), real(*arguments))
    batch = nd.prepare_many(given, stream=5)
    assert_all_same(batch.run(), tensors)
    decoded = {name for _, name, _ in tensors.values() if nd.FORMATS[name].decode}
    assert len(launches) == len(decoded)


@pytest.mark.parametrize("stream", [None, 5])
def test_large_tensors_on_the_gpu_begin_early(late, monkeypatch, stream):
    monkeypatch.setattr(cuda_batch, "LARGE", 256 * 40)
    tensors = mixture(["Q4_K", "Q8_0", "Q6_K", "I8"], (0, 1, 40, 50))
    given = {key: (on_gpu(data, stream=3), name, shape) for key, (data, name, shape) in tensors.items()}
    launches, real = [], late.launch
    late.launch = lambda *arguments: (launches.append(arguments), real(*arguments))
    found = nd.dequantize_many(given, stream=stream)
    del given
    gc.collect()
    assert_all_same(found, tensors)
    assert len(launches) == 4 + 3, "four large tensors of K quants, and one launch for the others of each format"
    late.launch = real
    wrong = {"a": (on_gpu(tensors["Q4_K", 50][0]), "Q4_K"), "b": (bytes(35), "Q8_0")}
    before = late.in_use
    with pytest.raises(nd.DataError, match="tensor 'b'"):
        nd.dequantize_many(wrong)
    gc.collect()
    assert late.in_use == before


def test_data_is_kept_for_what_has_begun_early_if_a_later_tensor_is_wrong(late, monkeypatch):
    monkeypatch.setattr(cuda_batch, "LARGE", 1)
    given = {"a": (on_gpu(random_blocks("Q4_K", 40), stream=3), "Q4_K"), "b": (bytes(35), "Q8_0")}
    with pytest.raises(nd.DataError, match="tensor 'b'"):
        nd.dequantize_many(given, stream=5)
    given.clear()
    gc.collect()
    assert not late.problems


def test_a_batch_reads_and_writes_again(late):
    tensors = mixture(sizes=(1, 40))
    data = {key: on_gpu(entry[0], stream=2) for key, entry in tensors.items()}
    out = {key: nd.dequantize(*entry[:2], shape=entry[2], device="cuda") for key, entry in tensors.items()}
    batch = nd.prepare_many({key: (data[key], *entry[1:]) for key, entry in tensors.items()}, out=out, stream=2)
    for seed in (5, 6):
        for key, (blocks, name, _) in tensors.items():
            blocks[:] = random_blocks(name, key[1], seed=seed)
            late.send(data[key].ptr, blocks, 2)
        assert all(batch.run()[key] is out[key] for key in tensors)
        assert_all_same(out, tensors)
    before = late.in_use
    del batch, data
    gc.collect()
    assert late.in_use < before


def test_a_batch_that_is_dropped_behind_its_launch():
    tensors = mixture(sizes=(40,))
    results = nd.prepare_many({key: (on_gpu(data), name, shape) for key, (data, name, shape) in tensors.items()}).run()
    gc.collect()
    assert_all_same(results, tensors)


def test_outputs_that_share_memory():
    out = nd.dequantize(bytes(34), "Q8_0", device="cuda")
    tensors = {"a": (bytes(34), "Q8_0"), "b": (bytes(34), "Q8_0")}
    with pytest.raises(nd.OutputError, match="out of tensor 'a' shares memory with out of tensor 'b'"):
        nd.dequantize_many(tensors, out={"a": out, "b": out}, device="cuda")


def test_a_wrong_tensor_of_many_is_named():
    with pytest.raises(nd.DataError, match="tensor 'b': "):
        nd.dequantize_many({"a": (bytes(34), "Q8_0"), "b": (bytes(35), "Q8_0")}, device="cuda")


def test_nothing():
    assert nd.dequantize_many({}, device="cuda") == {}
    assert nd.dequantize(b"", "Q4_K", device="cuda").copy_to_host().shape == (0,)


def test_a_copy():
    found = nd.dequantize(random_blocks("Q8_0", 5), "Q8_0", device="cuda", stream=4)
    for other in (copy.copy(found), copy.deepcopy(found)):
        np.testing.assert_array_equal(other.copy_to_host(), found.copy_to_host())
    assert copy.deepcopy(found).ptr != found.ptr == copy.copy(found).ptr
