"""Where a model comes from: paths of every kind, memory, and files within files."""

import array
import contextlib
import copy
import errno
import io
import mmap
import os
import pickle
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from blocks import assert_same_bits
from gguf_bytes import INT32, counted, floats, gguf, value
from small_file import CONTENT, GOOD, assert_loads

import numba_dequant as nd
from numba_dequant.gguf import source
from numba_dequant.loading import host_loader


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


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
        assert f"it is {kind}, not a file" in str(caught.value)


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


@pytest.mark.parametrize("length", range(4, len(CONTENT) - 23))
def test_the_beginning_of_a_file_in_memory_is_an_error(length):
    with pytest.raises(nd.GgufError):
        nd.open(CONTENT[:length])


@pytest.mark.parametrize("given", [5, None, True, 2.5, object(), {"a": 1}, {"a"}, [[CONTENT]], [], (), iter([]), open])
def test_what_is_no_model_is_an_option_error(given):
    for function in (nd.open, nd.load):
        with pytest.raises(nd.OptionError):
            function(given)


@pytest.mark.parametrize("given", [b"GGUF", b"GGUF\3"])
def test_the_first_bytes_of_a_file_are_no_path(given):
    with pytest.raises(nd.GgufError, match=r"<memory>: at byte 4: version: 4 more bytes are needed"):
        nd.open(given)


@pytest.mark.parametrize("given", [b"GGUF\3x", b"xGGUF", b"none"])
def test_bytes_without_a_nul_are_a_path(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(nd.MissingFileError):
        nd.open(given)


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        ("__fspath__", nd.OptionError, "expected a path, got Odd: "),
        ("__dlpack__", nd.DataError, "cannot read bytes from Odd: "),
        ("__getattr__", nd.OptionError, "expected a path or the contents of a file as bytes, got "),
    ],
)
@pytest.mark.parametrize("action", [lambda: {}["key"], lambda: 1 // 0, lambda: int("x")])
def test_an_object_that_fails_is_an_error_of_ours(method, kind, message, action):
    given = type("Odd", (), {method: lambda *_, **__: action()})()
    with pytest.raises(kind, match=message):
        nd.open(given)


def test_an_open_file_is_refused_with_what_to_pass_instead(path):
    with path.open("rb") as file, pytest.raises(nd.OptionError, match=r"pass the result of its read"):
        nd.open(file)


@pytest.mark.parametrize("given", [np.zeros(8, "f4"), memoryview(CONTENT)[::2], np.frombuffer(CONTENT, np.uint8)[::2]])
def test_memory_that_is_not_contiguous_bytes_is_a_data_error(given):
    with pytest.raises(nd.DataError):
        nd.open(given)


def test_memory_is_read_like_a_file():
    ours, theirs = source.MemoryFile(np.arange(100, dtype=np.uint8)), io.BytesIO(bytes(range(100)))
    assert ours.readable()
    assert ours.seekable()
    assert not ours.writable()
    steps = [(0, os.SEEK_CUR), (90, os.SEEK_SET), (-20, os.SEEK_END), (-30, os.SEEK_CUR), (200, os.SEEK_SET)]
    assert ours.tell() == 0
    for offset, whence in steps:
        assert ours.seek(offset, whence) == theirs.seek(offset, whence)
        assert ours.read(7) == theirs.read(7)
        assert ours.tell() == theirs.tell()
    ours.seek(95)
    assert ours.read() == bytes(range(95, 100))


def test_an_open_file_waits_for_its_bytes(path):
    """It is opened without waiting, for the sake of pipes."""
    with source.open_regular(str(path)) as file:
        assert os.get_blocking(file.fileno())


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
    with pytest.raises(nd.GgufError, match="at byte 6: this is not a GGUF file"):
        nd.open(path, offset=6)
    with pytest.raises(nd.GgufError, match=f"the file, which has {len(CONTENT) + 7} bytes"):
        nd.open(path, offset=1 << 62)


@pytest.mark.parametrize("offset", [-1, 1.0, "7", None, True, 1 << 70])
def test_an_offset_is_a_whole_number(path, offset):
    with pytest.raises(nd.OptionError, match="offset must be a whole number, 0 or more"):
        nd.open(path, offset=offset)


def test_an_offset_is_for_one_file(path):
    with pytest.raises(nd.OptionError, match="offset is for one file"):
        nd.open([path], offset=1)
    content = (GOOD / "split-00001-of-00003.gguf").read_bytes()
    within = path.parent / "split-00001-of-00003.gguf"
    within.write_bytes(b"x" + content)
    for given in (b"x" + content, within):
        with pytest.raises(nd.GgufError, match=r"one of 3 shards.*all shards as a list"):
            nd.open(given, offset=1)
