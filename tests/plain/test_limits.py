"""Time and memory for a header are proportional to its size, and `Limits` bounds that size."""

import dataclasses
import struct
import time
import tracemalloc

import pytest
from gguf_bytes import ARRAY, BOOL, STRING, UINT8, UINT16, UINT32, entry, floats, gguf, text, value

import numba_dequant as nd
from numba_dequant.parallel import Shard, plan

MIB = 1 << 20


def filled(n_bytes, make):
    """Items `make(0)`, `make(1)`, ... of about this many bytes together, and their number."""
    items, size = [], 0
    while size < n_bytes:
        items.append(make(len(items)))
        size += len(items[-1])
    return b"".join(items), len(items)


def metadata(n_bytes, make):
    content, count = filled(n_bytes, lambda number: text(f"{number:x}") + make(number))
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, count) + content


def table(n_bytes, make):
    content, count = filled(n_bytes, make)
    header = struct.pack("<4sIQQ", b"GGUF", 3, count, 0) + content
    return header + bytes(-len(header) % 32)


def items(n_bytes, make):
    content, count = filled(n_bytes, make)
    return gguf(entries=[entry("k", ARRAY, struct.pack("<IQ", STRING, count) + content)])


def empty_array(kind):
    return struct.pack("<IIQ", ARRAY, kind, 0)


def tensor(name, n_dimensions):
    return text(name) + struct.pack(f"<I{n_dimensions}QIQ", n_dimensions, *[0] * n_dimensions, 0, 0)


HEADERS = {
    "bools": lambda n: metadata(n, lambda _: struct.pack("<IB", BOOL, 1)),
    "empty strings": lambda n: metadata(n, lambda _: struct.pack("<IQ", STRING, 0)),
    "empty arrays": lambda n: metadata(n, lambda _: empty_array(UINT8)),
    "empty arrays of strings": lambda n: metadata(n, lambda _: empty_array(STRING)),
    "short arrays of strings": lambda n: metadata(
        n, lambda _: struct.pack("<IIQ", ARRAY, STRING, 65) + (text("") + text("x") * 64)
    ),
    "strings that need four bytes a character": lambda n: metadata(
        n, lambda _: struct.pack("<I", STRING) + text("\N{GRINNING FACE}" + "x" * (MIB // 4))
    ),
    "long keys": lambda n: (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, n // 60_021)
        + b"".join(text(f"{number:08}" + "k" * 60_000) + struct.pack("<IB", BOOL, 1) for number in range(n // 60_021))
    ),
    "tensors without elements": lambda n: table(n, lambda number: tensor(f"{number:x}", 1)),
    "tensors with long names": lambda n: table(n, lambda number: tensor(f"{number:x}" + "k" * 60_000, 8)),
    "empty items": lambda n: items(n, lambda _: text("")),
    "items of three lengths": lambda n: items(n, lambda number: text("x" * (0, 1, 256)[number % 3])),
    "items that look like lengths": lambda n: items(n, lambda _: text(b"\1" + bytes(7) + b"\1" + bytes(7))),
    "a name twice": lambda n: table(n, lambda number: tensor("t" if number % 2**20 == 5 else f"t{number % 6:x}", 1)),
}


def opened_and_shown(data):
    """Seconds of opening a header and of showing it, and the most memory of that."""
    tracemalloc.start()
    start = time.process_time()
    try:
        model = nd.open(data)
        shown = [repr(model), repr(model.metadata), repr(model.tensors), model._repr_html_()]
    except nd.GgufError as error:
        shown = [str(error)]
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(map(len, shown)) < 500_000
    return seconds, peak


@pytest.mark.parametrize("name", HEADERS)
def test_time_and_memory_are_proportional_to_the_header(name):
    """Eight times the bytes take at most eight times the memory, and not 64 times the time."""
    small, large = (HEADERS[name](n_bytes) for n_bytes in (MIB // 16, MIB // 2))
    nd.open(gguf())
    (few_seconds, few_bytes), (seconds, n_bytes) = opened_and_shown(small), opened_and_shown(large)
    # 0.02 s and 12 MiB are what any header may take: the parts of it in memory, and what NumPy makes of them.
    assert seconds < 20 * few_seconds + 0.2
    assert n_bytes < 9 * few_bytes + 12 * MIB
    assert n_bytes < 24 * len(large) + 12 * MIB


def test_what_is_shown_does_not_grow_with_the_header():
    model = nd.open(metadata(MIB, lambda _: empty_array(UINT8)))
    assert len(repr(model.metadata)) < 10_000
    assert f"and {len(model.metadata) - 60:,} more)" in repr(model.metadata)
    assert f"and {len(model.metadata) - 500:,} more" in model._repr_html_()
    model = nd.open(table(MIB, lambda number: tensor(f"{number:x}", 1)))
    assert repr(model.tensors).endswith(f"and {len(model.tensors) - 60:,} more")
    assert f"and {len(model.tensors) - 500:,} more" in model._repr_html_()


def test_a_long_name_is_shortened_in_an_error():
    name = "\N{GRINNING FACE}" * 16_000
    files = [
        gguf([(name, *floats(1)), (name, *floats(1))]),
        gguf([(name, (1,) * 9, "F32", bytes(4))]),
        gguf([(name, (256,), 99, b"")]),
        gguf([(name, (4,), "F32", b"")])[:-40],
        gguf(entries=[value(name, UINT8, 1), value(name, UINT8, 1)]),
        gguf(entries=[entry(name, 13, b"")]),
        gguf(entries=[entry(name, ARRAY, struct.pack("<IQ", 9, 1))]),
        gguf(entries=[entry(name.encode() + b"\xff", UINT8, b"\1")]),
    ]
    for file in files:
        with pytest.raises(nd.GgufError) as caught:
            nd.open(file)
        assert len(str(caught.value)) < 600
        assert len(caught.value.field) < 200


def test_similar_names_are_looked_for_within_a_second():
    """Names of two letters in a random order are the slowest for difflib."""
    letters = "".join(f"{number * number % 8191:013b}" for number in range(1, 9000))
    names = [letters[number : number + 190] for number in range(0, 100_000, 31)]
    tensors = nd.open(table_of(names)).tensors
    start = time.process_time()
    with pytest.raises(nd.TensorNotFoundError):
        tensors[letters[5:204]]
    assert time.process_time() - start < 2


def table_of(names):
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(names), 0) + b"".join(tensor(name, 1) for name in names)
    return header + bytes(-len(header) % 32)


def test_the_number_of_a_layer_may_have_any_length():
    """Python refuses to convert numbers of more than 4300 digits, with a ValueError."""
    names = [f"blk.{'9' * 5000}.a", "blk.0.a", "blk.1.a", "blk.\N{ARABIC-INDIC DIGIT TWO}.a", f"blk.{2**63}.a"]
    model = nd.open(gguf([(name, *floats(4, 4)) for name in names]))
    found = plan(model.tensors.values(), 2, [("*.a", Shard(0))], stages=2)
    assert sorted(name for rank in found.ranks for name in rank.parts) == sorted(names)


def refused(file, **limits):
    with pytest.raises(nd.GgufError) as caught:
        nd.open(file, limits=nd.Limits(**limits))
    (name,) = limits
    message = str(caught.value)
    assert message.endswith(f"open it with a higher limit: limits=numba_dequant.Limits({name}=...)")
    assert caught.value.field == name
    return message


TOKENS = value("tokens", STRING, [f"token{number}" for number in range(1000)])


@pytest.mark.parametrize(
    ("name", "file", "enough", "what"),
    [
        ("tensors", gguf([(f"t{n}", *floats(1)) for n in range(5)]), 5, "the model has 5 tensors"),
        ("metadata_entries", gguf(entries=[value(f"k{n}", UINT8, n) for n in range(5)]), 5, "5 metadata entries"),
        ("string_bytes", gguf(entries=[value("k", STRING, "x" * 99)]), 99, "metadata 'k' has 99 bytes"),
        ("header_bytes", gguf(entries=[TOKENS]), 24 + len(TOKENS), "metadata 'tokens'"),
        ("header_bytes", gguf(entries=[value("k", STRING, "x" * 99)]), 24 + 8 + 1 + 4 + 8 + 99, "metadata 'k'"),
        ("header_bytes", gguf(entries=[value("k", UINT32, [1] * 99)]), 24 + 8 + 1 + 4 + 12 + 4 * 99, "metadata 'k'"),
        ("header_bytes", gguf([("t", *floats(1))]), 24 + 8 + 1 + 4 + 8 + 12, "tensor 't' dimensions"),
    ],
)
def test_a_limit_is_exact_and_says_how_to_raise_it(tmp_path, name, file, enough, what):
    path = tmp_path / "m.gguf"
    path.write_bytes(file)
    for source in (file, path):
        model = nd.open(source, limits=nd.Limits(**{name: enough}))
        assert dict(model.metadata) == dict(nd.open(file).metadata)
        message = refused(source, **{name: enough - 1})
        assert what in message
        assert f"; the limit is {enough - 1:,}. If you trust this file" in message
    with pytest.raises(nd.GgufError, match="the limit is"):
        nd.load(path, device="reference", limits=nd.Limits(**{name: enough - 1}))


@pytest.mark.parametrize("strings", [["", "x" * 99], ["x"] * 90 + ["x" * 99], ["x" * 200] * 90])
def test_a_string_in_an_array_is_checked_when_it_is_read_at_the_latest(strings):
    file = gguf(entries=[value("k", STRING, strings)])
    longest = max(map(len, strings))
    assert nd.open(file, limits=nd.Limits(string_bytes=longest)).metadata["k"] == strings
    with pytest.raises(nd.GgufError, match=rf"'k' item has {longest} bytes; the limit is {longest - 1}\."):
        nd.open(file, limits=nd.Limits(string_bytes=longest - 1)).metadata["k"].to_list()


@pytest.mark.parametrize("n_bytes", [1, 3, 4, 23])
def test_a_limit_below_the_smallest_header_is_no_other_error(n_bytes):
    assert "the header is not read beyond the counts" in refused(gguf(), header_bytes=n_bytes)
    with pytest.raises(nd.GgufError, match="this is not a GGUF file: it has only 3 bytes"):
        nd.open(b"GG\0", limits=nd.Limits(header_bytes=3))


def test_a_file_that_is_cut_short_is_not_said_to_be_too_long():
    for length in range(25, 100):
        with pytest.raises(nd.GgufError, match="incomplete"):
            nd.open(gguf(entries=[TOKENS])[:length], limits=nd.Limits(header_bytes=200))


def test_a_longer_string_is_read_whole_where_it_is_allowed(tmp_path):
    path = tmp_path / "m.gguf"
    head = gguf(entries=[entry("k", STRING, struct.pack("<Q", (64 << 20) + 5))])[: 24 + 8 + 1 + 4 + 8]
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + (64 << 20))
        file.seek(0, 2)
        file.write(b"12345")
    refused(path, string_bytes=64 << 20)
    stored = nd.open(path, limits=nd.Limits(string_bytes=65 << 20)).metadata["k"]
    assert (len(stored), stored[-5:]) == ((64 << 20) + 5, "12345")


def shard(number, count, names=(), more=()):
    entries = [value("split.no", UINT16, number), value("split.count", UINT16, count), *more]
    return gguf([(name, *floats(1)) for name in names], entries)


def test_limits_are_for_all_shards_together(tmp_path):
    files = [shard(number, 3, [f"a{number}", f"b{number}"]) for number in range(3)]
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in range(1, 4)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    for source in (paths[0], paths, files):
        for name, enough in (("tensors", 6), ("metadata_entries", 6)):
            assert len(nd.open(source, limits=nd.Limits(**{name: enough})).tensors) == 6
            refused(source, **{name: enough - 1})
        size = 3 * (24 + (8 + 8 + 6) + (8 + 11 + 6) + 2 * (8 + 2 + 4 + 8 + 12))
        assert len(nd.open(source, limits=nd.Limits(header_bytes=size)).tensors) == 6
        refused(source, header_bytes=size - 1)
    for source in (paths[0], files):
        for left in (0, 1, 23):  # after the first shard
            assert "the header is not read beyond the counts" in refused(source, header_bytes=size // 3 + left)
    # The caller chose the length of the list.
    assert len(nd.open(paths, limits=nd.Limits(shards=1)).tensors) == 6
    assert "the model has 3 shards" in refused(paths[0], shards=2)
    assert len(nd.open(paths[0], limits=nd.Limits(shards=3)).tensors) == 6


def test_a_file_cannot_name_many_shards(tmp_path):
    path = tmp_path / "m-00001-of-65535.gguf"
    path.write_bytes(shard(0, 65535))
    for allow_truncated in (False, True):
        with pytest.raises(nd.GgufError, match="the model has 65,535 shards; the limit is 1,000"):
            nd.open(path, allow_truncated=allow_truncated)


def test_the_limits_are_those_of_the_documentation():
    found = dataclasses.asdict(nd.Limits())
    assert found == {
        "header_bytes": 268_435_456,
        "metadata_entries": 100_000,
        "tensors": 1_000_000,
        "string_bytes": 67_108_864,
        "shards": 1_000,
    }
    assert nd.Limits(**dict.fromkeys(found, 1)).shards == 1
    with pytest.raises(AttributeError):
        nd.Limits().shards = 0  # it would not be checked
    assert nd.Limits(string_bytes=1 << 30).string_bytes == 1 << 30


@pytest.mark.parametrize(
    "wrong", [{"tensors": 0}, {"tensors": -1}, {"shards": 1.5}, {"header_bytes": "1"}, {"string_bytes": (1 << 30) + 1}]
)
def test_limits_are_whole_numbers(wrong):
    (name,) = wrong
    with pytest.raises(nd.OptionError, match=f"{name} must be"):
        nd.Limits(**wrong)


@pytest.mark.parametrize("wrong", [5, {"tensors": 5}, nd.Limits])
def test_anything_else_is_no_limits(wrong):
    with pytest.raises(nd.OptionError, match=r"limits must be a numba_dequant\.Limits or None, got"):
        nd.open(gguf(), limits=wrong)
