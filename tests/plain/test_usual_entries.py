"""Reading the usual entries of a tensor table in one step gives what reading each number by itself gives."""

import struct

import pytest
from gguf_bytes import floats, gguf, text

import numba_dequant as nd
from numba_dequant.gguf import table

NAMES = ["a", "b", "", "c\0", "d" * 300, "é", "e", "ab\0\0", "f", "g"]
SHAPES = [(2, 3), (2, 3), (), (3,), (3,), (), (1, 1, 2), (1, 1, 2), (0,), (2, 3)]


def outcome(data):
    """The tensors, or all of the error."""
    try:
        return [tensor[:-1] for tensor in nd.open(data).tensors.values()]
    except nd.GgufError as error:
        return str(error), error.field, error.offset, error.found, error.allowed


def either_way(data, monkeypatch):
    """What `open` does, which must be the same without `_read_usual`."""
    found = outcome(data)
    with monkeypatch.context() as patch:
        patch.setattr(table, "_read_usual", lambda *_: None)
        assert outcome(data) == found
    return found


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_each_wrong_byte_of_a_table_gives_the_same_error(order, monkeypatch):
    file = gguf([(name, *floats(*shape)) for name, shape in zip(NAMES, SHAPES, strict=True)], order=order)
    assert len(either_way(file, monkeypatch)) == len(NAMES)
    fields = set()
    for at in range(24, len(file) - 128):
        for byte in {0, 1, ord("a"), 0x80, 0xFF, file[at] ^ 2} - {file[at]}:
            found = either_way(file[:at] + bytes([byte]) + file[at + 1 :], monkeypatch)
            fields |= {found[1].split("'")[-1]} if isinstance(found, tuple) else set()
    for length in range(24, len(file) - 128, 7):
        either_way(file[:length], monkeypatch)
    assert {" number of dimensions", " dimensions", " type", " offset"} <= fields


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_most_entries_are_usual(order, monkeypatch):
    """Few more than the first of each kind are read by themselves, and one at the end of a window."""
    singly, read = [], table._read_any

    def read_any(cursor, *others):
        singly.append(cursor.position)
        read(cursor, *others)

    monkeypatch.setattr(table, "_read_any", read_any)
    nd.open(gguf([(f"t{number}", *floats(number % 3 + 1)) for number in range(100)], order=order))
    assert 3 <= len(singly) <= 6


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a", "appears twice"),
        ("b", "appears twice"),
        ("x\0y", "contains a NUL"),
        ("x" * (table.MAX_KEY + 1), f"at most {table.MAX_KEY}"),
        ("x" * table.MAX_KEY, None),
    ],
    ids=["first again", "second again", "NUL", "too long", "long"],
)
def test_a_wrong_name_of_an_entry_that_is_else_usual_is_refused(name, problem, order, monkeypatch):
    names = ["a", "b", name, "c"]
    found = either_way(gguf([(each, *floats(3)) for each in names], order=order), monkeypatch)
    assert len(found) == 4 if problem is None else problem in found[0]


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_a_wrong_offset_of_a_usual_entry_is_found_where_it_is(order, monkeypatch):
    file = gguf([(name, *floats(3)) for name in ("first", "second", "third")], order=order)
    at = file.index(b"third") + len("third") + 4 + 8 + 4
    found = either_way(file[:at] + struct.pack(f"{order}Q", 1) + file[at + 8 :], monkeypatch)
    assert found[2] == at


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_data_that_looks_like_an_entry_is_none(order):
    """It begins right after the table if the length of a name makes the table end without padding."""
    numbers = struct.pack(f"{order}IQIQ", 1, 32, 0, 0)
    data = (text("x", order) + numbers).ljust(128, b"\0")
    for length in range(1, 33):
        names = ["a", "b" * length]
        file = gguf([(name, (32,), "F32", data) for name in names], order=order)
        assert [*nd.open(file).tensors] == names
