"""`numba-dequant info --json` and `diff`, and colours."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from blocks import random_blocks, write_model
from gguf_bytes import BOOL, FLOAT32, FLOAT64, INT32, STRING, UINT8, UINT32, UINT64, counted, floats, gguf, value

import numba_dequant as nd
from numba_dequant.cli import colour, comparison, json_text, main
from numba_dequant.cli.verify import SAMPLE

GOOD = sorted((Path(__file__).parents[1] / "data" / "gguf" / "good").glob("*.gguf"))
HOSTILE = "\x1b[2J\x9b1m\u202e\n\r\0\"'\\</script>\ud7ff"


def described(path, capsys):
    assert main.main(["info", str(path), "--json"]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii()
    return json.loads(shown, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def write(path, tensors=(), entries=()):
    path.write_bytes(gguf(tensors, entries))
    return str(path)


@pytest.mark.parametrize("path", [path for path in GOOD if "split-0000" not in path.name or "00001" in path.name])
def test_json_says_what_the_file_has(path, capsys):
    with nd.open(path) as model:
        found = described(path, capsys)
        assert set(found) == {"path", "bytes", "bytes_here", "missing_shards", "metadata", "tensors"}
        assert list(found["metadata"]) == list(model.metadata)
        assert [tuple(each["shape"]) for each in found["tensors"]] == [each.shape for each in model.tensors.values()]
        for each in found["tensors"]:
            tensor = model.tensors[each["name"]]
            assert (each["format"], each["bytes"], each["offset"]) == (
                tensor.format.name,
                tensor.n_bytes,
                tensor.offset,
            )


def test_json_of_hostile_text(tmp_path, capsys):
    entries = [value(f"k{HOSTILE}", STRING, HOSTILE), value("a", STRING, [HOSTILE, b"\xff"])]
    path = write(tmp_path / "m.gguf", [("a" + HOSTILE.replace("\0", ""), *floats(2))], entries)
    found = described(path, capsys)
    assert found["metadata"] == {f"k{HOSTILE}": HOSTILE, "a": [HOSTILE, "\ufffd"]}
    assert found["tensors"][0]["name"] == "a" + HOSTILE.replace("\0", "")


def test_json_of_numbers_that_json_lacks(tmp_path, capsys):
    inf, nan = float("inf"), float("nan")
    entries = [value("f", FLOAT32, nan), value("d", FLOAT64, -inf), value("a", FLOAT32, [1.5, inf, nan])]
    entries += [value("u", UINT64, 2**64 - 1), value("t", BOOL, 1)]
    found = described(write(tmp_path / "m.gguf", entries=entries), capsys)["metadata"]
    assert found == {"f": "NaN", "d": "-Infinity", "a": [1.5, "Infinity", "NaN"], "u": 2**64 - 1, "t": True}


def test_json_says_what_it_cuts(tmp_path, capsys):
    items, characters = json_text.SHOWN_ITEMS, json_text.SHOWN_CHARACTERS
    entries = [
        value("whole", UINT8, [1] * items), value("array", UINT8, [1] * (items + 1)),
        value("text", STRING, "é" * characters), value("longer", STRING, "é" * (characters + 1)),
        value("longest", STRING, "x" * (1 << 21)), value("items", STRING, ["x" * 2000, "y"]),
    ]  # fmt: skip
    found = described(write(tmp_path / "m.gguf", entries=entries), capsys)["metadata"]
    assert found["whole"] == [1] * items
    assert found["array"] == {"first": [1] * items, "items": items + 1}
    assert found["text"] == "é" * characters
    assert found["longer"] == {"first": "é" * characters, "characters": characters + 1}
    assert found["longest"] == {"first": "x" * characters, "bytes": 1 << 21}
    assert found["items"] == {"first": ["x" * 1000, "y"], "items": 2}


def test_json_of_a_value_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "m.gguf", entries=[value("array", UINT8, [1]), value("n", UINT8, 1)])
    real = nd.open

    def opened(path, **options):
        model = real(path, **options)
        os.remove(path)
        return model

    monkeypatch.setattr(nd, "open", opened)
    found = described(path, capsys)["metadata"]
    assert found["n"] == 1
    assert "No such file" in found["array"]["error"]


def test_json_of_a_file_that_is_incomplete(tmp_path, capsys):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([("w", *floats(104))])[:-200])
    found = described(path, capsys)
    assert found["bytes"] - found["bytes_here"] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text here")
def test_json_of_a_path_that_is_not_utf8(tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/\xff\x1b.gguf"
    with open(path, "wb") as file:
        file.write(gguf())
    assert os.fsencode(described(os.fsdecode(path), capsys)["path"]) == path


# diff


def differences(capsys, *arguments):
    status = main.main(["diff", *map(str, arguments)])
    shown = capsys.readouterr()
    assert status in (0, 1), shown.err
    assert status == int(shown.out.splitlines()[2:] != ["No difference."])
    return shown.out.splitlines()[2:]


def test_a_file_does_not_differ_from_itself(capsys):
    assert differences(capsys, SAMPLE, SAMPLE, "--device", "reference") == ["No difference."]


def test_metadata_that_differs(tmp_path, capsys):
    nan = float("nan")
    same = [value("nan", FLOAT32, nan), value("nans", FLOAT32, [nan, 1]), value("long", STRING, "x" * (1 << 21))]
    a = [value("gone", STRING, "x\x1b"), value("number", UINT32, 1), value("tokens", INT32, [1, 2, 3]), *same]
    b = [value("new", UINT8, 5), value("number", UINT32, 2), value("tokens", INT32, [1, 2, 4, 5]), *same]
    a += [value("type", UINT32, 1), value("longest", STRING, "x" * (1 << 21))]
    b += [value("type", BOOL, 1), value("longest", STRING, "x" * ((1 << 21) - 1) + "y")]
    paths = write(tmp_path / "a.gguf", entries=a), write(tmp_path / "b.gguf", entries=b)
    assert differences(capsys, *paths) == [
        r"- gone: 'x\x1b'",
        "- number: 1",
        "+ number: 2",
        "~ tokens: item 2 is the first that differs",
        "- tokens: [1, 2, 3] (3 items)",
        "+ tokens: [1, 2, 4, ...] (4 items)",
        "- type: 1",
        "+ type: True",
        f"- longest: '{'x' * 57}...'",
        f"+ longest: '{'x' * 57}...'",
        "+ new: 5",
    ]


def test_an_array_that_differs_late(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "ITEMS_AT_ONCE", 10)
    items = list(range(35))
    a = write(tmp_path / "a.gguf", entries=[value("k", INT32, items)])
    b = write(tmp_path / "b.gguf", entries=[value("k", INT32, [*items[:-1], 0])])
    assert differences(capsys, a, b)[0] == "~ k: item 34 is the first that differs"


@pytest.mark.parametrize("elements", [comparison.SLICE_ELEMENTS, 64])
def test_tensors_that_differ(tmp_path, capsys, monkeypatch, elements):
    monkeypatch.setattr(comparison, "SLICE_ELEMENTS", elements)
    blocks = random_blocks("Q8_0", 40).view(nd.FORMATS["Q8_0"].layout).copy()
    blocks["d"] = 0.01
    blocks = blocks.view(np.uint8)
    values = np.asarray(nd.dequantize(blocks, "Q8_0", "float32", device="reference"))
    other = values.copy()
    other[77] += 3
    tensors_a = {
        "same": ("Q8_0", (2, 32), random_blocks("Q8_0", 2)),
        "gone": ("F32", (2,), bytes(8)),
        "format": ("Q8_0", (20, 64), blocks),
        "values": ("F32", (20, 64), values.tobytes()),
        "shape": ("F32", (2, 3), bytes(24)),
        "both": ("F32", (64,), bytes(256)),
        "ids": ("I32", (3,), np.array([3, 4, 0], "<i4").tobytes()),
        "none": ("Q4_K", (0, 256), b""),
        "zero": ("F32", (1,), bytes(4)),
    }
    tensors_b = tensors_a | {
        "format": ("F32", (20, 64), values.tobytes()),
        "values": ("F32", (20, 64), other.tobytes()),
        "shape": ("F32", (3, 2), bytes(24)),
        "both": ("Q8_0", (32,), random_blocks("Q8_0", 1)),
        "ids": ("I32", (3,), np.array([3, 4, 5], "<i4").tobytes()),
        "none": ("F32", (0, 256), b""),
        "zero": ("F32", (1,), np.float32(1).tobytes()),
        "new": ("F32", (), bytes(4)),
    }
    del tensors_b["gone"]
    paths = write_model(tmp_path / "a.gguf", tensors_a), write_model(tmp_path / "b.gguf", tensors_b)
    head, *lines = differences(capsys, *paths, "--device", "reference")
    assert head.split() == ["tensor", "format", "shape", "what", "differs", "relative", "error", "largest"]
    norm = np.sqrt(np.square(values.astype(np.float64)).sum())
    assert [line.split() for line in lines] == [
        ["-", "gone", "F32", "2", "only", "in", "A"],
        ["~", "format", "Q8_0", "->", "F32", "20", "x", "64", "format", "0", "0"],
        ["~", "values", "F32", "20", "x", "64", "bytes", f"{3 / norm:.3g}", "3"],
        ["~", "shape", "F32", "2", "x", "3", "->", "3", "x", "2", "shape"],
        ["~", "both", "F32", "->", "Q8_0", "64", "->", "32", "shape", "and", "format"],
        ["~", "ids", "I32", "3", "bytes", "1", "5"],
        ["~", "none", "Q4_K", "->", "F32", "0", "x", "256", "format", "0", "0"],
        ["~", "zero", "F32", "1", "bytes", "inf", "1"],
        ["+", "new", "F32", "scalar", "only", "in", "B"],
    ]


@pytest.mark.parametrize(
    ("a", "b", "error", "largest"),
    [
        ([3, 4], [3, 4.5], 0.1, 0.5),
        ([np.nan, 4], [np.nan, 4], 0, 0),
        ([np.inf, 4], [np.inf, 5], 0.25, 1),
        ([np.inf, 4], [-np.inf, 4], np.inf, np.inf),
        ([np.nan, 4], [1, 4], np.inf, np.inf),
        ([0, 0], [-0.0, 0], 0, 0),
    ],
    ids=["values", "NaNs", "infinities", "infinities that differ", "one NaN", "zeros"],
)
def test_the_relative_error(a, b, error, largest):
    pair = np.array(a, np.float32), np.array(b, np.float32)
    assert comparison._error(iter([pair])) == pytest.approx((error, largest))


def test_selected_tensors_alone_are_compared(tmp_path, capsys):
    a = write(tmp_path / "a.gguf", [("x", *floats(2)), ("y", *floats(2)), ("gone", *floats(2))])
    b = write(tmp_path / "b.gguf", [("x", *floats(2)), ("y", *floats(3)), ("new", *floats(2))])
    assert main.main(["diff", a, b, "--select", "x"]) == 0
    assert "No difference in these tensors and in the metadata." in capsys.readouterr().out
    assert [line.split()[1] for line in differences(capsys, a, b, "--select", "n*", "--select", "y")[1:]] == [
        "y",
        "new",
    ]
    assert main.main(["diff", a, b, "--select", "none"]) == 2
    assert "there is no tensor 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_cannot_be_compared(tmp_path, capsys, place):
    paths = [write(tmp_path / "a.gguf"), str(tmp_path / "none.gguf")]
    assert main.main(["diff", *(paths if place else paths[::-1])]) == 2
    assert "none.gguf: No such file" in capsys.readouterr().err


def test_another_byte_order_is_no_difference(tmp_path, capsys):
    tensor = "w", (3, 5), "F32", counted(3, 5)
    for order, name in (("<", "a.gguf"), (">", "b.gguf")):
        raw = tensor[3].astype(f"{order}f4").tobytes()
        (tmp_path / name).write_bytes(gguf([(*tensor[:3], raw)], order=order))
    assert differences(capsys, tmp_path / "a.gguf", tmp_path / "b.gguf") == ["No difference."]


def test_hostile_names_in_a_diff(tmp_path, capsys):
    name = HOSTILE.replace("\0", "")
    a = write(tmp_path / f"a{name.replace('/', '')}.gguf", [(name, *floats(2))], [value(HOSTILE, STRING, HOSTILE)])
    b = write(tmp_path / "b.gguf", [(name, *floats(3))], [value(HOSTILE, STRING, "x")])
    assert main.main(["diff", a, b]) == 1
    assert capsys.readouterr().out.replace("\n", "").isprintable()


# Colours


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("variables", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
    ids=str,
)
def test_colours(tmp_path, monkeypatch, variables, is_terminal, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("WT_SESSION", "1")
    out = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    a, b = write(tmp_path / "a.gguf", [("x", *floats(2))]), write(tmp_path / "b.gguf", entries=[value("k", UINT8, 1)])
    assert main.main(["diff", a, b]) == 1
    assert ("\x1b[32m+ k: 1\x1b[0m" in out.getvalue()) == expected
    assert ("\x1b" in out.getvalue()) == expected


@pytest.mark.parametrize("stream", [None, object()], ids=["none", "bare"])
def test_no_colours_without_a_stream(monkeypatch, stream):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    assert not colour.has_colours()
