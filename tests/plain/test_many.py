"""`dequantize_many` on the CPU."""

import numpy as np
import pytest
from blocks import DTYPES, random_blocks
from many_tensors import assert_all_same, mixture

import numba_dequant as nd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_on_the_host(device, dtype):
    tensors = mixture(["Q4_K", "Q8_0", "F32"])
    assert_all_same(nd.dequantize_many(tensors, dtype, device=device), tensors, dtype)


def test_nothing():
    assert nd.dequantize_many({}, device="cpu") == {}


def test_out_on_the_host():
    tensors = mixture(["Q4_K", "Q8_0"])
    out = {name: np.empty(entry[2], np.float16) for name, entry in tensors.items()}
    found = nd.dequantize_many(tensors, out=out, device="cpu")
    assert all(found[name] is out[name] for name in tensors)
    assert_all_same(found, tensors)


def test_a_wrong_tensor_is_named_and_nothing_is_written():
    good = (random_blocks("Q8_0", 2), "Q8_0")
    for wrong, kind, message in (
        ((bytes(35), "Q8_0"), nd.DataError, r"tensor 'b': .*35"),
        ((bytes(34), "Q8_0", (3, 3)), nd.ShapeError, r"tensor 'b': shape"),
        ((bytes(34), "Q9_9"), nd.UnknownFormatError, "Q9_9"),
        (bytes(34), nd.DataError, r"tensor 'b' must be \(data, format\) or .*, got a bytes"),
        ((1, 2, 3, 4), nd.DataError, r"tensor 'b' must be .*, got a tuple of 4"),
    ):
        out = {"a": np.full(64, 7, np.float16), "b": np.full(32, 7, np.float16)}
        with pytest.raises(kind, match=message):
            nd.dequantize_many({"a": good, "b": wrong}, out=out, device="cpu")
        assert (out["a"] == 7).all()


def test_out_for_some():
    tensors = {"a": (bytes(34), "Q8_0"), "b": (bytes(34), "Q8_0")}
    with pytest.raises(nd.OutputError, match="'b' is in tensors or in out, but not in both"):
        nd.dequantize_many(tensors, out={"a": np.empty(32, np.float16)}, device="cpu")


def test_a_batch_without_memory_is_a_device_error(monkeypatch):
    from numba_dequant.backends import reference

    def exhausted(*arguments):
        raise MemoryError("Unable to allocate")

    batch = nd.prepare_many({"a": (random_blocks("Q8_0", 2), "Q8_0")}, device="reference")
    monkeypatch.setattr(reference, "dequantize_into", exhausted)
    with pytest.raises(nd.DeviceError, match=r"out of memory.*Unable to allocate"):
        batch.run()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_batch_reads_and_writes_anew(device):
    tensors = mixture(["Q4_K", "Q8_0", "F32"])
    batch = nd.prepare_many(tensors, device=device)
    assert len(batch) == len(tensors)
    for seed in (5, 6):
        for name, (data, source, _) in tensors.items():
            data[:] = random_blocks(source, name[1], seed=seed)
            batch.results[name][:] = 7
        assert batch.run() is batch.results
        assert_all_same(batch.results, tensors)


def test_a_batch_says_how_many_tensors_it_has():
    blocks = bytes(34)
    batch = nd.prepare_many(dict.fromkeys("abc", (blocks, "Q8_0")), device="cpu")
    assert (len(batch), repr(batch)) == (3, "Batch(3 tensors)")
