"""Which paths are opened, and what is done about a path that is no regular file."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from gguf_bytes import STRING, UINT16, counted, floats, gguf, value

import numba_dequant as nd
from numba_dequant.cli import main
from numba_dequant.gguf import source

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and sockets here")


@pytest.fixture(autouse=True)
def alarm():
    """What waits is ended."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)


NO_FILES = {
    "a directory": os.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a device without an end": lambda path: os.symlink("/dev/random", path),
    "a terminal": lambda path: os.symlink("/dev/tty", path),
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
}


@pytest.fixture(params=NO_FILES)
def no_file(request, tmp_path, monkeypatch):
    """A function that puts something that is no file at a path, and what it is."""
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)  # the socket that is not closed
    kind = request.param
    what = "a device" if kind.startswith(("a device", "a terminal")) else kind
    return NO_FILES[kind], f"it is {what}, not a file"


def shard(number, count, name):
    return gguf([(name, *floats(2))], [value("split.no", UINT16, number), value("split.count", UINT16, count)])


def test_every_way_to_open_refuses_what_is_no_file(tmp_path, no_file, capsys):
    make, what = no_file
    place = tmp_path / "m.gguf"
    make(place)
    for use in (nd.open, nd.load, lambda path: nd.open([path]), lambda path: nd.open(path, offset=1 << 40)):
        with pytest.raises(nd.GgufError, match=what):
            use(place)
    for arguments in (["info"], ["show"], ["verify", "--device", "cpu"]):
        command, *options = arguments
        assert main.main([command, str(place), *options]) == 2
        assert what in capsys.readouterr().err


@pytest.mark.parametrize("allow_truncated", [False, True])
def test_a_shard_that_is_no_file_is_refused(tmp_path, no_file, allow_truncated):
    make, what = no_file
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(shard(0, 2, "a"))
    make(second)
    with pytest.raises(nd.GgufError, match=rf"m-00002-of-00002\.gguf: {what}"):
        nd.open(first, allow_truncated=allow_truncated)


def test_what_is_no_file_is_not_opened_at_all(tmp_path, no_file, monkeypatch):
    """To open a device may have an effect, and a pipe ends its writer when it is closed."""
    make, _ = no_file
    make(tmp_path / "m.gguf")
    monkeypatch.setattr(source.os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(nd.GgufError):
        nd.open(tmp_path / "m.gguf")


def test_a_pipe_that_takes_the_place_of_a_file_in_this_moment_is_not_waited_for(tmp_path, monkeypatch):
    path, real = tmp_path / "m.gguf", source._check_regular
    path.write_bytes(gguf())

    def check_regular(mode):
        real(mode)
        path.unlink()
        os.mkfifo(path)

    monkeypatch.setattr(source, "_check_regular", check_regular)
    with pytest.raises(nd.GgufError, match="it is a pipe, not a file"):
        nd.open(path)


def test_a_link_to_a_file_is_followed(tmp_path):
    """The caches of download programs consist of links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number in (1, 2):
        blob = tmp_path / "blobs" / f"{number:064}"
        blob.write_bytes(shard(number - 1, 2, f"t{number}"))
        (tmp_path / "snapshot" / f"m-0000{number}-of-00002.gguf").symlink_to(f"../blobs/{blob.name}")
    model = nd.open(tmp_path / "snapshot" / "m-00001-of-00002.gguf")
    for name in ("t1", "t2"):
        np.testing.assert_array_equal(model.load(name, "float32", device="cpu"), counted(2))


ESCAPES = ["../outside", "/etc/passwd", "..\\outside", "%2e%2e/outside", "a\0b", "~"]


@pytest.mark.parametrize("escape", ESCAPES)
def test_shards_are_in_the_folder_of_the_first_one_whatever_stands_in_it(tmp_path, escape):
    """In a process of its own, which tells every path that it opens."""
    folder = tmp_path / "folder"
    folder.mkdir()
    entries = [value(f"split.{key}", STRING, escape) for key in ("path", "prefix", "name", "files")]
    entries += [value("split.no", UINT16, 0), value("split.count", UINT16, 3), value("general.name", STRING, escape)]
    (folder / "m-00001-of-00003.gguf").write_bytes(gguf([(escape.replace("\0", ""), *floats(1))], entries))
    (folder / "m-00002-of-00003.gguf").write_bytes(shard(1, 3, "b"))
    (folder / "m-00003-of-00003.gguf").write_bytes(shard(2, 3, "c"))
    code = """
import os, sys
import numba_dequant as nd
nd.load(sys.argv[1], device="reference")  # imports what it needs
paths = []
sys.addaudithook(lambda event, arguments: paths.append(os.fspath(arguments[0])) if event == "open" else None)
nd.load(sys.argv[1], device="reference")
print(sorted(set(paths)))
"""
    command = [sys.executable, "-c", code, str(folder / "m-00001-of-00003.gguf")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"{[str(folder / f'm-0000{number}-of-00003.gguf') for number in (1, 2, 3)]}\n"


@pytest.mark.parametrize("count", [2, 99, 12345])
def test_the_count_of_shards_and_the_file_name_must_agree(tmp_path, count):
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(shard(0, count, "a"))
    with pytest.raises(nd.GgufError, match=f"its name does not end in -00001-of-{count:05}"):
        nd.open(path)


@pytest.mark.filterwarnings("ignore:.*time stamp")  # a new file may have the inode of the old one
def test_a_file_that_is_exchanged_again_and_again_is_the_one_or_the_other_or_an_error(tmp_path):
    """A path that is a sound file, another one, a shorter one, a pipe or nothing, in turn, while it is loaded."""
    path, other = tmp_path / "m.gguf", tmp_path / "other"
    contents = [
        gguf([("t", *floats(500))]),
        gguf([("t", (500,), "F32", bytes(2000))]),
        gguf([("t", *floats(500))])[:700],
    ]
    is_over = threading.Event()

    def exchange():
        for number in range(100_000):
            if is_over.is_set():
                return
            with contextlib.suppress(FileNotFoundError):
                if number % 5 < 3:
                    other.write_bytes(contents[number % 5])
                    other.replace(path)
                else:
                    path.unlink()
                    if number % 5 == 3:
                        os.mkfifo(path)

    thread = threading.Thread(target=exchange)
    thread.start()
    n_loaded = n_refused = 0
    try:
        for _ in range(300):
            try:
                found = nd.load(path, dtype="float32", device="reference", threads=1)["t"]
            except (nd.GgufError, nd.ReadError):
                n_refused += 1
            else:
                assert not found.any() or (found == counted(500)).all()
                n_loaded += 1
    finally:
        is_over.set()
        thread.join()
    assert n_loaded + n_refused == 300
    assert n_refused
