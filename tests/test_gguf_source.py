"""Where a model comes from: paths of every kind, memory, lists of shards; and whether it is still what it was."""

import array
import contextlib
import copy
import errno
import mmap
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, assert_same_bits, random_blocks
from gguf_bytes import INT32, STRING, UINT16, counted, floats, gguf, value

import numba_dequant as nd
from numba_dequant.gguf import source
from numba_dequant.loading import host_loader

GOOD = DATA / "gguf" / "good"
CONTENT = gguf([("t", *floats(4)), ("u", *floats(2, 3))], [value("a", INT32, [1, 2, 3])])


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


def assert_loads(model):
    for device in ("cpu", "reference"):
        found = model.load_all(dtype="float32", device=device)
        np.testing.assert_array_equal(found["t"], counted(4))
        np.testing.assert_array_equal(found["u"], counted(2, 3))
    np.testing.assert_array_equal(model.read("t").view("<f4"), counted(4))
    assert model.metadata["a"].to_list() == [1, 2, 3]


# Paths


def test_a_relative_path_is_found_after_a_change_of_the_working_directory(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nd.open("model.gguf")
    kept = pickle.dumps(model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model.gguf").write_bytes(CONTENT.replace(counted(4).tobytes(), bytes(16)))
    assert_loads(model)
    assert_loads(pickle.loads(kept))
    assert model.path == model.tensors["t"].path == "model.gguf"


def test_a_relative_path_through_a_link_is_the_system_s(path, tmp_path, monkeypatch):
    """`link/..` is where the link leads to, and not where it lies."""
    (tmp_path / "far" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    shutil.copy(path, tmp_path / "far" / "other.gguf")
    monkeypatch.chdir(tmp_path)
    model = nd.open("link/../other.gguf")
    monkeypatch.chdir("/")
    assert_loads(model)


def test_a_working_directory_that_is_gone(path, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(nd.MissingFileError):
        nd.open("model.gguf")
    assert_loads(nd.open(path))


def entry_of(path):
    with os.scandir(os.fsencode(path.parent)) as entries:
        return next(entries)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode, entry_of])
def test_paths_of_every_kind(path, kind):
    assert_loads(nd.open(kind(path)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff-00001-of-00003.gguf"
    for number in (1, 2, 3):
        shutil.copy(GOOD / f"split-0000{number}-of-00003.gguf", name.replace(b"00001-of", b"0000%d-of" % number))
    assert len(nd.open(name).tensors) == len(nd.open(os.fsdecode(name)).tensors) == 6


def test_shards_by_a_path_of_bytes():
    assert len(nd.open(os.fsencode(GOOD / "split-00001-of-00003.gguf")).tensors) == 6


@pytest.mark.parametrize("name", ["none.gguf", "no/folder/none.gguf", "a\0b", "", "~/none.gguf", "https://x/none.gguf"])
def test_a_file_that_does_not_exist_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for given in (name, *([name.encode()] if "\0" not in name else [])):
        with pytest.raises(nd.MissingFileError) as caught:
            nd.open(given)
        assert isinstance(caught.value, FileNotFoundError)
        assert isinstance(caught.value, nd.ReadError)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, name)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    if name.startswith("~"):
        assert "expanduser" in str(caught.value)


@pytest.fixture(params=["a directory", "a pipe", "a socket", "a device", "a loop"])
def no_file(request, tmp_path):
    kind, place = request.param, tmp_path / "place"
    with contextlib.ExitStack() as stack:
        if kind == "a directory":
            place.mkdir()
        elif kind == "a pipe":
            os.mkfifo(place)
        elif kind == "a socket":
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(place))
        elif kind == "a device":
            place.symlink_to("/dev/zero")
        else:
            place.symlink_to(place)
        yield kind, place


@pytest.fixture
def alarm():
    """What waits is ended."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("alarm")
def test_what_is_no_file_is_refused_and_never_waited_for(no_file):
    kind, place = no_file
    with pytest.raises(nd.NumbaDequantError) as caught:
        nd.open(place)
    if kind == "a loop":
        assert caught.value.errno == errno.ELOOP
        assert "correct the link" in str(caught.value)
    else:
        assert f"no regular file: it is {kind}" in str(caught.value)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("threads", [1, 3])
def test_what_has_taken_the_place_of_a_file_is_refused_and_never_waited_for(path, no_file, threads, monkeypatch):
    kind, place = no_file
    monkeypatch.setattr(host_loader, "CHUNK_BYTES", 64)
    model = nd.open(path)
    path.unlink()
    path.symlink_to(place)
    uses = [
        lambda: model.load("t", device="cpu", threads=threads),
        lambda: model.load_all(device="reference", threads=threads),
        lambda: list(model.stream(device="cpu", threads=threads)),
        lambda: model.read("t"),
        lambda: model.read("t", mmap=True),
        lambda: model.metadata["a"][0],
        model.metadata["a"].to_list,
    ]
    for use in uses:
        with pytest.raises(nd.ReadError) as caught:
            use()
        assert ("symbolic link" if kind == "a loop" else f"it is {kind}") in str(caught.value)
    assert "cannot be read" in model._repr_html_()


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EACCES, "change its permissions"),
        (errno.EMFILE, "raise the limit of open files"),
        (errno.EIO, "check the disk, or copy the file again"),
    ],
)
def test_the_advice_fits_the_error(path, monkeypatch, code, advice):
    model = nd.open(path)

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(source.os, "open", refuse)
    uses = [lambda: nd.open(path), lambda: model.read("t"), lambda: model.load("t", device="cpu")]
    for use in [*uses, lambda: model.metadata["a"][1], lambda: list(model.metadata["a"])]:
        with pytest.raises(nd.ReadError, match=advice) as caught:
            use()
        assert caught.value.errno == code
        assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(path):
    path.chmod(0)
    with pytest.raises(nd.ReadError, match="change its permissions"):
        nd.open(path)


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
OTHER_HEADER = CONTENT.replace(b"\1\0\0\0\2\0\0\0\3\0\0\0", b"\4\0\0\0\5\0\0\0\6\0\0\0")

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
    with pytest.raises((nd.ReadError, nd.GgufError), match=r"has changed|cut short"):
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
    with pytest.warns(RuntimeWarning, match=r"model\.gguf: its time stamp has changed .*Reopen it") as warned:
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
    assert_same_bits(model.load("t", device="cpu", threads=1), expected)
    assert 2 <= len(headers) < 20


@pytest.mark.parametrize("n_bytes", [24, 4096, 9000, 300_000])
def test_a_checksum_tells_two_words_that_change_places(n_bytes):
    rng = np.random.default_rng(n_bytes)
    data = rng.integers(0, 256, n_bytes, dtype=np.uint8)
    known = source.checksum(data)
    assert source.checksum(data.tobytes()) == known
    for _ in range(200):
        first, second = rng.choice(n_bytes // 8, 2, replace=False)
        other = data.copy()
        words = other.view(np.uint64)
        words[[first, second]] = words[[second, first]]
        assert source.checksum(other) != known
        other = data.copy()
        other[rng.integers(n_bytes)] ^= 1 << rng.integers(8)
        assert source.checksum(other) != known


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
    with pytest.raises(nd.GgufError, match="found a file of 10 bytes"):
        model.load("t", device="cpu")


# Reading


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
    assert "cut short" in done.stderr


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
        if shape in ((4,), (16,)):
            raise error("too much")
        return real(shape, *arguments, **options)

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(nd.DeviceError, match="tensor 't': out of memory: too much"):
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


# Memory


HOLDERS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "uint8": lambda content: np.frombuffer(content, np.uint8),
    "int8": lambda content: np.frombuffer(content, np.int8),
    "2-D": lambda content: np.frombuffer(content, np.uint8).reshape(2, -1),
    "array.array": lambda content: array.array("B", content),
    "at an odd address": lambda content: memoryview(b"x" + content)[1:],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_model_in_memory_loads(holder):
    model = nd.open(HOLDERS[holder](CONTENT))
    assert_loads(model)
    assert model.path == "<memory>"
    assert_loads(pickle.loads(pickle.dumps(model)))
    assert_loads(copy.deepcopy(model))
    np.testing.assert_array_equal(nd.load(HOLDERS[holder](CONTENT), "u", "float32", device="cpu")["u"], counted(2, 3))


def test_a_model_in_a_map_loads(path):
    with path.open("rb") as file:
        assert_loads(nd.open(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def test_reading_from_memory_copies_nothing():
    data = bytearray(CONTENT)
    model = nd.open(data)
    for found in (model.read("u"), model.read("u", mmap=True)):
        assert np.shares_memory(found, np.frombuffer(data, np.uint8))
        assert not found.flags.writeable


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", [path.name for path in sorted(GOOD.glob("*.gguf")) if "split" not in path.name])
def test_every_good_file_loads_from_memory_as_from_disk(name, threads):
    content = (GOOD / name).read_bytes()
    on_disk, in_memory = nd.open(GOOD / name), nd.open(b"7 bytes" + content, offset=7)
    assert list(on_disk.tensors) == list(in_memory.tensors)
    assert dict(on_disk.metadata) == dict(in_memory.metadata)
    for key, found in in_memory.load_all(device="reference", threads=threads).items():
        assert_same_bits(found, on_disk.load(key, device="reference"))
        np.testing.assert_array_equal(in_memory.read(key), on_disk.read(key))


def test_a_model_in_memory_loads_to_a_gpu(late, threads):
    from small_model import TENSORS, assert_right

    tensors = [(name, shape, kind, bytes(data)) for name, (kind, shape, data) in TENSORS.items()]
    model = nd.open(b"xyz" + gguf(tensors), offset=3)
    for name, found in model.load_all(device="cuda", threads=threads).items():
        assert_right(found, name)
    for name, found in model.stream(device="cuda", threads=threads):
        assert_right(found, name)
    kept = model.load("token_embd", device="cuda", keep_quantized=True)
    np.testing.assert_array_equal(kept.data.copy_to_host(), model.read("token_embd"))


@pytest.mark.parametrize("length", range(4, len(CONTENT) - 23))
def test_the_beginning_of_a_file_in_memory_is_an_error(length):
    with pytest.raises(nd.GgufError):
        nd.open(CONTENT[:length])


@pytest.mark.parametrize("given", [5, None, True, 2.5, object(), {"a": 1}, {"a"}, [[CONTENT]], [], (), iter([]), open])
def test_what_is_no_model_is_an_option_error(given):
    for function in (nd.open, nd.load):
        with pytest.raises(nd.OptionError):
            function(given)


def test_an_open_file_is_refused_with_what_to_pass_instead(path):
    with path.open("rb") as file, pytest.raises(nd.OptionError, match=r"pass what its read\(\) gives"):
        nd.open(file)


@pytest.mark.parametrize("given", [np.zeros(8, "f4"), memoryview(CONTENT)[::2], np.frombuffer(CONTENT, np.uint8)[::2]])
def test_memory_that_is_not_contiguous_bytes_is_a_data_error(given):
    with pytest.raises(nd.DataError):
        nd.open(given)


# At an offset


@pytest.mark.parametrize("offset", [0, 1, 7, 32, 100, 4096])
@pytest.mark.parametrize("alignment", [32, 256])
def test_a_file_that_begins_within_another_loads(tmp_path, offset, alignment):
    from gguf_bytes import UINT32

    content = gguf(
        [("t", *floats(4)), ("u", *floats(2, 3))],
        [value("general.alignment", UINT32, alignment), value("a", INT32, [1, 2, 3])],
        alignment=alignment,
    )
    path = tmp_path / "container"
    path.write_bytes(b"\xaa" * offset + content + b"behind")
    model = nd.open(path, offset=offset)
    assert_loads(model)
    assert path.read_bytes()[model.tensors["u"].offset :][:24] == counted(2, 3).tobytes()
    np.testing.assert_array_equal(nd.load(path, "t", "float32", device="cpu", offset=np.int64(offset))["t"], counted(4))
    assert_loads(nd.open(path.read_bytes(), offset=offset))


def test_errors_at_an_offset_name_bytes_of_the_file(tmp_path):
    path = tmp_path / "container"
    path.write_bytes(b"1234567" + CONTENT[:4] + b"\x63" + CONTENT[5:])
    with pytest.raises(nd.GgufError) as caught:
        nd.open(path, offset=7)
    assert (caught.value.field, caught.value.offset, caught.value.found) == ("version", 11, 99)
    with pytest.raises(nd.GgufError, match="magic at byte 6"):
        nd.open(path, offset=6)
    with pytest.raises(nd.GgufError, match=f"a file of {len(CONTENT) + 7} bytes"):
        nd.open(path, offset=1 << 62)


@pytest.mark.parametrize("offset", [-1, 1.0, "7", None, True, 1 << 70])
def test_an_offset_is_a_whole_number(path, offset):
    with pytest.raises(nd.OptionError, match="offset must be a whole number, 0 or more"):
        nd.open(path, offset=offset)


def test_an_offset_is_for_one_file(path):
    with pytest.raises(nd.OptionError, match="offset is for one file"):
        nd.open([path], offset=1)
    content = (GOOD / "split-00001-of-00003.gguf").read_bytes()
    with pytest.raises(nd.GgufError, match=r"split\.count.*all shards in a list"):
        nd.open(b"x" + content, offset=1)


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


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (SHARDS[:2], r"split-00001.*'split\.count': found 3, allowed: 2, the number of files in the list"),
        (SHARDS[:1], r"'split\.count': found 3, allowed: 1"),
        ([*SHARDS[:2], SHARDS[1]], r"'split\.no': found 1 and in .*split-00002.*allowed: 0 to 2, each in one file"),
        ([*SHARDS, SHARDS[0]], r"'split\.count': found 3, allowed: 4"),
        ([CONTENT, CONTENT], r"<memory 1>: metadata 'split\.count': found None, allowed: 2"),
    ],
)
def test_a_list_of_the_wrong_shards_is_refused(shards, message):
    with pytest.raises(nd.GgufError, match=message):
        nd.open(shards)


@pytest.mark.parametrize("numbers", [(0, 7), (0, -1), (1, 2), (0, None)])
def test_the_shards_of_a_list_have_each_number_once(numbers):
    shards = []
    for at, number in enumerate(numbers):
        entries = [value("split.count", UINT16, 2)]
        entries += [value("split.no", INT32, number)] if number is not None else []
        shards.append(gguf([(f"t{at}", *floats(1))], entries))
    with pytest.raises(nd.GgufError, match=r"'split\.no': found .*allowed: 0 to 1, each in one file"):
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
        nd.GgufError, match=r"ends in -00001-of-00003\.gguf, or all shards in a list: open\(\[\.\.\.\]\)"
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
    with pytest.raises(nd.GgufError, match=f"'u' data .*of {len(CONTENT) - 40} bytes.*its download looks incomplete"):
        nd.open(incomplete)


def test_a_file_that_ends_within_its_header_says_so(path):
    data = nd.open(path).tensors["t"].offset
    for length in range(8, data - 32):
        for options in ({}, {"allow_truncated": True}):
            with pytest.raises(nd.GgufError, match=r"the file ends within its header, as .* download is incomplete"):
                nd.open(CONTENT[:length], **options)


def test_an_incomplete_file_is_opened_on_request(incomplete):
    model = nd.open(incomplete, allow_truncated=True)
    assert list(model.tensors) == ["t", "u"]
    assert model.n_bytes == (len(CONTENT) - 40, len(CONTENT) - 8)
    np.testing.assert_array_equal(model.load("t", "float32", device="cpu"), counted(4))
    np.testing.assert_array_equal(nd.load(incomplete, "t", device="cpu", allow_truncated=True)["t"], counted(4))
    for use in (lambda: model.load("u", device="cpu"), lambda: model.load_all(device="cpu"), lambda: model.read("u")):
        with pytest.raises(nd.GgufError, match=r"'u' data.*looks incomplete"):
            use()
    with pytest.raises(nd.GgufError, match=r"'u' data.*looks incomplete"):
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


def test_a_split_of_which_shards_are_still_missing_is_opened_on_request(tmp_path):
    shutil.copy(SHARDS[0], tmp_path)
    with pytest.raises(nd.GgufError, match=r"no file .*split-00002"):
        nd.open(tmp_path / SHARDS[0].name)
    model = nd.open(tmp_path / SHARDS[0].name, allow_truncated=True)
    assert len(model.tensors) == 2
    assert model.missing_shards == tuple(str(tmp_path / path.name) for path in SHARDS[1:])
    assert len(model.load_all(device="cpu")) == 2


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


def test_models_and_tensors_that_were_pickled_are_what_they_were(path):
    model = nd.open(path)
    again = pickle.loads(pickle.dumps(model))
    assert_loads(again)
    assert again.tensors["t"].source == model.tensors["t"].source
    assert hash(again.tensors["t"].source) == hash(model.tensors["t"].source)
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
