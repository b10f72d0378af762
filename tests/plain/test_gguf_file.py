import os
import pickle
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from blocks import DATA, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_dequant as nd
from numba_dequant.gguf.file import open_gguf
from numba_dequant.gguf.header import WINDOW

GOOD, BAD = DATA / "gguf" / "good", DATA / "gguf" / "bad"

# What each bad file's error must name: a field, and the byte where it stands. None: the file is taken.
DECISIONS = {
    "alignment_0": ("general.alignment", 93),
    "alignment_24": ("general.alignment", 93),
    "alignment_u64": ("general.alignment", 93),
    "array_item_type_bad": ("item type", 37),
    "array_len_huge": ("'k' length", 41),
    "array_of_strings_huge": ("'k' length", 41),
    "dims_5": None,
    "dims_bytes_overflow": ("dimensions", 81),
    "dims_not_block_multiple": ("dimensions", 81),
    "dims_product_overflow": ("dimensions", 81),
    "dims_rows_not_block_multiple": ("dimensions", 81),
    "duplicate_tensor_name": ("name of tensor 1", 101),
    "key_invalid_utf8": ("metadata key 1", 76),
    "key_len_huge": ("metadata key 0 length", 24),
    "kv_bool_2": None,
    "kv_duplicate_key": ("metadata key 1", 68),
    "kv_type_unknown": ("'k' type", 33),
    "magic_only": ("version", 4),
    "n_dims_0": None,
    "n_dims_huge": ("number of dimensions", 77),
    "n_kv_huge": ("metadata count", 16),
    "n_tensors_1e9": ("tensor count", 8),
    "name_64": None,
    "name_empty": None,
    "name_len_huge": ("name of tensor 0 length", 68),
    "name_with_nul": ("name of tensor 0", 68),
    "nested_array_5000": ("item type", 81),
    "offset_gap": ("offset", 93),
    "offset_past_eof": ("offset", 93),
    "offset_u64_wrap": ("offset", 93),
    "tensors_overlap": ("'u' offset", 126),
    "truncated_data": ("data", 128),
    "truncated_kv": ("metadata key 0", 32),
    "truncated_kv_value": ("general.architecture", 64),
    "type_negative": ("type", 89),
    "type_removed_31": ("type", 89),
    "type_unknown": ("type", 89),
    "version_0": ("version", 4),
    "version_99": ("version", 4),
    "wrong_magic": ("magic", 0),
}


@pytest.mark.parametrize("path", sorted(BAD.glob("*.gguf")), ids=lambda path: path.stem)
def test_bad_files(path):
    expected = DECISIONS[path.stem]
    tracemalloc.start()
    start = time.process_time()
    try:
        if expected is None:
            assert len(open_gguf(path).tensors) == 1
        else:
            with pytest.raises(nd.GgufError) as caught:
                open_gguf(path)
            assert expected[0] in caught.value.field
            assert caught.value.offset == expected[1]
            assert caught.value.allowed
            assert str(caught.value) == f"{path}: at byte {caught.value.offset}: {caught.value.reason}"
            assert str(path) in str(caught.value)
        seconds = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 0.1
    assert peak < 100e6


def test_every_bad_file_has_a_decision():
    assert {path.stem for path in BAD.glob("*.gguf")} == set(DECISIONS)


@pytest.mark.parametrize("path", sorted(GOOD.glob("*.gguf")), ids=lambda path: path.stem)
def test_good_files(path):
    if path.stem in ("split-00002-of-00003", "split-00003-of-00003"):
        with pytest.raises(nd.GgufError, match="open the first shard"):
            open_gguf(path)
        return
    start = time.process_time()
    model = nd.open(path)
    assert time.process_time() - start < 1
    for name, tensor in model.tensors.items():
        found = model.load(name, "float32", device="reference")
        assert found.shape == tensor.shape
        assert model.read(name).size == tensor.n_bytes


@pytest.mark.parametrize("name", ["{}", "{0.__class__}", "a}b{", "%s"])
def test_an_error_names_what_it_is_about_as_it_stands(tmp_path, name):
    path = write_model(tmp_path / "model.gguf", {name: ("F32", (8,), bytes(32))}, [(name, "text")])
    raw = path.read_bytes()
    key_type = raw.index(name.encode()) + len(name)
    shape = raw.index(name.encode(), key_type) + len(name)
    for at, field in ((key_type, f"metadata {name!r} type"), (shape, f"tensor {name!r} number of dimensions")):
        path.write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
        with pytest.raises(nd.GgufError) as caught:
            open_gguf(path)
        assert (caught.value.field, caught.value.offset) == (field, at)


def test_shapes():
    model = nd.open(GOOD / "shapes.gguf")
    assert any(len(name) == 63 for name in model.tensors)
    for name, tensor in model.tensors.items():
        if tensor.format.name == "F32" and len(name) < 63:  # the one with the long name is all zeros
            expected = np.arange(tensor.n_elements, dtype=np.float32).reshape(tensor.shape)
            np.testing.assert_array_equal(model.load(name, "float32", device="cpu"), expected)
    assert {len(tensor.shape) for tensor in model.tensors.values()} == {1, 2, 3, 4}


def test_big_endian():
    model = nd.open(GOOD / "big_endian.gguf")
    for name, tensor in model.tensors.items():
        assert tensor.byte_order == "big"
        step = 1 if tensor.format.name == "I32" else 8
        expected = np.arange(tensor.n_elements).reshape(tensor.shape) / step
        for device in ("cpu", "reference"):
            np.testing.assert_array_equal(model.load(name, "float32", device=device), expected)


def test_big_endian_blocks_are_turned_field_by_field(tmp_path):
    from blocks import random_blocks

    source = nd.FORMATS["Q4_K"]
    data = random_blocks("Q4_K", 4)
    turned = data.view(source.layout).astype(source.layout.newbyteorder(">")).tobytes()
    header = struct.pack(">4sIQQ", b"GGUF", 3, 1, 0) + struct.pack(">Q", 1) + b"w"
    header += struct.pack(">IQIQ", 1, 1024, 12, 0)
    (tmp_path / "big.gguf").write_bytes(header + bytes(-len(header) % 32) + turned)
    np.testing.assert_array_equal(nd.open(tmp_path / "big.gguf").read("w"), data)


def test_all_types_against_gguf_py():
    path = GOOD / "all_types.gguf"
    ours, theirs = nd.open(path), gguf.GGUFReader(path)
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.offset == tensor.data_offset
        assert mine.shape == tuple(int(extent) for extent in reversed(tensor.shape))
        assert mine.format.ggml_id == tensor.tensor_type.value
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents()


def test_types_that_gguf_py_does_not_know():
    (tensor,) = open_gguf(GOOD / "q2_0_type42.gguf").tensors.values()
    assert tensor.format.name == "Q2_0"
    (tensor,) = open_gguf(GOOD / "q8_1_36byte.gguf").tensors.values()
    assert tensor.format.name == "Q8_1"
    assert tensor.n_bytes == tensor.n_elements // 32 * 36


def test_a_split_is_one_model():
    model = open_gguf(GOOD / "split-00001-of-00003.gguf")
    assert len(model.shards) == 3
    assert len(model.tensors) == 6
    assert len({tensor.path for tensor in model.tensors.values()}) == 3
    assert "general.architecture" in model.metadata


@pytest.fixture
def shards(tmp_path):
    for path in GOOD.glob("split-*.gguf"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_missing_shard(shards):
    (shards / "split-00002-of-00003.gguf").unlink()
    with pytest.raises(nd.GgufError, match=r"split-00002-of-00003\.gguf"):
        open_gguf(shards / "split-00001-of-00003.gguf")


def test_shards_in_the_wrong_order(shards):
    (shards / "split-00002-of-00003.gguf").write_bytes((shards / "split-00003-of-00003.gguf").read_bytes())
    with pytest.raises(nd.GgufError, match=r"split\.no"):
        open_gguf(shards / "split-00001-of-00003.gguf")


def test_a_shard_that_lost_its_number(shards):
    (shards / "split-00001-of-00003.gguf").rename(shards / "model.gguf")
    with pytest.raises(nd.GgufError, match=r"does not end in -00001-of-00003\.gguf"):
        open_gguf(shards / "model.gguf")


def string(text, order="<"):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack(order + "Q", len(raw)) + raw


def write_strings(path, strings, order="<"):
    """A file whose metadata is one array of strings, and a number behind it that shows where the array ended."""
    items = b"".join(string(text, order) for text in strings)
    header = struct.pack(order + "4sIQQ", b"GGUF", 3, 0, 2)
    header += string("a", order) + struct.pack(order + "IIQ", 9, 8, len(strings)) + items
    header += string("b", order) + struct.pack(order + "II", 4, 12345)
    path.write_bytes(header)
    return path


STRINGS = {
    "ordinary": [f"token{index}" for index in range(300_000)],
    "one": ["x"],
    "none": [],
    "empty ones": [""] * 2000 + ["a"] * 2000,
    "long ones": ["x" * (200 + index % 100) for index in range(20_000)],
    "with NULs": [b"a\0\0\0\0\0\0\0\0b" * (index % 3) for index in range(5000)],
    "only NULs": [bytes(index % 20) for index in range(5000)],
    "larger than a window": ["y" * (3 * WINDOW), "z", "y" * WINDOW],
    "that look like headers": [struct.pack("<Q", 3) + b"abc" + struct.pack("<Q", 2) for _ in range(5000)],
    "not ASCII": ["ü☃" * (index % 9) for index in range(5000)],
}


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("kind", STRINGS)
def test_arrays_of_strings_are_passed_over_and_read(tmp_path, kind, order):
    strings = STRINGS[kind]
    model = open_gguf(write_strings(tmp_path / "s.gguf", strings, order))
    assert model.metadata["b"] == 12345
    array = model.metadata["a"]
    assert len(array) == len(strings)
    assert array == [text if isinstance(text, str) else text.decode() for text in strings]


@given(st.lists(st.binary(max_size=300), max_size=60), st.sampled_from("<>"))
@settings(max_examples=200, deadline=None)
def test_any_strings_are_passed_over(tmp_path_factory, strings, order):
    path = write_strings(tmp_path_factory.getbasetemp() / "any.gguf", strings, order)
    assert open_gguf(path).metadata["b"] == 12345


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_a_vocabulary_opens_quickly(tmp_path, order):
    path = write_strings(tmp_path / "s.gguf", [f"▁token{index}" for index in range(262_144)], order)
    best = min(_seconds(path) for _ in range(5))
    assert best < 0.05


def _seconds(path):
    """Of this process: what else the machine does must not count."""
    start = time.process_time()
    open_gguf(path)
    return time.process_time() - start


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize(
    "strings", [[""], ["", "a"], ["a" * 300], ["a", "b", ""]], ids=["empty", "mixed", "long", "2 and 1"]
)
def test_strings_that_defeat_a_shortcut_cost_linear_time(tmp_path, strings, order):
    few, many = (write_strings(tmp_path / f"{n}.gguf", strings * (n // len(strings)), order) for n in (20_000, 160_000))
    assert min(_seconds(many) for _ in range(3)) < 30 * min(_seconds(few) for _ in range(3))


def test_what_is_not_utf8_in_an_item_is_replaced_and_hides_no_other_item(tmp_path):
    array = open_gguf(write_strings(tmp_path / "s.gguf", [b"fine", b"a\xffb", b"\0", b"x\0"])).metadata["a"]
    assert array[0] == "fine"
    assert array.to_list() == ["fine", "a\N{REPLACEMENT CHARACTER}b", "\0", "x\0"]


def test_an_array_of_a_file_that_has_changed_is_not_read(tmp_path):
    path = write_strings(tmp_path / "s.gguf", ["one", "two"])
    array = open_gguf(path).metadata["a"]
    path.write_bytes(path.read_bytes().replace(b"two", b"three"))
    with pytest.raises(nd.GgufError, match=r"metadata 'a' cannot be read: the file has changed .*reopen it"):
        list(array)


def test_padding_after_the_last_tensor_may_be_missing(tmp_path):
    path = write_model(tmp_path / "m.gguf", {"w": ("F32", (3,), np.arange(3, dtype="<f4").tobytes())})
    path.write_bytes(path.read_bytes()[:-20])
    np.testing.assert_array_equal(nd.open(path).load("w", "float32", device="cpu"), [0, 1, 2])


def test_a_dimension_of_zero(tmp_path):
    path = write_model(tmp_path / "m.gguf", {"w": ("Q4_K", (0, 256), b""), "v": ("F32", (1,), bytes(4))})
    model = nd.open(path)
    assert model.load("w", device="cpu").shape == (0, 256)
    assert model.load("v", device="cpu").shape == (1,)


def test_unknown_tensor(tmp_path):
    model = nd.open(write_model(tmp_path / "m.gguf", {"blk.0.attn_q.weight": ("F32", (1,), bytes(4))}))
    with pytest.raises(nd.TensorNotFoundError, match=r"did you mean 'blk\.0\.attn_q\.weight'"):
        model.load("blk.0.attn_k.weight", device="cpu")


def test_no_file_no_regular_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(nd.GgufError, match=r"it is a .*, not a file; correct the path"):
            open_gguf(path)


def test_an_error_survives_pickling():
    with pytest.raises(nd.GgufError) as caught:
        open_gguf(BAD / "version_99.gguf")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.field == "version"


SEEDS = [path.read_bytes()[:6000] for path in sorted(GOOD.glob("*.gguf")) + sorted(BAD.glob("*.gguf"))]


@given(st.sampled_from(SEEDS), st.data())
@settings(max_examples=500, deadline=1000)
def test_any_damage_is_an_error_of_ours_or_none(tmp_path_factory, seed, data):
    content = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        size = data.draw(st.sampled_from([1, 4, 8]))
        patch = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.just(b"\xff" * size)))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if kind == "change":
            content[at : at + size] = patch
        elif kind == "insert":
            content[at:at] = patch
        elif kind == "delete":
            del content[at : at + size]
        else:
            del content[at:]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        model = open_gguf(path)
        for value in model.metadata.values():
            if not isinstance(value, (str, int, float, bool)):
                value.to_list()
    except nd.GgufError:
        pass
