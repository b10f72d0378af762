import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from processes import assert_processes_keep

import numba_dequant as nd
from numba_dequant import disk_cache
from numba_dequant.backends import cpu
from numba_dequant.cli import main

with_modes = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")

NAME = "label-" + 32 * "0"


def compute():
    return nd.dequantize(bytes(range(34)), "Q8_0", device="cpu")


def test_what_is_written_is_read(empty_store):
    assert disk_cache.write(NAME, b"payload")
    assert disk_cache.read(NAME) == b"payload"
    assert disk_cache.read(NAME.replace("0", "1")) is None


def test_compiled_once_then_loaded(empty_store, monkeypatch):
    first = compute()
    (entry,) = empty_store.iterdir()
    before = entry.stat().st_mtime_ns
    cpu._compile.cache_clear()
    monkeypatch.setattr(disk_cache, "write", lambda *_: pytest.fail("compiled again"))
    np.testing.assert_array_equal(compute(), first)
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:50], lambda content: content[:-1] + b"?", lambda content: b"x" * 99],
    ids=["empty", "cut", "flipped", "rubbish"],
)
def test_a_damaged_entry_is_rebuilt(empty_store, damage):
    first = compute()
    (entry,) = empty_store.iterdir()
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    cpu._compile.cache_clear()
    np.testing.assert_array_equal(compute(), first)
    assert disk_cache.read(entry.name) is not None


def test_a_sound_entry_that_is_no_code_is_rebuilt(empty_store):
    first = compute()
    (entry,) = empty_store.iterdir()
    disk_cache.write(entry.name, b"not a pickle")
    cpu._compile.cache_clear()
    np.testing.assert_array_equal(compute(), first)


def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(blocked / "below"))
    cpu._compile.cache_clear()
    assert compute().shape == (32,)
    assert disk_cache.write(NAME, b"") is False


@pytest.mark.long
def test_six_processes_at_once(empty_store):
    assert_processes_keep(6, compute, empty_store, 1, ["numba_dequant.kernels.intrinsics_cpu"])


def test_code_from_disk_and_code_compiled_here_do_not_mix(empty_store):
    """Numba numbers functions as it compiles them; a process that compiles in another order numbers them otherwise."""
    code = """
import sys
import numpy as np, numba_dequant as nd
for name in sys.argv[1:]:
    data = np.arange(nd.FORMATS[name].type_size * 24, dtype=np.uint8)
    found = nd.dequantize(data, name, device="cpu")
    expected = nd.dequantize(data, name, device="reference")
    assert np.array_equal(found, expected, equal_nan=True), name
"""
    # These call a primitive too large to be compiled into its caller: the second process has one of its own under
    # the number that the first gave to another.
    for order in (["F16"], ["F32", "F16"], ["BF16", "F32", "F16"], ["Q8_0", "BF16", "F16"]):
        found = subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr


def test_the_name_depends_on_source_and_parts(monkeypatch):
    name = disk_cache.cache_key("label", "1.0")
    assert name != disk_cache.cache_key("label", "1.1")
    monkeypatch.setattr(disk_cache, "source_digest", lambda: "another source")
    assert name != disk_cache.cache_key("label", "1.0")


@with_modes
def test_no_home_directory(monkeypatch, tmp_path):
    import pwd

    for name in ("NUMBA_DEQUANT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["nobody"])
    monkeypatch.chdir(tmp_path)
    cpu._compile.cache_clear()
    assert compute().shape == (32,)
    assert disk_cache.write(NAME, b"") is False
    assert disk_cache.entries() == {}
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="set NUMBA_DEQUANT_CACHE_DIR"):
        disk_cache.directory()


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_directory_is_the_user_s(platform, monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_DEQUANT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(disk_cache.sys, "platform", platform)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in Path(disk_cache.directory()).parents


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture
def others(monkeypatch):
    """A function that gives a file to another user, or makes this process another user's."""

    def give_away(path):
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534, follow_symlinks=False)
        else:
            monkeypatch.setattr(disk_cache.os, "geteuid", lambda: os.getuid() + 1)

    return give_away


def test_clear_removes_entries_and_nothing_else(empty_store):
    assert disk_cache.write(NAME, b"payload")
    kept = {
        "thesis.tex": b"text",
        "model.gguf": b"GGUF",
        "cpu-Q8_0-float16-" + 32 * "0": b"a file of the user's with the name of an entry",
        "cpu-Q8_0-float16-" + 32 * "1": b"",
        "label-" + 31 * "0": disk_cache.MAGIC,
        "label-" + 32 * "G": disk_cache.MAGIC,
        NAME + ".old": disk_cache.MAGIC,
        "x." + NAME: disk_cache.MAGIC,
        ".hidden": disk_cache.MAGIC,
    }
    for name, content in kept.items():
        (empty_store / name).write_bytes(content)
    (empty_store / ("folder-" + 32 * "0")).mkdir()
    (empty_store / "target").write_bytes(disk_cache._head(NAME, b"") + b"")
    (empty_store / ("link-" + 32 * "0")).symlink_to("target")
    before = files_in(empty_store)
    assert list(disk_cache.entries()) == [NAME]
    assert disk_cache.clear() == 1
    assert files_in(empty_store) == sorted(set(before) - {NAME})
    assert {name: (empty_store / name).read_bytes() for name in kept} == kept


def test_clear_removes_a_damaged_entry(empty_store):
    assert disk_cache.write(NAME, b"payload")
    with open(empty_store / NAME, "r+b") as file:
        file.truncate(disk_cache.HEAD + 3)
    assert disk_cache.read(NAME) is None
    assert disk_cache.clear() == 1
    assert files_in(empty_store) == []


@pytest.mark.parametrize("content", [b"", disk_cache.MAGIC[:9], disk_cache.MAGIC + b"half of it"])
def test_clear_removes_what_a_process_that_died_has_left(empty_store, content):
    old, new = (empty_store / f".numba_dequant-{digit * 16}.tmp" for digit in "01")
    ours_by_name_alone = empty_store / f".numba_dequant-{'2' * 16}.tmp"
    theirs = empty_store / ".numba_dequant-notes.tmp"
    for path in (old, new, theirs):
        path.write_bytes(content)
    ours_by_name_alone.write_bytes(b"something else")
    for path in (old, ours_by_name_alone, theirs):
        os.utime(path, (time.time() - 3601,) * 2)
    assert disk_cache.clear() == 0
    assert files_in(empty_store) == sorted([new.name, ours_by_name_alone.name, theirs.name])


def test_a_write_that_fails_leaves_no_file(empty_store, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", fail)
    assert disk_cache.write(NAME, b"payload") is False
    assert files_in(empty_store) == []


def test_the_least_recently_used_entries_go_when_there_are_too_many_bytes(empty_store, monkeypatch):
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 3000)
    names = ["label-" + 32 * digit for digit in "0123"]
    foreign = empty_store / ("model-" + 32 * "0")
    foreign.write_bytes(bytes(500))
    os.utime(foreign, (0, 0))
    for age, name in enumerate(names[:3]):
        assert disk_cache.write(name, bytes(600))
        os.utime(empty_store / name, (time.time() - 10 * disk_cache.USED_WITHIN + 1000 * age,) * 2)
    assert disk_cache.read(names[0]) is not None  # is used, so the next one goes
    assert disk_cache.write(names[3], bytes(600))
    assert sorted(disk_cache.entries()) == [names[0], names[2], names[3]]
    assert foreign.exists()


@with_modes
def test_folders_and_entries_are_for_this_user_alone(empty_store, monkeypatch):
    folder = empty_store / "new" / "cache"
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(folder))
    before = os.umask(0)
    try:
        assert disk_cache.write(NAME, b"payload")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, folder / NAME)] == [0o700] * 2 + [
        0o600
    ]


def refused(match):
    """The next use of the cache gives one warning, and the second one none."""
    disk_cache._warned.clear()
    with pytest.warns(RuntimeWarning, match=match) as caught:
        found = disk_cache.read(NAME), disk_cache.read(NAME), disk_cache.write(NAME, b"new")
    assert found == (None, None, False)
    assert len(caught) == 1
    assert str(disk_cache.directory()) in str(caught[0].message)
    return True


@with_modes
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(empty_store, mode):
    assert disk_cache.write(NAME, b"payload")
    empty_store.chmod(mode)
    assert refused(f"others may write to it \\(mode {mode:04o}\\)")
    assert "others may write" in disk_cache.problem()
    empty_store.chmod(0o700)
    assert disk_cache.read(NAME) == b"payload"
    assert disk_cache.problem() is None


@with_modes
@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_an_entry_that_others_may_write_to_is_not_used(empty_store, mode):
    assert disk_cache.write(NAME, b"payload")
    (empty_store / NAME).chmod(mode)
    assert refused("others may write to it")


@with_modes
def test_an_entry_of_another_user_is_not_used(empty_store, others):
    assert disk_cache.write(NAME, b"payload")
    others(empty_store / NAME)
    assert refused("another user")
    assert (empty_store / NAME).exists()


@with_modes
def test_a_folder_of_another_user_is_not_used(empty_store, others):
    """Root, too, does not run what a user has left in a home folder that sudo has kept."""
    assert disk_cache.write(NAME, b"payload")
    others(empty_store)
    assert refused("another user")
    assert "another user" in disk_cache.problem()


@with_modes
def test_root_makes_no_folder_in_the_home_of_a_user(empty_store, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(empty_store, 65534, 65534)
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(empty_store / "cache"))
    disk_cache._warned.clear()
    assert "another user" in disk_cache.problem()
    with pytest.warns(RuntimeWarning, match="another user"):
        assert disk_cache.write(NAME, b"payload") is False
    assert files_in(empty_store) == []


@with_modes
def test_a_link_to_an_entry_is_not_followed(empty_store):
    assert disk_cache.write(NAME, b"payload")
    (empty_store / NAME).rename(empty_store / "elsewhere")
    (empty_store / NAME).symlink_to("elsewhere")
    assert refused("is a link|not a plain file")


@with_modes
@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_what_is_in_place_of_an_entry_is_neither_waited_for_nor_replaced(empty_store, kind):
    (os.mkfifo if kind == "a pipe" else os.mkdir)(empty_store / NAME)
    assert refused("not a plain file")
    assert disk_cache.clear() == 0
    assert (empty_store / NAME).exists()


@with_modes
def test_the_folder_may_be_a_link_of_the_user_s_own(empty_store, monkeypatch, others):
    (empty_store / "real").mkdir(mode=0o700)
    link = empty_store / "link"
    link.symlink_to("real")
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(link))
    assert disk_cache.write(NAME, b"payload")
    assert disk_cache.read(NAME) == b"payload"
    (empty_store / "real").chmod(0o777)
    assert refused("others may write")
    (empty_store / "real").chmod(0o700)
    others(link)
    assert refused("is a link of another user|belongs to another user")


def test_one_entry_cannot_be_passed_off_as_another(empty_store):
    other = NAME.replace("0", "1")
    assert disk_cache.write(NAME, b"payload")
    (empty_store / NAME).rename(empty_store / other)
    assert disk_cache.read(other) is None


@with_modes
def test_computing_goes_on_where_the_folder_is_not_used(empty_store):
    first = compute()
    empty_store.chmod(0o777)
    (entry,) = disk_cache.entries()
    planted = empty_store / entry
    planted.write_bytes(disk_cache._head(entry, b"planted") + b"planted")
    cpu._compile.cache_clear()
    disk_cache._warned.clear()
    with pytest.warns(RuntimeWarning, match="others may write"):
        np.testing.assert_array_equal(compute(), first)
    assert planted.read_bytes().endswith(b"planted")


def test_problem_says_why_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path / "not" / "there"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert disk_cache.problem() is None
        assert not (tmp_path / "not").exists()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path / "file" / "below"))
        assert "Not a directory" in disk_cache.problem()
        assert str(tmp_path) in disk_cache.problem()
        monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(disk_cache.os, "access", lambda *_: False)
        assert "cannot be written" in disk_cache.problem()


@with_modes
def test_cache_and_warm_say_that_nothing_is_kept(empty_store, capsys):
    empty_store.chmod(0o777)
    assert main.main(["cache"]) == 0
    assert "The cache cannot be used" in capsys.readouterr().out
    assert main.main(["warm", "--cpu", "--formats", "Q8_0"]) == 2
    found = capsys.readouterr()
    assert "others may write to it" in found.err
    assert "compiled for" not in found.out


def test_warm_says_what_it_could_not_keep(empty_store, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", fail)
    assert main.main(["warm", "--cpu", "--formats", "Q8_0"]) == 2
    found = capsys.readouterr()
    assert "1 of 1 functions were compiled, but could not be written" in found.err
    assert "compiled for" not in found.out


@pytest.mark.parametrize("arguments", [["warm", "--cpu"], ["bench", "--device", "cpu"]], ids=["warm", "bench"])
def test_nothing_is_compiled_for_a_format_that_is_returned_as_it_is_stored(empty_store, arguments, capsys):
    assert main.main([*arguments, "--formats", "Q8_0,I8"]) == 2
    assert "I8 is stored as it is" in capsys.readouterr().err
