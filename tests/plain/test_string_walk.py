"""Passing over strings of an array arrives where each string, read alone, ends."""

import struct

import numpy as np
import pytest
from gguf_bytes import STRING, gguf, value

import numba_dequant as nd
from numba_dequant.gguf import header
from numba_dequant.gguf.header import Cursor
from numba_dequant.gguf.source import Source
from numba_dequant.kernels import native

COUNT = 400

LENGTHS = {
    "empty": [0],
    "short": [1, 2, 3, 5, 8, 13],
    "empty and short": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    "of one byte in length": [1, 254, 255],
    "about the longest short one": [254, 255, 256, 257],
    "long": [256, 257, 1000],
    "of every kind": [0, 1, 7, 8, 9, 255, 256, 300, 5000],
}


LIKE_LENGTHS = [0, 0, 0, 1, 8, 255]


def array_of(kind, order, count=COUNT, letters=LIKE_LENGTHS):
    """Strings of such bytes, and where each of them ends."""
    rng = np.random.default_rng(len(kind))
    lengths = rng.choice(LENGTHS[kind], count)
    parts = [b"xyz"]
    for length in lengths:
        parts += [struct.pack(order + "Q", length), rng.choice(letters, length).astype(np.uint8).tobytes()]
    return b"".join(parts), 3 + np.cumsum([0, *(8 + lengths)])


def passed(data, order, counts):
    """The positions after so many strings more."""
    source = Source("m", data=np.frombuffer(data, np.uint8))
    with source.open() as file:
        cursor = Cursor(source, file, 3, is_first=True)
        cursor.byte_order = "little" if order == "<" else "big"
        positions = []
        for count in counts:
            cursor.skip_strings(count, "k")
            positions.append(cursor.position)
        return positions


@pytest.mark.parametrize("is_compiled", [False, True], ids=["NumPy", "compiled"])
@pytest.mark.parametrize("window", [64, 1000, 1 << 20])
@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_any_number_of_strings_is_passed_over(kind, order, window, is_compiled, monkeypatch):
    """Compiled code knows the little-endian order alone."""
    compiled, real = [], Cursor._skip_compiled

    def skip_compiled(cursor, count):
        compiled.append(real(cursor, count))
        return compiled[-1]

    if is_compiled:
        native.ensure_compiled()
    monkeypatch.setattr(header, "WINDOW", window)
    monkeypatch.setattr(native, "is_loaded", lambda: is_compiled)
    monkeypatch.setattr(Cursor, "_skip_compiled", skip_compiled)
    data, ends = array_of(kind, order)
    for first in (0, 1, 65, 100, COUNT - 70):
        for second in (1, 64, 65, 70):
            found = passed(data, order, (first, second, COUNT - first - second))
            assert found == [ends[first], ends[first + second], len(data)]
    assert bool(compiled) is (is_compiled and order == "<")
    assert not compiled or any(compiled) or min(LENGTHS[kind]) > window


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("kind", ["empty", "short", "of one byte in length"])
def test_short_strings_are_passed_over_many_at_a_time(kind, order, monkeypatch):
    singly, real, searched, search = [], Cursor._skip_singly, [], header.short_strings

    def skip_singly(cursor, count, field):
        singly.append(count)
        real(cursor, count, field)

    def short_strings(words, byte_order):
        searched.append(words.nbytes)
        return search(words, byte_order)

    monkeypatch.setattr(Cursor, "_skip_singly", skip_singly)
    monkeypatch.setattr(header, "short_strings", short_strings)
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    data, ends = array_of(kind, order, 5000, list(b"text"))
    assert passed(data, order, (2500, 2500)) == [ends[2500], len(data)]
    # Those that end in the next window; and before a big-endian string at the start of a window there is no word.
    assert sum(singly) <= (8 if order == "<" else 400)
    assert sum(searched) < 3 * len(data)  # no part of the window is searched again and again


@pytest.mark.parametrize("part", [12, 64, 1000])
@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_strings_may_end_in_any_part_of_the_window(kind, order, part, monkeypatch):
    monkeypatch.setattr(header, "PART", part)
    monkeypatch.setattr(header, "SMALL_WINDOW", part)
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    data, ends = array_of(kind, order)
    assert passed(data, order, (1, 128, 70, 100)) == [ends[1], ends[129], ends[199], ends[299]]


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_a_file_that_ends_within_the_last_of_many_strings_is_refused(order, monkeypatch):
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    file = gguf(entries=[value("a", STRING, ["text"] * 300, order)], order=order)
    end = len(file.rstrip(b"\0"))
    for length in range(end - 12, end):
        with pytest.raises(nd.GgufError, match="the download may be incomplete"):
            nd.open(file[:length])


@pytest.mark.parametrize("n_bytes", [0, 3, 8, 11, 12, 13, 16, 17, 100, 4097, 4099])
@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_numpy_finds_the_starts_that_a_plain_loop_finds(order, n_bytes):
    """All places in memory where a string of 1 to 255 bytes may begin, whatever else they are."""
    rng = np.random.default_rng(n_bytes)
    letters = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 8, 9, 16, 127, 128, 254, 255]
    hostile = (rng.choice(each, n_bytes).astype(np.uint8).tobytes() for each in ([0, 1], letters, [0]))
    # Of each number of such bytes before seven zeros, at every alignment.
    tiles = ((bytes([byte]) * count + bytes(7)) * 400 for byte in (1, 255) for count in range(1, 5))
    n_starts = 0
    for data in (
        *hostile,
        *(tile[:n_bytes] for tile in tiles),
        *(array_of(kind, order)[0][:n_bytes] for kind in LENGTHS),
    ):
        found = header.short_strings(np.frombuffer(data, "<u4", len(data) // 4), "little" if order == "<" else "big")
        starts, ends = [], []
        for start in range(len(data) - 7):
            (length,) = struct.unpack_from(order + "Q", data, start)
            # The zeros of the length hold an aligned word of four, with a word before it and one behind it.
            word = (start + (4 if order == "<" else 3)) // 4
            if 1 <= length <= 255 and 1 <= word < len(data) // 4 - 1:
                starts.append(start)
                ends.append(start + 8 + length)
        assert [each.tolist() for each in found] == [starts, ends]
        n_starts += len(starts)
    assert n_starts > 300 or n_bytes < 4000
