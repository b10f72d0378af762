"""Code for this machine's processor, compiled once."""

import re
import threading
import time

from numba_dequant import native
from numba_dequant.native import compiling


def test_it_needs_nothing_but_what_it_is_given():
    text = compiling.compile_functions()
    assert re.findall(r"^declare .*@(?!llvm\.)", text, re.MULTILINE) == []
    assert sorted(re.findall(r"^define (?!internal).*@(\w+)", text, re.MULTILINE)) == [
        "join_threads",
        "pump",
    ]


def test_it_is_compiled_once(monkeypatch):
    native.keep()
    monkeypatch.setattr(compiling, "compile_functions", None)
    native.keep()


def test_two_threads_load_it_once(monkeypatch):
    real, calls = native._engine, []

    def engine():
        calls.append(None)
        time.sleep(0.1)
        return real()

    monkeypatch.setattr(native, "_engines", [])
    monkeypatch.setattr(native, "_engine", engine)
    addresses = []
    threads = [threading.Thread(target=lambda: addresses.append(native.load("pump").value)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(addresses)) == 1
