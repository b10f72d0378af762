"""Code for this machine's processor, compiled once."""

import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import llvmlite.binding as llvm
import numpy as np
import pytest
from blocks import DECODED, DTYPES, assert_all_values, random_blocks

import numba_dequant as nd
from numba_dequant import disk_cache
from numba_dequant.backends import cpu
from numba_dequant.kernels import native
from numba_dequant.kernels.native import compiling


@pytest.fixture
def not_loaded(tmp_path, monkeypatch):
    """Nothing is loaded yet, nor on disk."""
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path / "kept"))
    cached = native._own_functions, cpu._compile
    before = [dict(each._made) for each in cached]
    for each in cached:
        each.cache_clear()
    yield tmp_path / "kept"
    for each, made in zip(cached, before, strict=True):
        each._made = made


def compiled_functions():
    return {function.__name__: compiling.compile_function(function) for function in compiling.FUNCTIONS}


def first_use(name="Q8_0"):
    return nd.dequantize(random_blocks(name, 9), name, device="cpu")


def test_it_needs_nothing_but_what_it_is_given():
    text = str(compiling.linked(compiled_functions()))
    assert re.findall(r"^declare .*@(?!llvm\.)", text, re.MULTILINE) == []
    assert sorted(re.findall(r"^define (?!internal).*@(\w+)", text, re.MULTILINE)) == [
        "join_threads",
        "read_and_send",
        "walk_strings",
    ]


def test_it_is_compiled_once(not_loaded, monkeypatch):
    native.ensure_compiled()
    native._own_functions.cache_clear()
    monkeypatch.setattr(compiling, "compile_function", None)
    native.ensure_compiled()


def test_two_threads_load_it_once(not_loaded, monkeypatch):
    real, calls = native.load_functions, []

    def load_functions(*arguments, **options):
        calls.append(None)
        time.sleep(0.1)
        return real(*arguments, **options)

    monkeypatch.setattr(native, "load_functions", load_functions)
    addresses = []
    threads = [threading.Thread(target=lambda: addresses.append(native.load("read_and_send").value)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(addresses)) == 1


def test_numba_is_not_imported_where_the_code_is_on_disk(not_loaded):
    code = """
import sys, numba_dequant as nd
nd.dequantize(bytes(34), "Q8_0", device="cpu")
print("numba" in sys.modules)
"""
    found = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert [each.stdout.strip() for each in found] == ["True", "False"]
    assert [each.stderr for each in found] == ["", ""]


@pytest.mark.parametrize("content", [b"", b"not code", b"\x7fELF" + bytes(99)], ids=["empty", "text", "elf"])
def test_a_sound_entry_that_is_no_code_is_compiled_anew(not_loaded, content):
    expected = first_use()
    (name,) = disk_cache.entries()
    sound = disk_cache.read(name)
    for payload in (content, sound[:-40], sound[: native.SUM_SIZE + 100]):
        disk_cache.write(name, payload)
        cpu._compile.cache_clear()
        np.testing.assert_array_equal(first_use(), expected)
        assert len(disk_cache.read(name)) == len(sound)


@pytest.mark.parametrize("broken", ["no text", "other names", "needs more"])
def test_a_numba_whose_code_cannot_be_kept_costs_the_cache_and_nothing_else(not_loaded, monkeypatch, broken):
    real = compiling.compile_function

    def compile_function(function):
        found = real(function)
        text = found.inspect_llvm()
        if broken == "no text":
            return SimpleNamespace(address=found.address, __wrapped__=function, keep=found)
        if broken == "other names":
            text = text.replace("_ZN", "_XN")
        else:
            text = re.sub(r"^define .*@_ZN", lambda define: define[0], text, flags=re.MULTILINE)
            body = re.search(r"^define [^@]*i32 @_ZN[^{]*\{\n(?:\S+:.*\n)?", text, re.MULTILINE)
            text = text[: body.end()] + "  call void @missing()\n" + text[body.end() :] + "\ndeclare void @missing()\n"
        return SimpleNamespace(address=found.address, __wrapped__=function, inspect_llvm=lambda: text, keep=found)

    monkeypatch.setattr(compiling, "compile_function", compile_function)
    with pytest.warns(RuntimeWarning, match="compiles in each process") as caught:
        found = first_use("Q4_K")
    assert len(caught) == 1
    np.testing.assert_array_equal(found, nd.dequantize(random_blocks("Q4_K", 9), "Q4_K", device="reference"))
    assert disk_cache.entries() == {}


def test_a_format_of_the_user_s_own_is_not_kept(not_loaded):
    known = nd.FORMATS["Q8_0"]
    copy = nd.Format("../Q8_0", 999, known.block_size, known.layout, "", known.dequantize, known.decode)
    np.testing.assert_array_equal(nd.dequantize(random_blocks("Q8_0", 9), copy, device="cpu"), first_use())
    assert [name.rpartition("-")[0] for name in disk_cache.entries()] == ["cpu-Q8_0-float16"]


@pytest.mark.parametrize("block_size", [8, 24, 40, 56, 264])
def test_any_number_of_runs(block_size):
    """The last runs of a block were not written if their number was not a multiple of four."""
    assert_all_values(block_size, "cpu")


def test_the_processor_and_the_versions_are_in_the_name(not_loaded, monkeypatch):
    first_use()
    monkeypatch.setattr(native, "processor", lambda: ("", ""))
    cpu._compile.cache_clear()
    first_use()
    assert len(disk_cache.entries()) == 2
    monkeypatch.setattr(disk_cache, "versions", lambda *_: "another")
    cpu._compile.cache_clear()
    first_use()
    assert len(disk_cache.entries()) == 3


def test_numba_s_variables_choose_the_processor(monkeypatch):
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    assert native.processor() == ("generic", "+sse2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODED)
def test_nothing_is_written_beyond_the_output(name, dtype):
    """The compiled code gets addresses, no arrays."""
    source = nd.FORMATS[name]
    data = random_blocks(name, 33)
    n = source.n_elements(data.size)
    expected = nd.dequantize(data, name, dtype, device="reference")
    memory = np.full(n + 64, 77, expected.dtype)
    nd.dequantize(data, name, dtype, device="cpu", out=memory[32:-32])
    np.testing.assert_array_equal(memory[:32], np.full(32, 77, expected.dtype))
    np.testing.assert_array_equal(memory[-32:], np.full(32, 77, expected.dtype))


def test_other_threads_run_while_it_computes():
    source = nd.FORMATS["IQ3_S"]
    data = random_blocks("IQ3_S", 40_000)
    out = np.empty(source.n_elements(data.size), np.float32)
    span = cpu.compiled(source, "float32")
    n = data.size // source.type_size
    ticks = []

    def compute():
        for _ in range(1000):
            span(data.ctypes.data, 0, n, out.ctypes.data)
            if len(ticks) > 10:
                break

    worker = threading.Thread(target=compute)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # seconds: nobody gives up the interpreter lock unless a call releases it
    try:
        worker.start()
        while worker.is_alive():
            ticks.append(None)
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert len(ticks) > 10


def test_pickle_is_not_used():
    from pathlib import Path

    sources = Path(nd.__file__).parent.rglob("*.py")
    used = re.compile(
        r"^\s*(import|from) .*\b(pickle|marshal|shelve|dill|cloudpickle|serialize)\b|\bpickle\.", re.MULTILINE
    )
    assert [path.name for path in sources if used.search(path.read_text(encoding="utf-8"))] == []


def test_a_thread_and_atexit_compute_after_the_main_thread_has_ended():
    code = """
import atexit, threading
import numpy as np, numba_dequant as nd
from numba_dequant.backends import cpu
cpu.available_cores = lambda: 2
data = np.zeros(34 * 65536, np.uint8)
nd.dequantize(data, "Q8_0", device="cpu")
main = threading.current_thread()
def work():
    main.join()
    print("thread", nd.dequantize(data, "Q8_0", device="cpu").size)
threading.Thread(target=work).start()
atexit.register(lambda: print("atexit", nd.dequantize(data, "Q8_0", device="cpu").size))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.stdout.split(), found.stderr) == (["thread", "2097152", "atexit", "2097152"], "")


def test_a_sound_entry_without_the_function_is_compiled_anew(not_loaded):
    compiled = compiled_functions()
    code = compiling.object_code({"walk_strings": compiled["walk_strings"]})
    with pytest.raises(LookupError, match="the code has no function read_and_send"):
        native._addresses(["walk_strings", "read_and_send"], code)
    entry = disk_cache.cache_key("of_a_test", disk_cache.versions("numba", "llvmlite"), *native.processor())
    disk_cache.write(entry, native._sum(code) + code)
    assert native.load_functions("of_a_test", ["walk_strings"], list)["walk_strings"]
    addresses = native.load_functions("of_a_test", ["join_threads", "read_and_send"], lambda: compiling.FUNCTIONS)
    assert all(addresses.values())


def test_a_processor_whose_features_are_unknown(monkeypatch):
    """Its name alone is then in the name of an entry, and compiled code uses what every such processor has."""
    for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(variable, raising=False)

    def unknown():
        raise RuntimeError("no features on this system")

    monkeypatch.setattr(llvm, "get_host_cpu_features", unknown)
    name, features = native.processor()
    assert name == llvm.get_host_cpu_name()
    assert features == ""
