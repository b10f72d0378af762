"""`dequantize_many` has a short way for what is usual on a GPU. It gives what the way with all checks gives."""

import gc

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks
from late_gpu import installed

import numba_dequant as nd
from numba_dequant import api
from numba_dequant.backends import cuda_batch, cuda_usual


@pytest.fixture(params=[0, 1, 2])
def late(request, monkeypatch):
    yield from installed(request.param, monkeypatch)


def on_gpu(name, n_blocks, seed=0, stream=None):
    blocks = random_blocks(name, n_blocks, seed)
    return nd.dequantize(blocks.view(np.int8), "I8", device="cuda", stream=stream), blocks


def entries():
    """name -> (data on the GPU, format, shape), and name -> expected values."""
    tensors, expected = {}, {}
    for number, (name, shape) in enumerate(
        [
            ("Q8_0", (3, 64)),
            ("Q4_K", (2, 512)),
            ("Q8_0", (96,)),
            ("F32", (7,)),
            ("Q4_K", (1, 1, 256)),
            ("Q8_0", (1, 32)),
        ]
    ):
        n_blocks = int(np.prod(shape)) // nd.FORMATS[name].block_size
        data, blocks = on_gpu(name, n_blocks, number)
        tensors[number] = data, name if number % 2 else nd.FORMATS[name], shape
        expected[number] = nd.dequantize(blocks, name, shape=shape, device="reference")
    return tensors, expected


@pytest.fixture
def ways(monkeypatch):
    """Which ways have been gone."""
    gone = []
    for module, name in ((cuda_usual, "short"), (cuda_batch, "long")):
        real = module.dequantize

        def dequantize(*arguments, real=real, name=name):
            found = real(*arguments)
            if found is not None:
                gone.append(name)
            return found

        monkeypatch.setattr(module, "dequantize", dequantize)
    return gone


def assert_right(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape
        assert_same_bits(found[name].copy_to_host(), values)


@pytest.mark.parametrize("large", [1 << 24, 100])
def test_the_short_way(late, ways, monkeypatch, large):
    """Also if the GPU begins with tensors before the others are checked."""
    monkeypatch.setattr(cuda_usual, "LARGE", large)
    tensors, expected = entries()
    assert_right(nd.dequantize_many(tensors), expected)
    assert ways == ["short"]
    assert_right(nd.dequantize_many(tensors, device="cuda:0"), expected)
    assert ways == ["short"] * 2
    found = nd.dequantize_many(tensors)
    del tensors
    gc.collect()
    assert_right(found, expected)


def test_results_are_freed(late):
    tensors, _ = entries()
    before = late.in_use
    nd.dequantize_many(tensors)
    gc.collect()
    assert late.in_use == before


def test_data_of_another_stream_is_waited_for(late, ways):
    tensors, expected = entries()
    data, blocks = on_gpu("Q8_0", 4, 9, stream=7)
    tensors["other"] = data, "Q8_0", (2, 64)
    expected["other"] = nd.dequantize(blocks, "Q8_0", shape=(2, 64), device="reference")
    assert_right(nd.dequantize_many(tensors), expected)
    assert ways == ["long"]


def test_a_stream_of_the_caller(late, ways):
    tensors, expected = entries()
    assert_right(nd.dequantize_many(tensors, stream=7), expected)
    assert ways == ["long"]  # the data is of another stream


UNUSUAL = {
    "blocks on the host": lambda data: (bytes(34), "Q8_0", (32,)),
    "no shape": lambda data: (data, "Q8_0"),
    "a list as shape": lambda data: (data, "Q8_0", [4, 32]),
    "an unknown extent": lambda data: (data, "Q8_0", (-1, 32)),
    "a stored type": lambda data: (data, "I8", (136,)),
    "a format by number": lambda data: (data, 8, (4, 32)),
    "a format in lower case": lambda data: (data, "q8_0", (4, 32)),
    "an integer of NumPy": lambda data: (data, "Q8_0", (np.int64(4), 32)),
    "another shape": lambda data: (data, "Q8_0", (5, 32)),
    "a bool": lambda data: (data, "Q8_0", (True, 128)),
    "a float": lambda data: (data, "Q8_0", (4.0, 32)),
    "two unknown extents": lambda data: (data, "Q8_0", (-1, -1)),
    "negative extents": lambda data: (data, "Q8_0", (-4, -32)),
    "many dimensions": lambda data: (data, "Q8_0", (128, *[1] * 64)),
    "no whole block": lambda data: (data, "Q4_K", (256,)),
    "an unknown format": lambda data: (data, "Q9", (128,)),
    "a format of another type": lambda data: (data, {}, (128,)),
    "a list": lambda data: [data, "Q8_0", (4, 32)],
    "four items": lambda data: (data, "Q8_0", (4, 32), 1),
    "nothing": lambda data: None,
}


def outcome(*arguments, **options):
    try:
        found = nd.dequantize_many(*arguments, **options)
    except Exception as error:
        return type(error), str(error)
    return {name: (values.shape, values.copy_to_host().tobytes()) for name, values in found.items()}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("what", UNUSUAL)
def test_the_unusual(late, monkeypatch, what, place):
    items = list(entries()[0].items())
    items.insert(place, ("odd", UNUSUAL[what](on_gpu("Q8_0", 4)[0])))
    for options in ({}, {"dtype": "float32"}, {"dtype": "float8"}, {"device": "cpu"}, {"stream": "x"}):
        found = outcome(dict(items), **options)
        with monkeypatch.context() as patch:
            patch.setattr(api, "_usual_results", lambda *_: None)
            assert outcome(dict(items), **options) == found


def test_no_tensors(late):
    assert nd.dequantize_many({}, device="cuda") == {}


def test_more_types_than_the_gpu_has(late, monkeypatch):
    """Both ways name the tensor."""
    monkeypatch.setattr(late, "capability", (7, 0))
    tensors, _ = entries()
    with pytest.raises(nd.DtypeError, match="tensor 0: bfloat16 needs a GPU of compute capability 8"):
        nd.dequantize_many(tensors, "bfloat16")
