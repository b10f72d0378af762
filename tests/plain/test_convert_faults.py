"""`numba-dequant convert` when something goes wrong: what it says, and what it leaves behind."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors_bytes
from blocks import write_model
from conversions import TENSORS, assert_holds, files, run
from gguf_bytes import gguf

from numba_dequant.cli import convert, main, new_files, safetensors_format


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.gguf", TENSORS, [("general.architecture", "llama")])
    return tmp_path


@pytest.mark.parametrize("existing", ["m.safetensors", "m.safetensors.index.json", "m-00002-of-00002.safetensors"])
def test_nothing_is_overwritten_unless_forced(folder, capsys, existing):
    """Also a file that a program would load instead of the new ones."""
    (folder / existing).write_text("mine")
    arguments = ["model.gguf", "m.safetensors", "--dtype", "fp32", "--shard-size", "10.2KB"]
    assert run(*arguments) == 2
    assert f"{existing} exists; pass --force to replace it" in capsys.readouterr().err
    assert files(folder) == [existing]
    assert (folder / existing).read_text() == "mine"
    assert run(*arguments, "--force") == 0
    assert files(folder) == [f"m-0000{n}-of-00002.safetensors" for n in (1, 2)] + ["m.safetensors.index.json"]


def test_the_source_is_not_overwritten(folder, capsys):
    (folder / "model.gguf").rename(folder / "m.safetensors")
    before = (folder / "m.safetensors").read_bytes()
    assert run("m.safetensors", "m.safetensors", "--force") == 2
    assert "m.safetensors is the file to convert" in capsys.readouterr().err
    assert (folder / "m.safetensors").read_bytes() == before


def test_a_disk_that_is_too_small(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    assert run("model.gguf", "m.safetensors") == 2
    message = "m.safetensors: 7,183 bytes are needed, and 99 are free; free some space, or write to another disk"
    assert capsys.readouterr().err == f"numba-dequant: {message}\n"
    assert files(folder) == []


def test_a_disk_that_becomes_full(folder, capsys, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(new_files.os, "fsync", fail)
    assert run("model.gguf", "m.safetensors") == 2
    message = "m.safetensors: No space left on device; free some space, or write to another disk"
    assert capsys.readouterr().err == f"numba-dequant: {message}\n"
    assert files(folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of file sizes")
def test_a_system_that_refuses_to_write_more(folder, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        status = run("model.gguf", "m.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "m.safetensors: File too large; pass a smaller --shard-size" in capsys.readouterr().err
    assert files(folder) == []


def test_a_file_that_is_damaged_halfway(folder, capsys, monkeypatch):
    monkeypatch.setattr(convert, "SLICE_BYTES", 512)
    real = safetensors_format.header

    def cut(shard, metadata):
        os.truncate("model.gguf", 3000)
        return real(shard, metadata)

    monkeypatch.setattr(safetensors_format, "header", cut)
    assert run("model.gguf", "m.safetensors") == 2
    assert capsys.readouterr().err.startswith("numba-dequant: model.gguf: ")
    assert files(folder) == []


def test_an_interrupt_leaves_nothing(folder, capsys, monkeypatch):
    def interrupt(shards):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_format, "index", interrupt)
    assert run("model.gguf", "m.safetensors", "--shard-size", "5KB") == main.INTERRUPTED
    assert files(folder) == []


def test_a_move_that_fails_takes_back_the_others(folder, capsys, monkeypatch):
    real = os.replace

    def replace(source, target):
        if target.endswith(".json"):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(new_files.os, "replace", replace)
    assert run("model.gguf", "m.safetensors", "--shard-size", "5KB") == 2
    assert "Permission denied; write to another folder" in capsys.readouterr().err
    assert files(folder) == []


KILLED = """
import os, signal, sys
from numba_dequant.cli import convert, main, new_files
convert.SLICE_BYTES, moment = 512, sys.argv[1]
calls = []

def killing(real, count):
    def call(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call

if moment == "while writing":
    convert._write_shard = killing(convert._write_shard, 2)
elif moment == "before the end of a file":
    os.fsync = killing(os.fsync, 1)
elif moment == "before the first move":
    os.replace = killing(os.replace, 1)
elif moment == "before the last move":
    os.replace = killing(os.replace, 3)
options = ["--dtype", "fp32", "--shard-size", "10.2KB", "--device", "reference"]
main.main(["convert", "model.gguf", "m.safetensors", *options])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    "moment", ["while writing", "before the end of a file", "before the first move", "before the last move"]
)
def test_killed_halfway(folder, moment):
    """No name of a model is there that a program would load, and the next run works and leaves nothing else."""
    found = subprocess.run([sys.executable, "-c", KILLED, moment], check=False)
    assert found.returncode == -signal.SIGKILL
    left = [name for name in files(folder) if not new_files.WORK_NAME.fullmatch(name)]
    complete = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert left == (complete if moment == "before the last move" else [])
    assert len(files(folder)) == len(left) + 1
    assert run("model.gguf", "m.safetensors", "--force") == 0
    assert files(folder) == [*left, "m.safetensors"]
    assert_holds(safetensors_bytes.read(folder / "m.safetensors")[1], "model.gguf", "bfloat16")


def test_a_run_at_the_same_time_is_not_disturbed(folder):
    with new_files.NewFiles(".") as first:
        with first.writing("a.safetensors") as file:
            file.write(b"a")
        assert run("model.gguf", "m.safetensors") == 0
        first.publish(["a.safetensors"], [])
    assert files(folder) == ["a.safetensors", "m.safetensors"]


def test_foreign_files_are_not_taken_for_leftovers(folder):
    theirs = folder / f".numba_dequant-convert-{'0' * 16}"
    theirs.mkdir()  # another process has just made it, and has not locked it yet
    (folder / f".numba_dequant-convert-{'1' * 16}").symlink_to(theirs)
    (folder / f".numba_dequant-convert-{'2' * 16}").write_text("a file")
    assert run("model.gguf", "m.safetensors") == 0
    assert len(files(folder)) == 4
    os.utime(theirs, (1, 1))
    assert run("model.gguf", "m.safetensors", "--force") == 0
    assert not theirs.exists()
    assert len(files(folder)) == 3


MEASURED = """
from numba_dequant.cli import convert, main
convert.SLICE_BYTES = 1 << 20

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

before = peak()
assert main.main(["convert", "large.gguf", "m.safetensors", "--dtype", "float16"]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor(folder):
    header = gguf([("w", (1, 50_000_000), "F16", b"")])
    with open("large.gguf", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 100_000_000)
    found = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(found.stdout.splitlines()[-1]) < 50_000_000


def test_a_work_folder_that_another_process_removes_at_once(folder, monkeypatch):
    """Before it is locked: another one is made."""
    real, removed = new_files._is_locked, []

    def remove_first(handle):
        if not removed:
            removed.extend(path for path in folder.iterdir() if new_files.WORK_NAME.fullmatch(path.name))
            new_files.shutil.rmtree(removed[0])
        return real(handle)

    monkeypatch.setattr(new_files, "_is_locked", remove_first)
    assert run("model.gguf", "m.safetensors") == 0
    assert len(removed) == 1
    assert files(folder) == ["m.safetensors"]
