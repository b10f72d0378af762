import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import numba_dequant as nd
from numba_dequant import compiler, cpu, store


@pytest.fixture
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path))
    cpu._compile.cache_clear()
    yield tmp_path
    cpu._compile.cache_clear()


BLOCK = bytes(range(34))
N_PROCESSES = 20


def compute():
    return nd.dequantize(BLOCK, "Q8_0", device="cpu")


def compile_kernel():
    name, code = compiler.cubin(nd.FORMATS["Q8_0"], "float16", "tile", (9, 0))
    return name, code[:4]


def compute_on_gpu():
    return nd.dequantize(BLOCK, "Q8_0", device="cuda").copy_to_host()


def meet(barrier):
    barrier.wait(timeout=300)


def call(function):
    return function()


def test_what_is_written_is_read():
    assert store.write("entry", b"payload")
    assert store.read("entry") == b"payload"
    assert store.read("another") is None


def test_compiled_once_then_loaded(empty_store, monkeypatch):
    first = compute()
    (entry,) = empty_store.iterdir()
    before = entry.stat().st_mtime_ns
    cpu._compile.cache_clear()
    monkeypatch.setattr(store, "write", lambda *_: pytest.fail("compiled again"))
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
    assert store.read(entry.name) is not None


def test_a_sound_entry_that_is_no_code_is_rebuilt(empty_store):
    first = compute()
    (entry,) = empty_store.iterdir()
    store.write(entry.name, b"not a pickle")
    cpu._compile.cache_clear()
    np.testing.assert_array_equal(compute(), first)


def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(blocked / "below"))
    cpu._compile.cache_clear()
    assert compute().shape == (32,)
    assert store.write("entry", b"") is False


@pytest.mark.parametrize(
    ("function", "n_entries"),
    [(compute, 1), (compile_kernel, 1), pytest.param(compute_on_gpu, 2, marks=pytest.mark.gpu)],
)
def test_twenty_processes_at_once(empty_store, function, n_entries):
    """They meet at an empty cache. The first use of a GPU also keeps that a toolkit is there."""
    context = get_context("spawn")
    with ProcessPoolExecutor(N_PROCESSES, context, meet, (context.Barrier(N_PROCESSES),)) as pool:
        first, *others = pool.map(call, [function] * N_PROCESSES)
    assert len(others) == N_PROCESSES - 1
    for found in others:
        np.testing.assert_array_equal(found, first)
    assert len(list(empty_store.iterdir())) == len(store.entries()) == n_entries
    assert all(store.read(name) is not None for name in store.entries())


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
    name = store.entry_name("label", "1.0")
    assert name != store.entry_name("label", "1.1")
    monkeypatch.setattr(store, "package_digest", lambda: "another source")
    assert name != store.entry_name("label", "1.0")


def test_no_home_directory(monkeypatch, tmp_path):
    import pwd

    for name in ("NUMBA_DEQUANT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["nobody"])
    monkeypatch.chdir(tmp_path)
    cpu._compile.cache_clear()
    assert compute().shape == (32,)
    assert store.write("entry", b"") is False
    assert store.entries() == {}
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="set NUMBA_DEQUANT_CACHE_DIR"):
        store.directory()


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_directory_is_the_user_s(platform, monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_DEQUANT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(store.sys, "platform", platform)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in Path(store.directory()).parents
