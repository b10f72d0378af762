"""The windows in which a header is read: what is read, what is kept of it, and what is never read."""

import dataclasses
import os

import numpy as np
import pytest
from gguf_bytes import ARRAY, INT32, STRING, UINT32, entry, floats, gguf, text, value

import numba_dequant as nd
from numba_dequant.gguf import header
from numba_dequant.gguf.file import open_gguf
from numba_dequant.gguf.header import MAX_KEY, WINDOW, Cursor
from numba_dequant.gguf.limits import Allowance
from numba_dequant.gguf.source import checksum, identity_of, source_of
from numba_dequant.kernels import native

TOKENS = [f"token {number:05}" for number in range(60_000)]
"""Their strings are 1.3 MB, more than four windows."""


def cursor_of(data, *, is_first=True, limit=None):
    source = source_of(np.frombuffer(data, np.uint8))
    allowance = None if limit is None else Allowance(nd.Limits(header_bytes=limit))
    return Cursor(source, source.open(), 0, is_first=is_first, allowance=allowance)


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf([("t", *floats(5))], [value("tokens", STRING, TOKENS), value("last", UINT32, 7)]))
    return path


@pytest.fixture(params=[False, True], ids=["plain", "compiled"])
def each_walk(request, monkeypatch):
    """Strings are passed without compiled code, and with it."""
    if request.param:
        native.ensure_compiled()
    monkeypatch.setattr(native, "is_loaded", lambda: request.param)


def test_there_is_a_checksum_of_each_byte_of_a_header(large):
    tensor = nd.open(large).tensors["t"]
    parts, content, end = tensor.source.header, large.read_bytes(), 0
    for offset, length, found in parts:
        assert offset == end
        assert length > 0
        assert found == checksum(content[offset : offset + length])
        end = offset + length
    assert len(parts) > 4
    assert 0 <= tensor.offset - end < 32


def test_reading_metadata_later_keeps_no_checksum(large):
    model = nd.open(large)
    before = list(model.tensors["t"].source.header)
    assert model.metadata["tokens"][59_999] == "token 59999"
    assert list(model.metadata["tokens"])[::20_000] == TOKENS[::20_000]
    assert model.tensors["t"].source.header == before


@pytest.mark.parametrize("place", [0.01, 0.3, 0.6, 0.99])
def test_a_byte_of_any_window_that_has_changed_is_noticed(large, place):
    model = nd.open(large)
    at = int(place * model.tensors["t"].offset)
    with open(large, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(large, (1, 1))
    with pytest.raises(nd.ReadError, match="it has changed since it was opened"):
        model.load("t", device="reference")


def test_a_checksum_of_one_byte_and_none_of_no_byte():
    cursor = cursor_of(b"abc")
    cursor.keep_checksum()
    assert cursor.source.header == []
    cursor.take(1, "a byte")
    cursor.keep_checksum()
    assert cursor.source.header == [(0, 1, checksum(b"a"))]


@pytest.mark.parametrize("position", [0, 3, WINDOW - 2, WINDOW, WINDOW + 1])
def test_looking_ahead_does_not_move(position):
    data = np.arange(2 * WINDOW // 4, dtype="<u4").tobytes()
    cursor = cursor_of(data)
    while cursor.position < position:
        cursor.take(min(position - cursor.position, 1000), "bytes")
    for size in (1, 4, 8):
        assert cursor.peek(size) == data[position : position + size]
    assert cursor.position == position
    window, at = cursor.ahead
    assert window[at : at + 4] == data[position : position + 4]
    assert cursor.take(4, "bytes") == data[position : position + 4]


def test_what_is_ahead_of_a_position_beyond_the_window():
    cursor = cursor_of(bytes(3 * WINDOW))
    cursor.take(4, "bytes")
    cursor.position = 2 * WINDOW
    window, at = cursor.ahead
    assert at == 2 * WINDOW
    assert at >= len(window)


def test_nothing_is_read_beyond_the_limit():
    data = bytes(range(200)) * 1000
    cursor = cursor_of(data, limit=1000)
    cursor.take(300, "bytes")
    cursor.position = 700  # a new window is read
    cursor.peek(8)
    cursor.position = 995
    assert cursor.peek(8) == data[995:1000]
    assert cursor.position - cursor.ahead[1] + len(cursor.ahead[0]) == 1000
    for position in (1000, 1001, 5000):
        cursor.position = position
        assert cursor.peek(8) == b""
        assert cursor.ahead[0] == b""


@pytest.mark.parametrize("key", ["aX", "X", "aXX", "a0", "a ", "a\n"])
def test_only_nuls_are_removed_at_the_end_of_a_name(key):
    file = gguf([(key, *floats(3))], [value(key, UINT32, 1), entry("b\0\0", UINT32, bytes(4))])
    model = nd.open(file)
    assert list(model.metadata) == [key, "b"]
    assert list(model.tensors) == [key]


@pytest.mark.parametrize("kind", ["key", "tensor"])
def test_the_longest_name(kind):
    for length in (MAX_KEY, MAX_KEY + 1):
        name = "n" * length
        file = gguf([(name, *floats(3))]) if kind == "tensor" else gguf([], [value(name, UINT32, 1)])
        if length == MAX_KEY:
            model = nd.open(file)
            assert list(model.tensors if kind == "tensor" else model.metadata) == [name]
        else:
            with pytest.raises(nd.GgufError, match=f"has {length} bytes; at most {MAX_KEY} are allowed"):
                nd.open(file)


@pytest.mark.usefixtures("each_walk")
@pytest.mark.parametrize("missing", [1, 65, 200])
def test_an_array_of_strings_that_the_file_ends_before(missing):
    """The position is then at the end of the window, where there is no string to look for."""
    strings = b"".join(text(each) for each in ["a", "b" * 300] * 100)
    payload = STRING.to_bytes(4, "little") + (200 + missing).to_bytes(8, "little") + strings
    header_of = gguf([], [entry("k", ARRAY, payload)])
    file = header_of[: header_of.rindex(b"b") + 1]
    with pytest.raises(nd.GgufError, match="but only 0 are left"):
        nd.open(file)


def test_a_window_is_read_once(monkeypatch):
    """Not for each string, and not for each number."""
    reads, real = [], Cursor._load_window

    def load_window(self, n_bytes):
        reads.append(self.position)
        real(self, n_bytes)

    monkeypatch.setattr(header.Cursor, "_load_window", load_window)
    nd.open(gguf([(f"t{number}", *floats(2)) for number in range(500)], [value("tokens", STRING, TOKENS)]))
    assert len(reads) == len(set(reads)) < 12


@pytest.mark.usefixtures("each_walk")
@pytest.mark.parametrize("n_short", [0, 30, 100])
def test_empty_strings_before_a_tensor_without_a_name(n_short):
    """The length of its name is eight zero bytes, too."""
    strings = ["x"] * n_short + [""] * 100
    model = nd.open(gguf([("", *floats(2))], [value("strings", STRING, strings)]))
    assert list(model.tensors) == [""]
    assert list(model.metadata["strings"]) == strings


@pytest.mark.usefixtures("each_walk")
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("end", ["\0", "\0\0", "\0\0\0", "a\0\0\0\0"])
def test_strings_that_end_with_zero_bytes(shift, end):
    """These come before the length of the next string, which is 1 or more."""
    strings = ["x" * shift, *([end, "b", "c" * 255, end, "dd"] * 40)]
    model = nd.open(gguf([("t", *floats(2))], [value("strings", STRING, strings), value("last", UINT32, 7)]))
    assert list(model.metadata["strings"]) == strings
    assert model.metadata["last"] == 7


@pytest.mark.usefixtures("each_walk")
@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("byte", range(2, 8))
def test_a_length_of_which_one_high_bit_is_set(shift, byte):
    """Seven bytes of it seem to be the length of a short string."""
    strings = [text("x" * (shift + 1)), *[text("hello")] * 200]
    for bit in (0x01, 0x80):
        wrong = bytearray(text("hello"))
        wrong[byte] = bit
        payload = STRING.to_bytes(4, "little") + (201).to_bytes(8, "little") + b"".join([*strings[:150], wrong])
        with pytest.raises(nd.GgufError, match="bytes"):
            nd.open(gguf([], [entry("k", ARRAY, payload + b"".join(strings[151:]))]))


def test_the_identity_of_a_file(large):
    status = os.stat(large)
    with source_of(large).open() as file:
        identity = identity_of(file)
    expected = status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
    assert (identity.size, identity.mtime_ns, identity.inode, identity.device) == expected


def test_the_largest_number_of_shards():
    one = gguf([("t", *floats(2))], [value("split.count", UINT32, 65535), value("split.no", UINT32, 0)])
    with pytest.raises(nd.GgufError, match=r"split\.count is 65535; it must be 1, the number of files in the list"):
        nd.open([one])
    other = gguf([("t", *floats(2))], [value("split.count", UINT32, 65536), value("split.no", UINT32, 0)])
    with pytest.raises(nd.GgufError, match=r"split\.count is 65536; it must be 0 to 65535"):
        nd.open(other)


@pytest.mark.parametrize("offset", [1, 7, 31, 32, 33])
def test_a_file_that_begins_at_any_byte_of_another(offset):
    """Its data is aligned relative to its own start."""
    file = gguf([("t", *floats(5)), ("u", *floats(7))], [value("k", UINT32, 1)])
    model = nd.open(bytes(offset) + file, offset=offset)
    for name, count in (("t", 5), ("u", 7)):
        np.testing.assert_array_equal(model.load(name, "float32", device="reference"), np.arange(count))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 4095, 4096, 4097, 8190, 8191, 8192, 12_290])
def test_a_checksum_of_any_number_of_bytes(length):
    data = np.arange(length, dtype=np.uint8)
    found = checksum(data)
    assert found == checksum(bytes(data))
    for at in {0, length // 2, length - 1} if length else ():
        changed = data.copy()
        changed[at] ^= 1
        assert checksum(changed) != found


def test_a_shorter_file_in_its_place_is_another_file(tmp_path):
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    path.write_bytes(gguf([("t", *floats(500))]))
    model = nd.open(path)
    other.write_bytes(path.read_bytes()[:-100])
    os.utime(other, (1, 1))
    os.replace(other, path)
    with pytest.raises(nd.ReadError, match="it has changed since it was opened"):
        model.load("t", device="reference")


@pytest.mark.parametrize("count", [1, 20, 39])
def test_entries_behind_the_last_one_are_no_tensors(count):
    """What follows the table of tensors may look like more of it."""
    file = bytearray(gguf([(f"t{number}", *floats(3)) for number in range(40)]))
    file[8:16] = count.to_bytes(8, "little")
    assert list(nd.open(bytes(file)).tensors) == [f"t{number}" for number in range(count)]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(nd.Limits)])
def test_a_limit_is_1_or_more(name):
    assert getattr(nd.Limits(**{name: 1}), name) == 1
    with pytest.raises(nd.OptionError, match=f"{name} must be a whole number, 1 or more, got 0"):
        nd.Limits(**{name: 0})


def test_original_shapes_are_restored_only_if_asked_for():
    shape = value("comfy.gguf.orig_shape.t", INT32, [2, 3])
    file = gguf([("t", *floats(6))], [shape])
    assert open_gguf(file).tensors["t"].shape == nd.open(file).tensors["t"].shape == (6,)
    assert open_gguf(file, orig_shapes=True).tensors["t"].shape == (2, 3)
