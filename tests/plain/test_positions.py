"""Where the entries of the metadata begin, for readers that parse them themselves."""

import numpy as np
import pytest
from gguf_bytes import CODES, STRING, UINT8, entry, gguf, value

import numba_dequant as nd
from numba_dequant.gguf.positions import entry_positions

ENTRIES = {
    "number": lambda order: value("number", UINT8, 7, order),
    "text": lambda order: value("text", STRING, "a" * 300, order),
    "numbers": lambda order: value("numbers", 4, list(range(50)), order),
    "texts": lambda order: value("texts", STRING, ["", "one", "x" * 300] * 40, order),
    "nulls\0\0": lambda order: value("nulls\0\0", UINT8, 7, order),
    "nulls": lambda order: value("nulls", 12, 0.5, order),
    "": lambda order: value("", UINT8, 1, order),
    "é": lambda order: value("é", 11, -1, order),
}


def found(data, position, count, order="<"):
    return entry_positions(np.frombuffer(data, np.uint8), position, count, "little" if order == "<" else "big")


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_each_entry_begins_where_the_one_before_it_ends(order):
    """At any place of a file, and whatever follows. Keys keep their NULs, and one may be empty."""
    parts = [make(order) for make in ENTRIES.values()]
    ends = np.cumsum([24, *map(len, parts)]).tolist()
    data = bytes(24) + b"".join(parts) + b"the table of tensors"
    for count in range(len(parts) + 1):
        positions, end = found(data, 24, count, order)
        assert list(positions.items()) == list(zip(list(ENTRIES)[:count], ends, strict=False))
        assert end == ends[count]


def test_they_are_those_of_a_file():
    """A file that opens has the same keys, but without the NULs at their ends."""
    entries = [value(f"key {kind}", kind, 1) for kind in CODES]
    model = nd.open(gguf([], entries))
    positions, end = found(gguf([], entries), 24, len(entries))
    assert list(positions) == list(model.metadata)
    assert end == 24 + sum(map(len, entries))


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_a_key_that_appears_twice(order):
    """It is said at which byte the second one begins."""
    first = value("a", UINT8, 1, order)
    data = b"before" + first + value("b", UINT8, 1, order) + value("a", 4, 2, order)
    with pytest.raises(
        nd.GgufError, match="at byte 34: metadata key 'a' appears twice; a key must be unique"
    ) as raised:
        found(data, 6, 3, order)
    assert (raised.value.field, raised.value.offset) == ("metadata key 2", 6 + 2 * len(first))
    assert (raised.value.found, raised.value.allowed, raised.value.path) == ("a", "each key once", "<memory>")
    assert found(data, 6, 2, order)[1] == 34


def test_a_key_that_is_not_utf8():
    good = value("a", UINT8, 1)
    data = good + entry(b"ab\xff", UINT8, b"\1")
    with pytest.raises(nd.GgufError, match=r"at byte 22: metadata key b'ab\\xff' is not valid UTF-8$") as raised:
        found(data, 0, 2)
    error = raised.value
    assert (error.field, error.offset, error.allowed) == ("metadata key 1", len(good) + 8, "UTF-8")
    assert error.found == r"b'ab\xff'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "at byte 27: metadata 'b': 1 more bytes are needed, but only 0 are left"),
        (lambda data: data[:20], "at byte 14: metadata key 1: 8 more bytes are needed, but only 6 are left"),
        (lambda data: data[:22], "at byte 22: metadata key 1: 1 more bytes are needed, but only 0 are left"),
        (
            lambda data: data[:23] + b"c" + data[24:],
            "at byte 23: metadata 'b' has the unknown value type 99; GGUF has types 0 to 12",
        ),
        (lambda data: data[:16] + b"\1" + data[17:], "at byte 14: metadata key 1 has 65537 bytes; at most 65535 are"),
    ],
    ids=["value cut", "length cut", "key cut", "type", "length"],
)
def test_what_is_wrong_is_said_as_for_a_file(change, message):
    data = value("a", UINT8, 1) + value("b", UINT8, 1)
    with pytest.raises(nd.GgufError, match=message):
        found(change(data), 0, 2)
