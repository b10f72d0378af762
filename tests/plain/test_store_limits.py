"""The cache of compiled code where the disk is full, where there are thousands of entries, and where it is attacked."""

import ast
import os
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import numba_dequant as nd
from numba_dequant import disk_cache

NAME = "label-" + 32 * "0"
with_handles = pytest.mark.skipif(os.open not in os.supports_dir_fd, reason="folders cannot be held open here")


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of the size of a file here")
def test_a_full_disk_leaves_nothing_behind(empty_store):
    """The system refuses to write more than 100 bytes: after some of them, as where a disk is full."""
    code = f"""
import os, resource, signal
import numba_dequant as nd
from numba_dequant import disk_cache
assert disk_cache.write({NAME!r}, b"sound")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
least, most = 100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
assert disk_cache.write("label-" + 32 * "1", bytes(100_000)) is False
assert disk_cache.write({NAME!r}, bytes(100_000)) is False
assert disk_cache.read({NAME!r}) == b"sound"
assert disk_cache.not_kept == ["label-" + 32 * "1", {NAME!r}]
print(nd.dequantize(bytes(34), "Q8_0", device="cpu").sum(), os.listdir(disk_cache.directory()))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # a measurement of coverage is written at the end
"""
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == (f"0.0 {[NAME]}\n", "")


def filled(folder, n_entries, n_bytes):
    """The names of new entries, the oldest first."""
    names = ["label-" + secrets.token_hex(16) for _ in range(n_entries)]
    now = time.time()
    for age, name in enumerate(names):
        payload = bytes(n_bytes)
        (folder / name).write_bytes(disk_cache._head(name, payload) + payload)
        (folder / name).chmod(0o600)
        os.utime(folder / name, (now - 10 * n_entries + age,) * 2)
    return names


def test_of_thousands_of_entries_the_oldest_go_until_the_rest_is_small_enough(empty_store, monkeypatch):
    names = filled(empty_store, 3000, 1000)
    size = 1000 + disk_cache.HEAD
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 200 * size + 100)
    start = time.process_time()
    assert disk_cache.write(NAME, b"new")
    assert time.process_time() - start < 2
    assert sorted(disk_cache.entries()) == sorted([NAME, *names[-200:]])
    assert sum(disk_cache.entries().values()) <= disk_cache.MAX_BYTES


def test_with_thousands_of_entries_a_use_looks_at_one(empty_store, monkeypatch):
    names = filled(empty_store, 3000, 10)
    monkeypatch.setattr(disk_cache.os, "scandir", lambda _: pytest.fail("all entries were looked at"))
    assert disk_cache.read(names[5]) == bytes(10)


def test_an_entry_larger_than_the_whole_cache_is_kept_alone(empty_store, monkeypatch):
    filled(empty_store, 10, 100)
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 1000)
    assert disk_cache.write(NAME, bytes(900))
    assert list(disk_cache.entries()) == [NAME]


@with_handles
def test_the_folder_that_was_checked_is_the_one_that_is_read(empty_store, monkeypatch):
    """Somebody exchanges it after the check."""
    assert disk_cache.write(NAME, b"own")
    real = disk_cache._Folder.check

    def check(folder):
        real(folder)
        empty_store.rename(f"{empty_store}-moved")
        empty_store.mkdir(mode=0o777)
        payload = b"foreign"
        (empty_store / NAME).write_bytes(disk_cache._head(NAME, payload) + payload)

    monkeypatch.setattr(disk_cache._Folder, "check", check)
    assert disk_cache.read(NAME) == b"own"


def test_the_name_of_a_format_leads_to_no_other_folder(empty_store, monkeypatch):
    monkeypatch.setenv(disk_cache.VARIABLE, str(empty_store / "cache"))
    known = nd.FORMATS["Q8_0"]
    code = known.layout, "steers", known.dequantize, known.decode
    for name in ("../../outside", "/outside", 'a"b %s {x}', "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        fmt = nd.Format(name, 5000, 32, *code)
        assert not nd.dequantize(bytes(34), fmt, device="cpu").any()
    disk_cache.write(NAME, b"payload")
    assert all(disk_cache.ENTRY_NAME.fullmatch(path.name) for path in (empty_store / "cache").iterdir())
    assert [path.name for path in empty_store.iterdir()] == ["cache"]


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[2J", "\N{RIGHT-TO-LEFT OVERRIDE}"])
def test_the_name_of_a_format_is_printable(name):
    """LLVM ended the process because of a NUL in the name of a function."""
    with pytest.raises(nd.OptionError, match="the name of a format must be printable characters"):
        replace(nd.FORMATS["Q8_0"], name=name)


def test_no_module_can_load_pickled_objects():
    """They run code when they are loaded. `copyreg`, which makes objects picklable, runs nothing."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in Path(nd.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {each.name.partition(".")[0] for each in node.names} | {getattr(node, "module", None)}
                assert names.isdisjoint(forbidden), path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
