"""Models of several files, of files that are not complete, and of tensors that ComfyUI-GGUF has reshaped."""

import contextlib
import os
import pickle
import shutil
import stat
import subprocess
import sys
import warnings

import numpy as np
import pytest
from blocks import DATA, assert_same_bits, random_blocks
from gguf_bytes import INT32, INT64, STRING, UINT16, counted, floats, gguf, value
from small_file import CONTENT, GOOD, OTHER_HEADER, assert_loads

import numba_dequant as nd
from numba_dequant.cli import main
from numba_dequant.gguf import source


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


# Shards


SHARDS = [GOOD / f"split-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def assert_is_the_split(model):
    whole = nd.open(SHARDS[0])
    assert list(model.tensors) == list(whole.tensors)
    assert dict(model.metadata) == dict(whole.metadata)
    for name, found in model.load_all(device="cpu").items():
        assert_same_bits(found, whole.load(name, device="reference"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("kind", [list, tuple])
def test_shards_in_a_list_have_any_name_and_order(tmp_path, order, kind):
    names = [shutil.copy(path, tmp_path / f"blob{number}") for number, path in enumerate(SHARDS)]
    assert_is_the_split(nd.open(kind(names[number] for number in order)))
    assert_is_the_split(nd.open(kind(SHARDS[number].read_bytes() for number in order)))
    mixed = [os.fsencode(names[order[0]]), SHARDS[order[1]].read_bytes(), names[order[2]]]
    assert_is_the_split(pickle.loads(pickle.dumps(nd.open(mixed))))


def test_a_list_of_one_file_is_that_file(path):
    assert_loads(nd.open([path]))


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_of_one_shard_is_no_split(count):
    file = gguf([("t", *floats(1))], [value("split.count", INT32, count)])
    for given in (file, [file]):
        assert list(nd.open(given).tensors) == ["t"]


def test_a_list_within_a_list_is_refused():
    with pytest.raises(nd.OptionError, match="a list of shards holds paths or bytes, not lists"):
        nd.open([CONTENT, [CONTENT]])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (SHARDS[:2], r"split-00001.*: split\.count is 3; it must be 2, the number of files in the list"),
        (SHARDS[:1], r"split\.count is 3; it must be 1"),
        ([gguf(entries=[value("split.count", INT32, 2)])], r"split\.count is 2; it must be 1"),
        ([*SHARDS[:2], SHARDS[1]], r"split\.no is 1; it must be 0 to 2, .*split-00002.* has the same number"),
        ([*SHARDS, SHARDS[0]], r"split\.count is 3; it must be 4"),
        ([CONTENT, CONTENT], r"<memory 1>: split\.count is missing; it must be 2"),
    ],
)
def test_a_list_of_the_wrong_shards_is_refused(shards, message):
    with pytest.raises(nd.GgufError, match=message):
        nd.open(shards)


def shard(number, names, total):
    entries = [
        value(f"split.{key}", INT32, found) for key, found in (("count", 2), ("no", number), ("tensors.count", total))
    ]
    return gguf([(name, *floats(4)) for name in names], entries)


def test_a_tensor_in_two_shards_is_refused_by_name():
    with pytest.raises(nd.GgufError, match="tensor 'b'") as caught:
        nd.open([shard(0, "ab", 4), shard(1, "bc", 4)])
    assert "<memory 1>" in str(caught.value)


@pytest.mark.parametrize("total", [2, 4, 0])
def test_shards_hold_as_many_tensors_as_the_first_says(total):
    assert list(nd.open([shard(0, "ab", 3), shard(1, "c", 3)]).tensors) == ["a", "b", "c"]
    with pytest.raises(nd.GgufError, match=r"split\.tensors\.count"):
        nd.open([shard(0, "ab", total), shard(1, "c", total)])


@pytest.mark.parametrize("numbers", [(0, 7), (0, -1), (1, 2), (0, None), (None, 1)])
def test_the_shards_of_a_list_have_each_number_once(numbers):
    shards = []
    for at, number in enumerate(numbers):
        entries = [value("split.count", UINT16, 2)]
        entries += [value("split.no", INT32, number)] if number is not None else []
        shards.append(gguf([(f"t{at}", *floats(1))], entries))
    with pytest.raises(nd.GgufError, match=r"split\.no is .*; it must be 0 to 1, different in each file"):
        nd.open(shards)


def test_shards_are_found_beside_a_link_whatever_it_leads_to(tmp_path):
    """As the cache of Hugging Face has them: links with the names, to blobs without."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(SHARDS):
        shutil.copy(path, tmp_path / "blobs" / f"{number:064x}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number:064x}")
    assert_is_the_split(nd.open(tmp_path / "snapshot" / SHARDS[0].name))
    with pytest.raises(
        nd.GgufError, match=r"does not end in -00001-of-00003\.gguf.*all shards as a list: open\(\[\.\.\.\]\)"
    ):
        nd.open(tmp_path / "blobs" / f"{0:064x}")
    assert_is_the_split(nd.open(sorted((tmp_path / "blobs").iterdir())))


def test_shards_are_found_beside_what_a_link_of_another_name_leads_to(tmp_path):
    (tmp_path / "model.gguf").symlink_to(SHARDS[0])
    assert_is_the_split(nd.open(tmp_path / "model.gguf"))


# Downloads


@pytest.fixture
def incomplete(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT[:-40])
    return path


def test_a_file_whose_data_is_not_all_there_says_so(incomplete):
    with pytest.raises(
        nd.GgufError, match=f"has {len(CONTENT) - 40} bytes, but tensor 'u' ends .* download is incomplete"
    ):
        nd.open(incomplete)


def test_a_file_that_ends_within_its_header_says_so(path):
    data = nd.open(path).tensors["t"].offset
    for length in range(8, data - 32):
        for options in ({}, {"allow_truncated": True}):
            with pytest.raises(nd.GgufError, match=r"the download may be incomplete"):
                nd.open(CONTENT[:length], **options)


def test_an_incomplete_file_is_opened_on_request(incomplete):
    model = nd.open(incomplete, allow_truncated=True)
    assert list(model.tensors) == ["t", "u"]
    assert model.n_bytes == (len(CONTENT) - 40, len(CONTENT) - 8)
    np.testing.assert_array_equal(model.load("t", "float32", device="cpu"), counted(4))
    np.testing.assert_array_equal(nd.load(incomplete, "t", device="cpu", allow_truncated=True)["t"], counted(4))
    for use in (lambda: model.load("u", device="cpu"), lambda: model.load_all(device="cpu"), lambda: model.read("u")):
        with pytest.raises(nd.GgufError, match=r"tensor 'u' ends at .*: its download is incomplete"):
            use()
    with pytest.raises(nd.GgufError, match=r"tensor 'u' ends at .*: its download is incomplete"):
        model.read("u", mmap=True)
    np.testing.assert_array_equal(model.load("u", "float32", device="cpu", rows=slice(0, 0)), np.empty((0, 3)))


def test_what_has_arrived_since_is_loaded(incomplete):
    model = nd.open(incomplete, allow_truncated=True)
    with incomplete.open("ab") as file:
        file.write(CONTENT[-40:])
    assert_loads(model)


def test_another_file_that_is_longer_is_not_taken_for_the_rest(incomplete):
    model = nd.open(incomplete, allow_truncated=True)
    incomplete.write_bytes(OTHER_HEADER)
    with pytest.raises(nd.ReadError, match="has changed"):
        model.load("u", device="cpu")


def test_a_small_file_that_asks_for_many_shards(tmp_path, monkeypatch, capsys):
    """They are not opened one by one, and `info` names only a few: 65,534 names were 2.6 MB."""
    paths = {}
    for count in (1000, 65535):
        entries = [value("split.no", UINT16, 0), value("split.count", UINT16, count)]
        paths[count] = tmp_path / f"m-00001-of-{count:05}.gguf"
        paths[count].write_bytes(gguf([("t", *floats(2))], entries))
    opened = []
    monkeypatch.setattr(
        source, "open_regular", lambda path, right=source.open_regular: opened.append(path) or right(path)
    )
    model = nd.open(paths[65535], allow_truncated=True, limits=nd.Limits(shards=65535))
    assert len(model.missing_shards) == 65534
    assert main.main(["info", str(paths[1000])]) == 0
    assert opened == [str(paths[65535]), str(paths[1000])]
    shown = capsys.readouterr().out
    assert "m-00011-of-01000.gguf and 989 more; tensors of the other shards:" in shown
    assert len(shown) < 20 * len(str(paths[1000])) + 500


@pytest.mark.parametrize("content", [OTHER_HEADER[:-40], CONTENT[:-44], b""])
def test_an_incomplete_file_that_has_changed_is_not_taken_for_incomplete(incomplete, content):
    model = nd.open(incomplete, allow_truncated=True)
    incomplete.write_bytes(content)
    for name in "tu":
        with pytest.raises((nd.ReadError, nd.GgufError)) as caught:
            model.load(name, device="reference")
        is_truncated = len(content) < len(CONTENT) - 40 and (name == "u" or not content)
        assert ("download is incomplete" in str(caught.value)) is is_truncated
        assert ("has changed" in str(caught.value)) is not is_truncated


def test_a_new_time_of_an_incomplete_file_is_warned_of(incomplete):
    model = nd.open(incomplete, allow_truncated=True)
    os.utime(incomplete, (0, 0))
    with pytest.warns(RuntimeWarning, match="its time stamp has changed"):
        model.load("t", device="reference")


def test_a_split_of_which_shards_are_still_missing_is_opened_on_request(tmp_path):
    shutil.copy(SHARDS[0], tmp_path)
    with pytest.raises(nd.GgufError, match=r"shard .*split-00002.* is missing"):
        nd.open(tmp_path / SHARDS[0].name)
    model = nd.open(tmp_path / SHARDS[0].name, allow_truncated=True)
    assert len(model.tensors) == 2
    assert model.missing_shards == tuple(str(tmp_path / path.name) for path in SHARDS[1:])
    assert len(model.load_all(device="cpu")) == 2


def test_shards_that_disappear_before_they_are_read_are_missing_too(tmp_path, monkeypatch):
    shutil.copy(SHARDS[0], tmp_path)
    monkeypatch.setattr(os.path, "lexists", lambda _: True)
    model = nd.open(tmp_path / SHARDS[0].name, allow_truncated=True)
    assert model.missing_shards == tuple(str(tmp_path / path.name) for path in SHARDS[1:])


@pytest.mark.parametrize("option", ["allow_truncated", "orig_shapes"])
def test_an_option_that_is_no_flag_is_refused(option):
    with pytest.raises(nd.OptionError, match=option):
        nd.open(gguf(), **{option: "yes"})


def test_info_of_an_incomplete_file(incomplete, capsys):
    from numba_dequant.cli import main

    assert main.main(["info", str(incomplete)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(CONTENT) - 40} of {len(CONTENT) - 8} bytes are here; the file looks incomplete" in shown
    assert "2 x 3" in shown


# The shapes of ComfyUI-GGUF


RESHAPED = "w", (9, 128), "F16", np.arange(9 * 128, dtype="<f2").tobytes()


def comfy(shape, kind=INT32, tensor=RESHAPED):
    return gguf(
        [tensor], [value("comfy.gguf.orig_shape.w", kind, shape), value("comfy.gguf.orig_shape.no", INT32, [1])]
    )


def test_original_shapes_are_given_on_request():
    content = comfy([32, 4, 3, 3])
    expected = np.arange(9 * 128, dtype=np.float16)
    assert nd.open(content).load("w", device="cpu").shape == (9, 128)
    model = nd.open(content, orig_shapes=True)
    for device in ("cpu", "reference"):
        np.testing.assert_array_equal(model.load("w", device=device), expected.reshape(32, 4, 3, 3))
        np.testing.assert_array_equal(
            model.load("w", device=device, rows=slice(3, 5))[0, 0], expected[108:117].reshape(3, 3)
        )
    assert model.load("w", device="cpu", keep_quantized=True).shape == (32, 4, 3, 3)
    np.testing.assert_array_equal(nd.load(content, device="cpu", orig_shapes=True)["w"], expected.reshape(32, 4, 3, 3))


def test_rows_of_an_original_shape_are_whole_blocks_or_refused():
    data = random_blocks("Q8_0", 36)
    model = nd.open(comfy([32, 4, 3, 3], tensor=("w", (36, 32), "Q8_0", data.tobytes())), orig_shapes=True)
    whole = model.load("w", device="cpu")
    assert_same_bits(whole, nd.dequantize(data, "Q8_0", shape=(32, 4, 3, 3), device="reference"))
    np.testing.assert_array_equal(model.load("w", device="cpu", rows=slice(8, 24)), whole[8:24])
    with pytest.raises(nd.ShapeError, match="not whole blocks of 32"):
        model.load("w", device="cpu", rows=slice(1, 2))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ([32, 4, 3], INT32),
        ([-32, -4, 3, 3], INT32),
        ([], INT32),
        ([1] * 9, INT32),
        (1152, INT32),
        (["1152"], STRING),
        ([1152.0], 6),
        ([1], 7),
    ],
)
def test_an_original_shape_that_does_not_fit_is_refused(shape, kind):
    with pytest.raises(nd.GgufError, match=r"orig_shape\.w'.*up to 8 integers whose product is 1152"):
        nd.open(comfy(shape, kind), orig_shapes=True)
    nd.open(comfy(shape, kind))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((0, 5), True),
        (((1 << 60) - 1, 0, 0), True),
        ((1, 1, 1, 1, 1, 1, 1, 0), True),
        ((0, 1 << 60), False),
        ((1 << 30, 0, 1 << 30), False),
    ],
)
def test_an_original_shape_without_elements_is_one_that_numpy_holds(shape, fits):
    content = comfy(shape, INT64, ("w", (2, 0), "F16", b""))
    if fits:
        assert nd.open(content, orig_shapes=True).tensors["w"].shape == shape
    else:
        with pytest.raises(nd.GgufError, match=r"orig_shape\.w' is .*; it must be up to 8 integers"):
            nd.open(content, orig_shapes=True)


def test_a_key_of_another_meaning_is_no_original_shape():
    key = "x" * len("comfy.gguf.orig_shape.") + "w"
    content = gguf([RESHAPED], [value(key, INT32, [1152])])
    assert nd.open(content, orig_shapes=True).tensors["w"].shape == (9, 128)


def test_models_and_tensors_that_were_pickled_are_what_they_were(path):
    model = nd.open(path)
    again = pickle.loads(pickle.dumps(model))
    assert_loads(again)
    assert again.tensors["t"].source == model.tensors["t"].source
    assert hash(again.tensors["t"].source) == hash(model.tensors["t"].source)
    assert (model.tensors["t"].source == "model.gguf") is False
    assert len({id(tensor.source) for tensor in again.tensors.values()}) == 1
    os.utime(path, (0, 0))
    with pytest.warns(RuntimeWarning):
        assert_loads(pickle.loads(pickle.dumps(model)))


def test_nothing_stays_open(path):
    def n_open():
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    model = nd.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_loads(model)
        for bad in (DATA / "gguf" / "bad").glob("*.gguf"):
            with contextlib.suppress(nd.GgufError):
                nd.open(bad)
    assert n_open() == before
    assert stat.S_ISREG(path.stat().st_mode)


def test_opening_and_reading_touches_neither_numba_nor_cuda(path):
    code = f"""
import sys
import numba_dequant as nd
model = nd.open({str(path)!r})
model._repr_html_(), list(model.metadata["a"]), model.read("t"), model.load("t", device="reference")
found = {{"numba", "llvmlite", "cuda", "torch"}} & {{name.partition(".")[0] for name in sys.modules}}
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
