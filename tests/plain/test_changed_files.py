"""A file that changes after it was opened is noticed, and what was read from it stays whole."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks
from gguf_bytes import STRING, counted, floats, gguf, value
from small_file import CONTENT, GOOD, OTHER_HEADER, assert_loads

import numba_dequant as nd
from numba_dequant.gguf import header, source
from numba_dequant.loading import host_loader


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


# A file that changes


def replace(path, content):
    other = path.parent / "other"
    other.write_bytes(content)
    os.replace(other, path)


def keep_time(path, change):
    found = path.stat()
    change()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


OTHER_VALUES = CONTENT[:-64] + bytes(64)

USES = {
    "load": lambda model: model.load("t", "float32", device="cpu"),
    "load_all": lambda model: model.load_all(device="cpu", threads=3),
    "stream": lambda model: dict(model.stream(device="reference")),
    "rows": lambda model: model.load("u", rows=slice(0, 1), device="cpu"),
    "keep_quantized": lambda model: model.load("t", keep_quantized=True, device="cpu"),
    "read": lambda model: model.read("t"),
    "map": lambda model: model.read("t", mmap=True),
    "item": lambda model: model.metadata["a"][0],
    "items": lambda model: list(model.metadata["a"]),
}


@pytest.fixture(params=USES)
def use(request):
    return USES[request.param]


CHANGES = {
    "longer": lambda path: path.write_bytes(CONTENT + b"\0"),
    "shorter": lambda path: os.truncate(path, len(CONTENT) - 1),
    "empty": lambda path: path.write_bytes(b""),
    "another": lambda path: replace(path, OTHER_VALUES),
    "another that is longer": lambda path: replace(path, CONTENT * 2),
    "another header": lambda path: path.write_bytes(OTHER_HEADER),
    "another header at the same time": lambda path: keep_time(path, lambda: replace(path, OTHER_HEADER)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_has_changed_is_refused(path, use, change):
    model = nd.open(path)
    CHANGES[change](path)
    with pytest.raises((nd.ReadError, nd.GgufError), match=r"has changed|was truncated"):
        use(model)


def test_a_file_that_is_gone_is_missing(path, use):
    model = nd.open(path)
    path.unlink()
    with pytest.raises(nd.MissingFileError):
        use(model)


@pytest.mark.parametrize("times", [(0, 0), (2**31, 2**31), None])
def test_a_time_stamp_alone_is_warned_of_once(path, use, times):
    model = nd.open(path)
    os.utime(path, times)
    with pytest.warns(RuntimeWarning, match=r"model\.gguf: its time stamp has changed .*reopen it") as warned:
        use(model)
    assert len(warned) == 1
    assert_loads(model)
    os.utime(path, (1, 1))
    assert_loads(model)


@pytest.mark.parametrize("name", sorted(USES.keys() - {"items"}))  # those have been read, and are kept
def test_a_header_that_changes_after_the_time_stamp_did_is_noticed(path, name):
    model = nd.open(path)
    os.utime(path, (0, 0))
    with pytest.warns(RuntimeWarning):
        USES[name](model)
    path.write_bytes(OTHER_HEADER)
    with pytest.raises((nd.ReadError, nd.GgufError), match="has changed"):
        USES[name](model)


@pytest.mark.parametrize("name", sorted(USES.keys() - {"items"}))
def test_a_header_that_changes_in_the_moment_of_the_time_stamp_is_noticed(path, name):
    """The system sets the time of a write before its bytes are there."""
    model = nd.open(path)
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    with pytest.warns(RuntimeWarning):
        USES[name](model)
    path.write_bytes(OTHER_HEADER)
    os.utime(path, ns=(now, now))
    with pytest.raises((nd.ReadError, nd.GgufError), match="has changed"):
        USES[name](model)


def test_the_warning_points_at_the_caller(path):
    model = nd.open(path)
    os.utime(path, (0, 0))
    with pytest.warns(RuntimeWarning) as warned:
        model.read("t")
    assert warned[0].filename == __file__


def test_another_number_of_the_file_is_no_change_where_time_and_header_are_the_same(path):
    """Some network file systems number files anew."""
    model = nd.open(path)
    keep_time(path, lambda: replace(path, CONTENT))
    assert_loads(model)


def test_a_disk_where_reading_changes_the_time_is_read(tmp_path, monkeypatch):
    """As unionfs-fuse has it; the header is not read again for each of the chunks."""
    n_rows, headers = 3000, []
    data = random_blocks("Q8_0", n_rows * 2)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([("t", (n_rows, 64), "Q8_0", data.tobytes())]))
    model = nd.open(path)
    real, real_header = source.identity_of, source.Source._has_same_header
    clock = iter(range(1 << 30))

    def identity_of(file):
        return real(file)._replace(mtime_ns=next(clock))

    def has_same_header(self, file):
        headers.append(None)
        return real_header(self, file)

    monkeypatch.setattr(host_loader, "CHUNK_BYTES", 64 * 68)
    monkeypatch.setattr(source, "identity_of", identity_of)
    monkeypatch.setattr(source.Source, "_has_same_header", has_same_header)
    expected = nd.dequantize(data, "Q8_0", shape=(n_rows, 64), device="reference")
    with pytest.warns(RuntimeWarning) as warned:
        assert_same_bits(model.load("t", device="cpu", threads=1), expected)
    assert len(warned) == 1
    assert 4 <= len(headers) <= 8  # for 47 chunks
    assert_same_bits(model.load("t", device="cpu", threads=1), expected)
    assert len(headers) <= 16


def test_a_time_stamp_that_has_been_compared_is_not_compared_again(path, monkeypatch):
    model = nd.open(path)
    os.utime(path, (0, 0))
    with pytest.warns(RuntimeWarning):
        model.read("t")
    monkeypatch.setattr(source.Source, "_has_same_header", lambda *_: pytest.fail("it reads the header again"))
    assert_loads(model)


@pytest.mark.parametrize("n_bytes", [24, 4096, 9000, 300_000])
def test_a_checksum_tells_two_words_that_change_places(n_bytes):
    rng = np.random.default_rng(n_bytes)
    data = rng.integers(0, 256, n_bytes, dtype=np.uint8)
    known = source.checksum(data)
    assert source.checksum(data.tobytes()) == known
    pairs = [(0, 1), (0, n_bytes // 8 - 1), (1, 513), (2, 514)]  # rows have 512 words
    pairs += [rng.choice(n_bytes // 8, 2, replace=False) for _ in range(200)]
    for first, second in pairs:
        if second >= n_bytes // 8:
            continue
        other = data.copy()
        words = other.view(np.uint64)
        words[[first, second]] = words[[second, first]]
        assert source.checksum(other) != known
        other = data.copy()
        other[rng.integers(n_bytes)] ^= 1 << rng.integers(8)
        assert source.checksum(other) != known


def test_every_part_of_a_long_header_is_compared(tmp_path, monkeypatch):
    """All but the end of a string that one window does not hold: it is passed over."""
    monkeypatch.setattr(header, "WINDOW", 4096)
    strings = [f"token{number}" for number in range(1000)]
    path, content = tmp_path / "m.gguf", gguf([("t", *floats(4))], [value("a", STRING, strings)])
    path.write_bytes(content)
    model = nd.open(path)
    kept = model.tensors["t"].source.header
    ends = [offset + length for offset, length, _ in kept]
    starts = [offset for offset, _, _ in kept]
    assert len(kept) > 3
    assert starts[0] == 0
    assert all(end <= start < end + 9 for start, end in zip(starts[1:], ends[:-1], strict=True))
    assert len(content) - 64 < ends[-1] <= model.tensors["t"].offset
    os.utime(path, (0, 0))
    for at in (*starts, *(start + 500 for start in starts[:-1]), *(end - 1 for end in ends)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1]))
        with pytest.raises(nd.ReadError, match="has changed"):
            model.read("t")
        path.write_bytes(content)
    with pytest.warns(RuntimeWarning):
        model.read("t")


def test_the_header_is_read_once_where_nothing_has_changed(path, monkeypatch):
    model = nd.open(path)
    monkeypatch.setattr(source.Source, "_has_same_header", lambda *_: pytest.fail("it reads the header again"))
    assert_loads(model)


def test_a_truncated_file_that_is_gone_is_no_bare_error(path, monkeypatch):
    """The open file knows its size; the path may lead elsewhere by then."""
    from numba_dequant.loading import files

    model, real = nd.open(path), files.read_into

    def cut_and_remove(file, data, offset):
        os.truncate(path, 10)
        path.unlink()
        return real(file, data, offset)

    monkeypatch.setattr(files, "read_into", cut_and_remove)
    with pytest.raises(nd.GgufError, match="the file has 10 bytes"):
        model.load("t", device="cpu")


# Reading


def test_a_file_that_gives_few_bytes_at_a_time_is_read_whole():
    class Slow(source.MemoryFile):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:7])

    data = np.arange(100, dtype=np.uint8)
    for offset, size in ((0, 100), (3, 50), (90, 50), (100, 1)):
        room = np.full(size, 255, np.uint8)
        expected = data[offset : offset + size]
        assert source.read_into(Slow(data), room, offset) == len(expected)
        np.testing.assert_array_equal(room[: len(expected)], expected)
        assert (room[len(expected) :] == 255).all()


def test_read_gives_bytes_of_its_own(path):
    model = nd.open(path)
    found = model.read("t")
    os.truncate(path, 0)
    np.testing.assert_array_equal(found.view("<f4"), counted(4))
    found[:] = 0


def test_verify_survives_a_file_that_is_cut_short(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([(f"t{n}", (4000, 32), "Q8_0", random_blocks("Q8_0", 4000).tobytes()) for n in range(4)]))
    code = f"""
import os, sys
from numba_dequant import verify
from numba_dequant.cli import main
real = verify.dequantize
def late(*arguments, **options):
    os.truncate({str(path)!r}, 4096)
    return real(*arguments, **options)
verify.dequantize = late
sys.exit(main.main(["verify", {str(path)!r}, "--device", "reference"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert "truncated" in done.stderr


def test_a_map_is_a_read_only_view_of_the_file(path):
    found = nd.open(path).read("u", mmap=True)
    assert not found.flags.writeable
    with path.open("r+b") as file:
        file.seek(nd.open(path).tensors["u"].offset)
        file.write(np.float32(7).tobytes())
    np.testing.assert_array_equal(found.view("<f4"), [7, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("mmap", [False, True])
def test_reading_what_is_in_the_other_byte_order(mmap):
    model = nd.open(GOOD / "big_endian.gguf")
    for name, tensor in model.tensors.items():
        found = model.read(name, mmap=mmap)
        assert_same_bits(
            nd.dequantize(found, tensor.format, shape=tensor.shape, device="cpu"), model.load(name, device="cpu")
        )
        np.testing.assert_array_equal(found, nd.open((GOOD / "big_endian.gguf").read_bytes()).read(name))


@pytest.mark.parametrize("name", ["MemoryError", "ValueError"])
@pytest.mark.parametrize("use", ["load", "load_all", "read"])
def test_an_array_that_cannot_be_allocated_is_an_error_of_ours(path, monkeypatch, name, use):
    model, real = nd.open(path), np.empty
    error = {"MemoryError": MemoryError, "ValueError": ValueError}[name]

    def empty(shape, *arguments, **options):
        if shape in (4, (4,), 16, (16,)):
            raise error("too much")
        return real(shape, *arguments, **options)

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(nd.DeviceError, match=r"tensor 't': the CPU is out of memory: \d+ bytes are needed"):
        USES[use](model)


def test_a_sparse_file_of_more_than_there_is_memory_for(tmp_path):
    n_rows = 1 << 39
    head = gguf([("t", (n_rows, 128), "Q1_0", b"")])
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    try:
        os.truncate(path, len(head) + n_rows * 18)
    except OSError:
        pytest.skip("this disk has no files of that size")
    model = nd.open(path)
    for use in (lambda: model.load("t", "float32", device="cpu"), lambda: model.load_all(device="cpu")):
        with pytest.raises(nd.DeviceError, match="out of memory"):
            use()
    assert model.load("t", rows=slice(5, 7), device="cpu").shape == (2, 128)
