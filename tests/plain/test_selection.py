"""What to load: names, rows, types, and where to."""

import re

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks, write_model
from gguf_bytes import floats, gguf

import numba_dequant as nd
from numba_dequant.errors import shown
from numba_dequant.loading.requests import request_for

TENSORS = {
    "token_embd.weight": ("Q8_0", (40, 64), random_blocks("Q8_0", 80)),
    "blk.0.attn_q.weight": ("Q4_K", (2, 256), random_blocks("Q4_K", 2)),
    "blk.0.attn_norm.weight": ("F32", (5,), np.arange(5, dtype="<f4").tobytes()),
    "blk.1.attn_q.weight": ("Q6_K", (3, 2, 512), random_blocks("Q6_K", 12)),
    "blk.1.attn_norm.weight": ("F32", (300,), np.arange(300, dtype="<f4").tobytes()),
    "flat": ("Q4_0", (128,), random_blocks("Q4_0", 4)),
    "ids": ("I32", (3,), np.arange(3, dtype="<i4").tobytes()),
}


@pytest.fixture
def model(tmp_path):
    return nd.open(write_model(tmp_path / "model.gguf", TENSORS))


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("token_embd.weight", ["token_embd.weight"]),
        ("blk.?.attn_norm.*", ["blk.0.attn_norm.weight", "blk.1.attn_norm.weight"]),
        (["ids", "blk.0.*"], ["blk.0.attn_q.weight", "blk.0.attn_norm.weight", "ids"]),
        (re.compile(r"\.1\..*q"), ["blk.1.attn_q.weight"]),
        (lambda tensor: len(tensor.shape) == 3, ["blk.1.attn_q.weight"]),
        (lambda tensor: False, []),
        ([], []),
    ],
)
def test_select(model, select, names):
    assert list(model.load_all(select, device="cpu")) == names
    assert [name for name, _ in model.stream(select, device="cpu")] == names


def test_tensors_are_names_too(model):
    """Those of another model as well."""
    ids, flat = (model.tensors[name] for name in ("ids", "flat"))
    for select, names in ((ids, ["ids"]), ([ids, "flat"], ["flat", "ids"]), ((flat,), ["flat"])):
        assert list(model.load_all(select, device="reference")) == names
    other = ids._replace(offset=0, path="another")
    np.testing.assert_array_equal(model.load(other, device="reference"), np.arange(3))
    for wrong in (5, None, b"ids", re.compile("ids")):
        with pytest.raises(nd.TensorNotFoundError, match="the name of a tensor must be a str or a TensorInfo, got "):
            model.load(wrong, device="reference")


@pytest.mark.parametrize("select", [5, True, b"ids", bytearray(b"ids"), memoryview(b"ids"), bool, str, np.array(3)])
def test_a_selection_of_another_kind_is_refused_as_a_whole(model, select):
    with pytest.raises(nd.OptionError, match=r"select must be a name or a glob, .*; got ") as caught:
        model.load_all(select, device="reference")
    assert str(caught.value).endswith(shown(select))


@pytest.mark.parametrize("pick", [5, b"ids", None, re.compile(b"ids"), ["ids"], len])
def test_a_pick_of_another_kind_is_refused(model, pick):
    with pytest.raises(nd.OptionError, match="select must be a name or a glob") as caught:
        model.load_all(["ids", pick], device="reference")
    assert str(caught.value).endswith(shown(pick))


def test_a_name_that_looks_like_a_glob_is_a_name():
    names = ["a[1]", "a1", "b*", "bc"]
    model = nd.open(gguf([(name, *floats(2)) for name in names]))
    for name, found in (("a[1]", ["a[1]"]), ("b*", ["b*"]), ("a[1-9]", ["a1"]), ("b?", ["b*", "bc"])):
        assert list(model.load_all(name, device="reference")) == found
    found = model.load_all(dtype={"a[1]": "float32", "*": "float16"}, device="reference")
    # As a glob, it is the pattern of "a1" too.
    assert [found[name].dtype.name for name in names] == ["float32", "float32", "float16", "float16"]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("token_embed.weight", "no tensor 'token_embed.weight' among the 7 tensors; did you mean 'token_embd.weight'"),
        ("layers.*", r"no tensor name matches the glob 'layers\.\*'"),
        (["ids", "blk.9.*"], r"no tensor name matches the glob 'blk\.9\.\*'"),
        (re.compile("x+y"), r"no tensor name matches the expression 'x\+y'"),
    ],
)
def test_select_what_is_not_there(model, select, message):
    with pytest.raises(nd.TensorNotFoundError, match=message):
        model.load_all(select, device="cpu")


def test_a_type_for_each_tensor(model):
    rules = {"ids": "float16", "*norm*": "float32", "blk.0.*": np.float16, "*": "bfloat16"}
    found = model.load_all(dtype=rules, device="cpu")
    assert {name: values.dtype.name for name, values in found.items()} == {
        "token_embd.weight": "bfloat16",
        "blk.0.attn_q.weight": "float16",
        "blk.0.attn_norm.weight": "float32",
        "blk.1.attn_q.weight": "bfloat16",
        "blk.1.attn_norm.weight": "float32",
        "flat": "bfloat16",
        "ids": "int32",
    }
    for name, values in found.items():
        if name != "ids":
            assert_same_bits(values, model.load(name, values.dtype, device="reference"))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int4", "cannot dequantize to 'int4'"),
        ({"*": "int4"}, "cannot dequantize to 'int4'"),
        ({"blk.*": "float16"}, r"dtype has no pattern that matches tensor 'token_embd\.weight'; .*'\*'"),
    ],
)
def test_a_type_that_is_none(model, dtype, message):
    with pytest.raises(nd.DtypeError, match=message):
        model.load_all(dtype=dtype, device="cpu")


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("token_embd.weight", slice(3, 17)),
        ("token_embd.weight", slice(-2, None)),
        ("token_embd.weight", slice(30, 1000)),
        ("token_embd.weight", slice(9, 9)),
        ("token_embd.weight", slice(9, 3)),
        ("blk.1.attn_q.weight", slice(1, 2)),
        ("blk.1.attn_norm.weight", slice(17, 18)),
        ("flat", slice(32, 96)),
        ("ids", slice(1, 3)),
    ],
)
def test_rows(model, name, rows, device):
    whole = model.load(name, "float32", device=device)
    part = model.load(name, "float32", device=device, rows=rows)
    start, stop, _ = rows.indices(len(whole))
    assert part.shape == (max(stop - start, 0), *whole.shape[1:])
    np.testing.assert_array_equal(part, whole[rows])


def test_rows_read_only_their_own_bytes(model, tmp_path):
    tensor = model.tensors["token_embd.weight"]
    with open(model.path, "rb") as file:
        content = bytearray(file.read())
    expected = model.load("token_embd.weight", rows=slice(10, 12), device="cpu")
    first, last = tensor.offset + 10 * 68, tensor.offset + 12 * 68
    content[tensor.offset : first] = bytes(first - tensor.offset)
    content[last : tensor.offset + tensor.n_bytes] = bytes(tensor.offset + tensor.n_bytes - last)
    (tmp_path / "zeroed.gguf").write_bytes(content)
    found = nd.open(tmp_path / "zeroed.gguf").load("token_embd.weight", rows=slice(10, 12), device="cpu")
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("token_embd.weight", 3, r"a slice of consecutive rows, such as slice\(0, 100\), got 3"),
        ("token_embd.weight", slice(0, 8, 2), "consecutive rows"),
        ("token_embd.weight", slice(0, 8, 0), "consecutive rows"),
        ("token_embd.weight", slice("0", 8), "consecutive rows"),
        ("token_embd.weight", slice(0, 8.5), "consecutive rows"),
        ("token_embd.weight", slice(0, 8, "1"), "consecutive rows"),
        ("flat", slice(40, 64), "rows 40 to 64 of tensor 'flat', .* are not whole blocks of 32"),
        ("flat", slice(0, 40), "rows 0 to 40 of tensor 'flat', .* are not whole blocks of 32"),
    ],
)
def test_rows_that_are_none(model, name, rows, message):
    with pytest.raises(nd.ShapeError, match=message):
        model.load(name, rows=rows, device="cpu")


def test_rows_of_a_tensor_without_rows():
    model = nd.open(gguf([("t", (0, 256), "Q4_K", b""), ("u", (3, 0), "F32", b"")]))
    for rows in (slice(0, 5), slice(None), slice(0, 0, 1)):
        assert model.load("t", device="reference", rows=rows).shape == (0, 256)
    assert model.load("u", device="reference", rows=slice(1, 3, 1)).shape == (2, 0)


def test_rows_of_a_scalar(tmp_path):
    model = nd.open(write_model(tmp_path / "m.gguf", {"s": ("F32", (), b"\0\0\x80\x3f")}))
    assert model.load("s", device="cpu").shape == ()
    with pytest.raises(nd.ShapeError, match="'s' is a scalar"):
        model.load("s", rows=slice(0, 1), device="cpu")


def test_out_for_some(model):
    out = {"flat": np.full(128, 7, np.float16), "ids": np.full(3, 7, np.int32)}
    found = model.load_all(device="cpu", out=out)
    assert list(found) == list(TENSORS)
    for name, given in out.items():
        assert found[name] is given
    for name, values in found.items():
        np.testing.assert_array_equal(values, model.load(name, device="reference"))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ({"flt": np.empty(128, np.float16)}, nd.TensorNotFoundError, "'flt', which is not among the tensors to load"),
        (
            {"flat": np.empty(128, np.float32)},
            nd.OutputError,
            "tensor 'flat': out holds float32, the result is",
        ),
        ({"flat": np.empty(127, np.float16)}, nd.OutputError, "tensor 'flat': out has shape"),
        ({"flat": np.empty(256, np.float16)[::2]}, nd.OutputError, "tensor 'flat': out is not C-contiguous"),
    ],
)
def test_a_wrong_out_is_found_before_anything_is_written(model, out, error, message):
    first = np.full((40, 64), 7, np.float16)
    with pytest.raises(error, match=message):
        model.load_all(device="cpu", out={"token_embd.weight": first} | out)
    assert (first == 7).all()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_kept_as_it_is(model, device):
    kept = model.load_all(device=device, keep_quantized=True)
    for name, tensor in kept.items():
        assert isinstance(tensor, nd.QuantizedTensor)
        np.testing.assert_array_equal(tensor.data, model.read(name))
        np.testing.assert_array_equal(tensor.dequantize(device="cpu"), model.load(name, device="reference"))
    for name, values in nd.dequantize_many(kept, device="cpu").items():
        np.testing.assert_array_equal(values, model.load(name, device="reference"))
    part = model.load("token_embd.weight", device=device, rows=slice(1, 3), keep_quantized=True)
    assert part.shape == (2, 64)
    np.testing.assert_array_equal(part.data, model.read("token_embd.weight")[68:204])


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_kept_in_memory_of_the_caller(model, device):
    name = "token_embd.weight"
    blocks = model.read(name)
    out = np.zeros_like(blocks)
    kept = model.load(name, device=device, out=out, keep_quantized=True)
    assert kept.data is out
    assert kept.shape == model.tensors[name].shape
    np.testing.assert_array_equal(out, blocks)
    out[:] = 0
    assert model.load_all(name, device=device, out={name: out}, keep_quantized=True)[name].data is out
    np.testing.assert_array_equal(out, blocks)
    for wrong in (np.zeros(len(blocks) - 1, np.uint8), np.zeros(len(blocks), np.int8)):
        with pytest.raises(nd.OutputError, match="out h"):
            model.load(name, device=device, out=wrong, keep_quantized=True)


def test_the_other_byte_order(tmp_path):
    from blocks import DATA

    with nd.open(DATA / "gguf" / "good" / "big_endian.gguf") as model:
        for name, tensor in model.load_all(device="cpu", keep_quantized=True).items():
            np.testing.assert_array_equal(tensor.data, model.read(name))
            np.testing.assert_array_equal(tensor.dequantize(device="cpu"), model.load(name, device="reference"))


def test_tensors_behave_like_a_dictionary(model):
    assert "flat" in model.tensors
    assert "flt" not in model.tensors
    assert model.tensors.get("flt") is None
    with pytest.raises(KeyError) as raised:
        model.tensors["flt"]
    assert str(raised.value) == "there is no tensor 'flt' among the 7 tensors; did you mean 'flat'?"


def test_what_a_request_gives_the_caller(tmp_path):
    """The values themselves, or the blocks with what is needed to dequantize them."""
    model = nd.open(write_model(tmp_path / "model.gguf", {"a": ("Q8_0", (2, 32), bytes(68))}))
    result, tensor = object(), model.tensors["a"]
    assert request_for(tensor, "float16").finished(result) is result
    kept = request_for(tensor, None).finished(result)
    assert (kept.data, kept.format, kept.shape) == (result, nd.FORMATS["Q8_0"], (2, 32))
