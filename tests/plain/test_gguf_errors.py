"""Every error about a file says what it is about: the file, the field, its place, what stands there, what may."""

import errno
import struct

import pytest
from gguf_bytes import ARRAY, FLOAT32, INT32, STRING, UINT8, UINT16, UINT32, entry, floats, gguf, text, value

import numba_dequant as nd
from numba_dequant import FORMATS, Limits
from numba_dequant.gguf.source import NotRegularFileError, Source, read_error

ONE = floats(1)
ORIGINAL = "comfy.gguf.orig_shape.t"
ALIGNMENT = "a uint32, a power of two up to 1 MiB"
ITEM_TYPES = "0 to 8 and 10 to 12"


def head(*, version=3, tensors=0, entries=0, rest=0):
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, entries) + bytes(rest)


def with_entry(key, kind, code, *numbers):
    return gguf(entries=[entry(key, kind, struct.pack(code, *numbers))])


def reshaped(kind, content):
    return gguf([("t", *floats(2))], [value(ORIGINAL, kind, content)])


# Fields, positions, what is found there, and what is allowed.
FILES = {
    "a short version": (b"GGUF\3\0", "version", 4, "4 bytes", "at most 2 bytes"),
    "another magic": (b"GGML" + b"x" * 60, "magic", 0, "b'GGML'", "b'GGUF'"),
    "four bytes": (b"GGML", "magic", 0, "b'GGML'", "b'GGUF'"),
    "three bytes": (b"GG\0", "magic", 0, "3 bytes", "b'GGUF'"),
    "version 0": (head(version=0), "version", 4, 0, "2 or 3"),
    "version 1": (head(version=1), "version", 4, 1, "2 or 3"),
    "version 4": (head(version=4), "version", 4, 4, "2 or 3"),
    "many tensors": (head(tensors=5, rest=5 * 24 - 9), "tensor count", 8, 5, "at most 4"),
    "many entries": (head(entries=9, rest=9 * 13 - 1), "metadata count", 16, 9, "at most 8"),
    "a long key": (with_entry("k" * 65536, UINT8, "B", 1), "metadata key 0 length", 24, 65536, "at most 65535"),
    "a key of other text": (with_entry(b"k\xff", UINT8, "B", 1), "metadata key 0", 33, "byte 0xff", "UTF-8"),
    "no key": (with_entry("", UINT8, "B", 1)[: 24 + 13], "metadata key 0", 24, "an empty key", "a key"),
    "a key twice": (gguf(entries=[value("k", UINT8, 1)] * 2), "metadata key 1", 38, "k", "each key once"),
    "a type": (with_entry("k", 13, "Q", 0), "metadata 'k' type", 33, 13, "0 to 12"),
    "an item type": (with_entry("k", ARRAY, "<IQ", 13, 0), "metadata 'k' item type", 37, 13, ITEM_TYPES),
    "arrays": (with_entry("k", ARRAY, "<IQ", 9, 0), "metadata 'k' item type", 37, 9, ITEM_TYPES),
    "many items": (
        with_entry("k", ARRAY, "<IQ", UINT8, (1 << 26) + 1),
        "metadata 'k' length",
        41,
        (1 << 26) + 1,
        f"at most {1 << 26} items",
    ),
    "items that are cut": (
        with_entry("k", ARRAY, "<IQ12x", UINT32, 9)[:61],
        "metadata 'k' length",
        41,
        9,
        "at most 12 bytes",
    ),
    "strings that are cut": (
        with_entry("k", ARRAY, "<IQ", STRING, 9)[:64],
        "metadata 'k' length",
        41,
        9,
        "at most 15 bytes",
    ),
    "an item that is cut": (
        gguf(entries=[entry("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q4x", 99))])[:70],
        "metadata 'k' length",
        58,
        99,
        "at most 4 bytes",
    ),
    "a string that is cut": (
        with_entry("k", STRING, "<Q19x", 99)[:64],
        "metadata 'k'",
        45,
        "99 bytes",
        "at most 19 bytes",
    ),
    "a long string that is cut": (
        with_entry("k", STRING, "<Q", (1 << 20) + 1)[:64],
        "metadata 'k'",
        45,
        f"{(1 << 20) + 1} bytes",
        "at most 19 bytes",
    ),
    "an alignment": (
        gguf(entries=[value("general.alignment", UINT32, 24)]),
        "metadata 'general.alignment'",
        49,
        24,
        ALIGNMENT,
    ),
    "a large alignment": (
        gguf(entries=[value("general.alignment", UINT32, 2 << 20)]),
        "metadata 'general.alignment'",
        49,
        2 << 20,
        ALIGNMENT,
    ),
    "the type of an alignment": (
        gguf(entries=[value("general.alignment", UINT16, 32)]),
        "metadata 'general.alignment'",
        49,
        "a value of type 2",
        ALIGNMENT,
    ),
    "a split key": (
        gguf(entries=[value("split.no", FLOAT32, 1)]),
        "metadata 'split.no'",
        40,
        "a value of type 6",
        "an integer",
    ),
    "many shards": (
        gguf(entries=[value("split.count", UINT32, 65536)]),
        "metadata 'split.count'",
        None,
        65536,
        "0 to 65535",
    ),
    "less than no shards": (
        gguf(entries=[value("split.count", INT32, -1)]),
        "metadata 'split.count'",
        None,
        -1,
        "0 to 65535",
    ),
    "a shard without a path": (
        gguf(entries=[value("split.count", UINT32, 2)]),
        "metadata 'split.count'",
        None,
        2,
        "a file name that ends in -00001-of-00002.gguf",
    ),
    "a NUL": (gguf([("a\0b", *ONE)]), "name of tensor 0", 24, r"'a\x00b'", "no NUL, except at the end"),
    "a name twice": (gguf([("t", *ONE)] * 2), "name of tensor 1", 57, "t", "each name once"),
    "dimensions": (gguf([("t", (1,) * 9, "F32", b"")]), "tensor 't' number of dimensions", 33, 9, "at most 8"),
    "elements": (
        gguf([("t", (1 << 30, 1 << 30), "F32", b"")]),
        "tensor 't' dimensions",
        37,
        (1 << 30, 1 << 30),
        "fewer than 2**60 elements, where a dimension of 0 counts as 1",
    ),
    "rows": (
        gguf([("t", (2, 33), "Q8_0", b"")]),
        "tensor 't' dimensions",
        37,
        "rows of 33",
        "a multiple of 32, the block size of Q8_0",
    ),
    "the row of a scalar": (
        gguf([("t", (), "Q8_0", bytes(34))]),
        "tensor 't' dimensions",
        37,
        "rows of 1",
        "a multiple of 32, the block size of Q8_0",
    ),
    "a format": (
        gguf([("t", (32,), 31, b"")]),
        "tensor 't' type",
        45,
        31,
        ", ".join(str(known.ggml_id) for known in FORMATS.values()),
    ),
    "an offset": (
        gguf([("a", *ONE), ("b", *ONE), ("c", *ONE)]).replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 0, 64)),
        "tensor 'b' offset",
        82,
        64,
        "32",
    ),
    "data of several": (
        gguf([("t", *ONE), ("u", *ONE)])[:98],
        "tensor 't' data",
        96,
        "a file of 98 bytes",
        "at least 100 bytes",
    ),
    "data": (gguf([("t", *ONE)])[:66], "tensor 't' data", 64, "a file of 66 bytes", "at least 68 bytes"),
}


def parts(caught):
    error = caught.value
    return error.path, error.field, error.offset, error.found, error.allowed


@pytest.mark.parametrize("name", FILES)
def test_an_error_has_all_its_parts(name):
    file, field, at, found, allowed = FILES[name]
    with pytest.raises(nd.GgufError) as caught:
        nd.open(bytearray(file))
    assert parts(caught) == ("<memory>", field, at, found, allowed)


@pytest.mark.parametrize(
    ("file", "options", "field", "at", "found", "allowed"),
    [
        (head(), {"offset": 24}, "magic", 24, "0 bytes", "b'GGUF'"),
        (head(), {"offset": 25}, "offset", 25, "a file of 24 bytes", "at most 24"),
        (head(), {"limits": Limits(header_bytes=23)}, "header_bytes", 0, "24 bytes", "at most 23"),
        (gguf([("t", *ONE)]), {"limits": Limits(header_bytes=40)}, "header_bytes", 37, "20 bytes", "at most 40"),
        (gguf([("t", *ONE), ("u", *ONE)]), {"limits": Limits(tensors=1)}, "tensors", 8, 2, "at most 1"),
        (
            gguf(entries=[value("k", UINT8, 1), value("l", UINT8, 1)]),
            {"limits": Limits(metadata_entries=1)},
            "metadata_entries",
            16,
            2,
            "at most 1",
        ),
        (
            gguf(entries=[value("k", STRING, "abc")]),
            {"limits": Limits(string_bytes=2)},
            "string_bytes",
            37,
            3,
            "at most 2",
        ),
        *(
            (
                reshaped(kind, content),
                {"orig_shapes": True},
                f"metadata '{ORIGINAL}'",
                at,
                found,
                "up to 8 integers whose product is 2",
            )
            for kind, content, at, found in (
                (INT32, [3], 71, (3,)),
                (INT32, [-1, 2, -1], 71, (-1, 2, -1)),
                (INT32, [1] * 8 + [2], 71, "an array of 9 items"),
                (STRING, ["3"], 71, "an array of 1 items"),
                (UINT8, 2, None, "a value of type int"),
            )
        ),
    ],
)
def test_an_error_that_depends_on_an_option_has_all_its_parts(file, options, field, at, found, allowed):
    with pytest.raises(nd.GgufError) as caught:
        nd.open(file, **options)
    assert parts(caught) == ("<memory>", field, at, found, allowed)


def shard(number, count, name, more=()):
    return gguf([(name, *ONE)], [value("split.no", UINT16, number), value("split.count", UINT16, count), *more])


@pytest.mark.parametrize(
    ("first", "second", "path", "field", "found", "allowed"),
    [
        ((0, 2, "a"), (2, 2, "b"), "<memory 2>", "metadata 'split.no'", 2, "0 to 1, different in each file"),
        (
            (0, 2, "a"),
            (0, 2, "b"),
            "<memory 2>",
            "metadata 'split.no'",
            0,
            "0 to 1, different in each file; <memory 1> has the same number",
        ),
        ((0, 2, "a"), (1, 3, "b"), "<memory 2>", "metadata 'split.count'", 3, "2, the number of files in the list"),
        ((1, 2, "a"), (0, 2, "a"), "<memory 1>", "tensor 'a' name", "<memory 2>", "one shard"),
        (
            (0, 2, "a", [value("split.tensors.count", INT32, 3)]),
            (1, 2, "b"),
            "<memory 1>",
            "metadata 'split.tensors.count'",
            3,
            "2, the number of tensors in all shards",
        ),
    ],
)
def test_an_error_about_shards_in_a_list_has_all_its_parts(first, second, path, field, found, allowed):
    with pytest.raises(nd.GgufError) as caught:
        nd.open([shard(*first), shard(*second)])
    assert parts(caught) == (path, field, None, found, allowed)


@pytest.mark.parametrize(
    ("first", "second", "at_fault", "field", "found", "allowed"),
    [
        ((0, 2), None, 0, "metadata 'split.count'", 2, "all shards"),
        ((1, 2), (1, 2), 0, "metadata 'split.no'", 1, "0"),
        ((0, 2), (0, 2), 1, "metadata 'split.no'", 0, "1, the number in the file name"),
        ((0, 2), (1, 3), 1, "metadata 'split.count'", 3, "2, the count in the file name"),
    ],
)
def test_an_error_about_shards_on_disk_has_all_its_parts(tmp_path, first, second, at_fault, field, found, allowed):
    paths = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for path, numbers, name in zip(paths, (first, second), "ab", strict=True):
        if numbers:
            path.write_bytes(shard(*numbers, name))
    with pytest.raises(nd.GgufError) as caught:
        nd.open(paths[0])
    assert parts(caught) == (str(paths[at_fault]), field, None, found, allowed)


def test_an_error_about_a_name_of_another_shard_has_all_its_parts(tmp_path):
    path = tmp_path / "m-00002-of-00002.gguf"
    path.write_bytes(shard(0, 2, "a"))
    with pytest.raises(nd.GgufError, match=r"this is shard 00002 of the split .*; open the first shard, .*m-00001-of"):
        nd.open(path)


def test_an_error_about_too_many_shards_has_all_its_parts(tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(shard(0, 2, "a"))
    with pytest.raises(nd.GgufError) as caught:
        nd.open(path, limits=Limits(shards=1))
    assert parts(caught) == (str(path), "shards", None, 2, "at most 1")


def test_an_error_about_no_file_has_all_its_parts(tmp_path):
    with pytest.raises(nd.GgufError) as caught:
        nd.open(tmp_path)
    assert parts(caught) == (str(tmp_path), "file", None, "it is a directory, not a file", "a regular file")


def test_an_error_about_a_file_that_has_changed_has_all_its_parts(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(entries=[value("k", INT32, [1, 2])]))
    array = nd.open(path).metadata["k"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(nd.GgufError) as caught:
        array.to_list()
    assert parts(caught) == (str(path), "metadata 'k'", 49, "a file that has changed", "the file that was opened")


def test_an_error_about_a_file_that_becomes_shorter_has_all_its_parts(monkeypatch):
    file = with_entry("k", STRING, "<Q99x", 99)[:80]
    monkeypatch.setattr(Source, "size", lambda *_: 500)
    with pytest.raises(nd.GgufError, match="the file has become shorter since it was opened") as caught:
        nd.open(file)
    assert parts(caught) == ("<memory>", "metadata 'k'", 45, "35 bytes", "99 bytes")


@pytest.mark.parametrize(
    ("path", "error", "kind", "number", "reason"),
    [
        ("m", OSError(errno.EIO, "I/O error"), nd.ReadError, errno.EIO, "I/O error; check the disk"),
        ("m", OSError("odd"), nd.ReadError, None, "odd; check the disk, or copy the file again"),
        ("m", NotRegularFileError(errno.EINVAL, "a pipe"), nd.ReadError, errno.EINVAL, "a pipe; correct the path"),
        ("~m", OSError(errno.EACCES, "denied"), nd.ReadError, errno.EACCES, "denied; this user may not read it"),
        ("m", OSError(errno.ENOENT, "none"), nd.MissingFileError, errno.ENOENT, "none"),
        ("~m", OSError(errno.ENOENT, "none"), nd.MissingFileError, errno.ENOENT, "none; ~ is not expanded"),
        ("https://m", OSError(errno.ENOENT, "none"), nd.MissingFileError, errno.ENOENT, "none; URLs are not supported"),
    ],
)
def test_an_error_of_the_system_has_all_its_parts(path, error, kind, number, reason):
    found = read_error(path, error, "t", 5, "reading: ")
    assert type(found) is kind
    assert (found.path, found.tensor, found.offset, found.errno) == (path, "t", 5, number)
    text, _, advice = found.reason.partition(";")
    known, _, expected = reason.partition(";")
    assert text == f"reading: {known}"
    assert advice.startswith(expected)
    assert bool(advice) is bool(expected)
