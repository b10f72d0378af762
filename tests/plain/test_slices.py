"""What the commands read piece by piece: slices of tensors, and pieces of arrays of the metadata."""

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks, write_model
from gguf_bytes import BOOL, FLOAT64, INT16, STRING, gguf, value

import numba_dequant as nd
from numba_dequant.cli.slices import stream_slices
from numba_dequant.loading.requests import cut

TENSORS = {
    "a": ("Q6_K", (3, 5, 256), random_blocks("Q6_K", 15)),
    "scalar": ("F32", (), np.float32(3).tobytes()),
    "none": ("Q8_0", (0, 32), b""),
    "b": ("F16", (1, 4999), random_blocks("F16", 4999)),
    "ids": ("I32", (600,), np.arange(600, dtype="<i4").tobytes()),
}


@pytest.fixture
def model(tmp_path):
    return nd.open(write_model(tmp_path / "m.gguf", TENSORS))


@pytest.mark.parametrize("n_elements", [256, 512, 1 << 20])
def test_slices_follow_one_another(model, n_elements):
    for tensor in model.tensors.values():
        parts = cut(tensor, n_elements)
        assert [part.n_elements for part in parts[:-1]] == [n_elements] * (len(parts) - 1)
        assert sum(part.n_elements for part in parts) == tensor.n_elements
        at = tensor.offset
        for part in parts:
            assert (part.offset, part.shape) == (at, (part.n_elements,))
            at += part.n_bytes
        assert at == tensor.offset + tensor.n_bytes


def test_a_slice_is_whole_blocks(model):
    with pytest.raises(nd.ShapeError, match="not whole blocks"):
        cut(model.tensors["a"], 100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_values_of_slices_are_those_of_the_tensors(model, dtype):
    parts = [part for tensor in model.tensors.values() for part in cut(tensor, 512)]
    values = stream_slices(model, parts, dtype, "reference")
    for name, tensor in model.tensors.items():
        found = [np.asarray(next(values)) for _ in cut(tensor, 512)]
        expected = model.read(name)
        if dtype is not None:
            expected = np.asarray(nd.dequantize(expected, tensor.format, dtype, device="reference"))
        joined = np.concatenate(found) if found else expected[:0]
        if name == "ids" or dtype is None:
            np.testing.assert_array_equal(joined, expected)
        else:
            assert_same_bits(joined, expected)
    assert next(values, None) is None


ARRAYS = {"words": (STRING, [f"w{n}" * n for n in range(100)]), "numbers": (INT16, list(range(-50, 50)))}
ARRAYS |= {"flags": (BOOL, [n % 3 == 0 for n in range(100)]), "empty": (FLOAT64, [])}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("key", ARRAYS)
def test_pieces_of_an_array(key, order):
    entries = [value(name, kind, items, order) for name, (kind, items) in ARRAYS.items()]
    array = nd.open(gguf((), entries, order)).metadata[key]
    items = ARRAYS[key][1]
    for count in (1, 7, 100, 1000):
        pieces = list(array.pieces(count))
        assert [item for piece in pieces for item in piece] == items
        assert all(len(piece) == count for piece in pieces[:-1])
        assert array.first(count, 1 << 20) == items[:count]
    assert array._items is None  # nothing is kept


def test_the_first_bytes_of_strings():
    array = nd.open(gguf((), [value("words", STRING, ["long enough", "x"])])).metadata["words"]
    assert array.first(2, 4) == ["long", "x"]


def test_a_file_that_changes_between_pieces(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf((), [value("words", STRING, ["x" * (1 << 16)] * 64)]))
    pieces = nd.open(path).metadata["words"].pieces(1)
    next(pieces)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(nd.GgufError, match="shorter since it was opened"):
        list(pieces)
