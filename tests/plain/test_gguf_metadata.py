"""Metadata: arrays and long strings that stay in the file until they are looked at, and what is made of them."""

import copy
import json
import os
import pickle
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from gguf_bytes import BOOL, FLOAT32, FLOAT64, INT16, INT32, STRING, UINT8, UINT64, entry, floats, gguf, text, value

import numba_dequant as nd
from numba_dequant.cli import main
from numba_dequant.gguf import header
from numba_dequant.gguf import metadata as metadata_module
from numba_dequant.gguf.header import WINDOW
from numba_dequant.gguf.metadata import LONG_STRING, MetadataArray
from numba_dequant.gguf.source import Source
from numba_dequant.kernels import native

ARRAYS = {
    "bytes": (UINT8, [1, 2, 255]),
    "shorts": (INT16, [-(1 << 15), 0, (1 << 15) - 1]),
    "integers": (INT32, list(range(-50, 50))),
    "large": (UINT64, [(1 << 64) - 1, 0]),
    "floats": (FLOAT32, [0.5, -1.25, float("inf")]),
    "doubles": (FLOAT64, [0.1]),
    "bools": (BOOL, [True, False, True]),
    "strings": (STRING, ["", "a", "ü☃", "x" * 300, "a\0", "\0"]),
    "none": (INT32, []),
    "no strings": (STRING, []),
}


@pytest.fixture(params=ARRAYS)
def kind(request):
    return request.param


@pytest.fixture(params="<>", ids=["little", "big"])
def order(request):
    return request.param


@pytest.fixture(params=["disk", "memory"])
def opened(request, tmp_path):
    """Open contents, from disk or from memory."""

    def open_content(content):
        if request.param == "memory":
            return nd.open(content)
        path = tmp_path / f"{zlib.crc32(content)}.gguf"
        if not path.exists():
            path.write_bytes(content)
        return nd.open(path)

    return open_content


def all_arrays(order="<"):
    return gguf(entries=[value(key, *content, order) for key, content in ARRAYS.items()], order=order)


def test_an_array_is_what_the_list_of_its_items_is(opened, kind, order):
    expected = ARRAYS[kind][1]
    content = all_arrays(order)

    def fresh():
        return opened(content).metadata[kind]

    assert isinstance(fresh(), list)
    assert type(fresh().to_list()) is list
    for make in (list, tuple, len, bool, sorted, lambda array: list(reversed(array)), lambda array: [*array]):
        assert make(fresh()) == make(expected)
    assert fresh() == expected
    assert expected == fresh()
    assert fresh() == fresh()
    assert fresh() != [*expected, 1]
    assert [*expected, 1] != fresh()
    one = [1]
    assert fresh() + one == expected + one
    assert one + fresh() == one + expected
    assert fresh() + fresh() == expected + expected
    assert fresh() * 2 == 2 * fresh() == expected * 2
    assert fresh().copy() == expected
    assert "nothing" not in fresh()
    grown = [1]
    grown += fresh()
    assert grown == [1, *expected]
    for item in expected:
        assert item in fresh()
        assert fresh().index(item) == expected.index(item)
        assert fresh().count(item) == expected.count(item)
        assert type(fresh()[expected.index(item)]) is type(item)
    np.testing.assert_array_equal(np.array(fresh()), np.array(expected))


def test_items_and_slices_are_those_of_a_list(opened, kind, order):
    expected = ARRAYS[kind][1]
    content = all_arrays(order)
    array = opened(content).metadata[kind]
    for start in (None, 0, 1, -1, -2, 5, -500, 500):
        for stop in (None, 0, 2, -1, 3, 500, -500):
            for step in (None, 1, 2, -1, -3):
                part = slice(start, stop, step)
                assert opened(content).metadata[kind][part] == array[part] == expected[part], part
    for index in range(-len(expected), len(expected)):
        assert opened(content).metadata[kind][index] == array[index] == expected[index]
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            opened(content).metadata[kind][index]
    with pytest.raises(TypeError):
        array["0"]


def test_metadata_goes_to_json_and_back(opened):
    metadata = opened(all_arrays()).metadata
    expected = {key: content for key, (_, content) in ARRAYS.items()}
    assert json.loads(json.dumps(dict(metadata))) == expected
    for options in ({"indent": 1}, {"sort_keys": True}, {"ensure_ascii": False}, {"default": repr}):
        assert json.loads(json.dumps(dict(opened(all_arrays()).metadata), **options)) == expected
    for key, content in expected.items():
        assert json.loads(json.dumps(metadata[key].to_list())) == json.loads(json.dumps(metadata[key])) == content
    odd = opened(gguf(entries=[value("f", FLOAT32, [float("nan")]), value("s", STRING, [b"\xff"])])).metadata
    assert json.dumps(dict(odd)) == '{"f": [NaN], "s": ["\\ufffd"]}'


def test_an_array_cannot_be_changed(opened):
    array = opened(all_arrays()).metadata["integers"]
    changes = [
        lambda: array.append(1),
        lambda: array.extend([1]),
        lambda: array.insert(0, 1),
        array.pop,
        lambda: array.remove(0),
        array.clear,
        array.reverse,
        lambda: array.sort(key=abs),
        lambda: array.__setitem__(0, 5),
        lambda: array.__delitem__(0),
        lambda: array.__iadd__([1]),
        lambda: array.__imul__(2),
    ]
    for change in changes:
        with pytest.raises(nd.OptionError, match="is read-only; change the list that its"):
            change()
    array.to_list().append(5)
    assert array == ARRAYS["integers"][1]


def test_no_method_of_list_looks_at_a_list_that_is_empty():
    """What `MetadataArray` leaves to `list` would see no items."""
    harmless = {"__new__", "__init__", "__getattribute__", "__hash__", "__doc__", "__class_getitem__", "__sizeof__"}
    assert {name for name in vars(list) if name not in vars(MetadataArray)} <= harmless


def test_arrays_are_pickled_and_copied_without_being_read(tmp_path):
    (tmp_path / "m.gguf").write_bytes(all_arrays())
    array = nd.open(tmp_path / "m.gguf").metadata["strings"]
    none = nd.open(tmp_path / "m.gguf").metadata["none"]
    kept = [pickle.dumps(array, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    (tmp_path / "m.gguf").rename(tmp_path / "away")
    assert none.to_list() == []
    copies = [copy.copy(array), copy.deepcopy(array), *map(pickle.loads, kept)]
    (tmp_path / "away").rename(tmp_path / "m.gguf")
    for each in copies:
        assert type(each) is MetadataArray
        assert each == ARRAYS["strings"][1]


def test_looking_at_items_reads_no_more_than_they_need(tmp_path):
    n = 1 << 25
    head = gguf(entries=[entry("a", 9, struct.pack("<IQ", FLOAT32, n))])[:49]
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(49 + 4 * n)
        file.seek(49 + 4 * (n - 1))
        file.write(np.float32(7).tobytes())
    tracemalloc.start()
    start = time.process_time()
    model = nd.open(path)
    array = model.metadata["a"]
    assert (array[0], array[-1], array[n - 1], array[:3], array[-2:]) == (0, 7, 7, [0, 0, 0], [0, 7])
    assert "(33,554,432 items)" in model._repr_html_()
    assert main.main(["info", str(path)]) == 0
    assert sum(array[index] for index in range(100)) == 0
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_looking_at_a_string_reads_up_to_it(tmp_path):
    strings = ["short", "y" * (4 * WINDOW), "after", *["z"] * 100_000, "last"]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(entries=[value("a", STRING, strings)]))
    tracemalloc.start()
    model = nd.open(path)
    assert model.metadata["a"][:1] == ["short"]
    assert model.metadata["a"][0] == "short"
    assert model.metadata["a"][2] == "after"
    assert model.metadata["a"][-1] == "last"
    assert f"['short', '{'y' * 57}...', 'after', ...] (100,004 items)" in dict(model.metadata.shown())["a"]
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert model.metadata["a"][1] == strings[1]


def test_going_through_an_array_by_index_does_not_read_the_file_each_time(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(entries=[value("a", STRING, [f"token{n}" for n in range(50_000)])]))
    array = nd.open(path).metadata["a"]
    start = time.process_time()
    assert [array[index] for index in range(50_000)] == array
    assert time.process_time() - start < 2


def test_the_file_is_opened_for_few_items_of_an_array_that_is_not_too_long(opened, monkeypatch):
    content, real, n_opened = gguf(entries=[value("a", INT32, list(range(50)))]), Source.open, []

    def counted_open(source):
        n_opened.append(source)
        return real(source)

    monkeypatch.setattr(Source, "open", counted_open)

    def times(array):
        n_opened.clear()
        assert [array[index] for index in range(50)] == list(range(50))
        return len(n_opened)

    kept = opened(content).metadata["a"]
    assert 2 < times(kept) < 15
    assert times(kept) == 0
    whole = opened(content).metadata["a"]
    assert sum(whole) == 1225
    assert times(whole) == 0
    monkeypatch.setattr(metadata_module, "MAX_KEPT_ITEMS", 50)
    assert times(opened(content).metadata["a"]) < 15
    monkeypatch.setattr(metadata_module, "MAX_KEPT_ITEMS", 49)
    assert times(opened(content).metadata["a"]) == 50


@pytest.mark.parametrize("length", [LONG_STRING - 1, LONG_STRING, LONG_STRING + 1, 3 * LONG_STRING])
def test_long_strings_are_strings(opened, length, order):
    content = "ü" + "x" * (length - 3) + "y"
    model = opened(gguf(entries=[value("k", STRING, content + "\0", order), value("n", UINT8, 5, order)], order=order))
    assert len(content.encode()) == length
    assert model.metadata["k"] == content
    assert model.metadata.get("k") == content
    assert dict(model.metadata) == {"k": content, "n": 5}
    assert dict(model.metadata.shown()) == {"k": repr("ü" + "x" * 56 + "..."), "n": "5"}
    assert pickle.loads(pickle.dumps(model)).metadata["k"] == content
    assert json.loads(json.dumps(dict(model.metadata)))["k"] == content


def test_metadata_is_shown_shortened_where_it_is_long(opened):
    entries = [value(f"k{number}", STRING, "x" * (60 + number)) for number in range(2)]
    whole = opened(gguf(entries=entries)).metadata
    items = opened(gguf(entries=[value("a", STRING, ["x" * 1000, "b", "c"])])).metadata
    assert repr(items) == f"Metadata('a': ['{'x' * 57}...', 'b', 'c'] (3 items))"
    assert repr(whole) == f"Metadata('k0': '{'x' * 60}', 'k1': '{'x' * 57}...')"
    many = [*entries, *(value(f"n{number}", UINT8, number) for number in range(59))]
    assert repr(opened(gguf(entries=many[:60])).metadata).endswith(", 'n57': 57)")
    assert repr(opened(gguf(entries=many)).metadata).endswith(", 'n57': 57, and 1 more)")


def test_a_long_string_of_long_characters_is_shown_like_any(opened):
    content = "\N{GRINNING FACE}" * LONG_STRING
    metadata = opened(gguf(entries=[value("k", STRING, content)])).metadata
    assert dict(metadata.shown()) == {"k": repr("\N{GRINNING FACE}" * 57 + "...")}


def test_nothing_but_nuls_is_cut_off_a_key_and_a_string(opened):
    ends = [f"end{chr(code)}" for code in range(1, 128)]
    metadata = opened(gguf(entries=[value(f"{end}\0", STRING, f"{end}\0\0") for end in ends])).metadata
    assert dict(metadata) == {end: end for end in ends}


def test_a_value_that_memory_does_not_hold_is_an_error_of_ours(opened, monkeypatch):
    entries = [value("a", INT32, [1, 2]), value("k", STRING, "x" * (LONG_STRING + 1))]
    metadata = opened(gguf(entries=entries)).metadata

    def take(*arguments):
        raise MemoryError

    monkeypatch.setattr(header.Cursor, "take", take)
    for key, use in (("a", lambda: metadata["a"][0]), ("k", lambda: metadata["k"])):
        with pytest.raises(nd.DeviceError, match=f"metadata '{key}': out of memory"):
            use()


def test_looking_at_values_changes_nothing_about_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([("t", *floats(1))], [value("a", STRING, [f"token{number}" for number in range(100_000)])]))
    model = nd.open(path)
    assert model.metadata["a"][-1] == "token99999"
    assert model.tensors["t"].source == nd.open(path).tensors["t"].source


def test_opening_takes_no_memory_for_long_strings(tmp_path):
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 60))
        for number in range(60):
            file.write(text(f"k{number}") + struct.pack("<IQ", STRING, 1 << 22) + "\N{GRINNING FACE}".encode())
            file.seek((1 << 22) - 4, os.SEEK_CUR)
        file.truncate()
    tracemalloc.start()
    start = time.process_time()
    model = nd.open(path)
    model._repr_html_()
    assert main.main(["info", str(path)]) == 0
    assert time.process_time() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["string", "item"])
def test_a_string_that_is_longer_than_any_may_be_is_refused_when_opened(tmp_path, kind):
    path = tmp_path / "m.gguf"
    payload = struct.pack("<Q", (1 << 26) + 1)
    if kind == "item":
        payload = struct.pack("<IQ", STRING, 200) + text("x") * 150 + payload
    with path.open("wb") as file:
        file.write(gguf(entries=[entry("k", STRING if kind == "string" else 9, payload)])[: 37 + len(payload)])
        file.truncate(1 << 28)
    with pytest.raises(nd.GgufError, match=r"metadata 'k' (item )?has 67,108,865 bytes; the limit is 67,108,864"):
        nd.open(path)


def test_strings_beyond_2_gib_of_a_header_are_passed_over_and_read(tmp_path):
    path = tmp_path / "m.gguf"
    tokens = [f"token{number}" for number in range(100_000)]
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 7))
        for number in range(5):
            file.write(text(f"u{number}") + struct.pack("<IIQ", 9, UINT64, 1 << 26))
            file.seek(8 << 26, os.SEEK_CUR)
        file.write(value("v", STRING, tokens) + value("n", UINT8, 7))
    if path.stat().st_blocks * 512 > 1 << 28:
        pytest.skip("this disk has no sparse files")
    assert path.stat().st_size > 5 << 29
    model = nd.open(path, limits=nd.Limits(header_bytes=1 << 32))
    assert model.metadata["n"] == 7
    assert model.metadata["v"] == tokens


def test_info_shows_what_can_be_shown(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    entries = [
        value("k" * 65535, UINT8, 1),
        value("esc\x1b", STRING, "\x1b[31m"),
        value("bad", STRING, ["fine", b"\xff"]),
        value("many", STRING, ["a"] * 5),
        *(value(f"{number:x}", UINT8, 1) for number in range(300)),
    ]
    path.write_bytes(gguf([("t" * 65535, (1,), "F32", bytes(4))], entries))
    assert main.main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert len(shown) < 50_000
    assert "\x1b" not in shown
    for line in (
        "['fine', '\N{REPLACEMENT CHARACTER}'] (2 items)",
        "['a', 'a', 'a', ...] (5 items)",
        "kkk...kkk",
        "ttt...ttt",
    ):
        assert line in shown
    assert len(nd.open(path)._repr_html_()) < 100_000


@pytest.mark.parametrize("window", [64, 4096, 1 << 20])
def test_strings_are_passed_alike_by_compiled_code_and_by_numpy(monkeypatch, window):
    """A process that has loaded a model to a GPU has compiled code for it."""
    rng = np.random.default_rng(window)
    lengths = rng.choice([0, 0, 1, 3, 7, 8, 100, 255, 256, 300, 5000], 3000)
    items = [bytes(rng.integers(32, 127, length, np.uint8)) for length in lengths]
    data = gguf([], [value("a", STRING, items), value("behind", INT32, 7)])
    monkeypatch.setattr(header, "WINDOW", window)
    native.ensure_compiled()
    for is_loaded in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(native, "is_loaded", lambda answer=is_loaded: answer)
            model = nd.open(data)
            assert model.metadata["behind"] == 7
            assert model.metadata["a"].to_list() == [item.decode() for item in items]
            assert model.metadata["a"][2999] == items[2999].decode()
            with pytest.raises(nd.GgufError, match=r"may be incomplete"):
                nd.open(data[: len(data) // 2])
