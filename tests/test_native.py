"""Code for this machine's processor, compiled once."""

import re

from numba_dequant import native, native_code


def test_it_needs_nothing_but_what_it_is_given():
    text = native_code.compile_functions()
    assert re.findall(r"^declare .*@(?!llvm\.)", text, re.MULTILINE) == []
    assert sorted(re.findall(r"^define (?!internal).*@(\w+)", text, re.MULTILINE)) == ["pump", "walk_strings"]


def test_it_is_compiled_once(monkeypatch):
    native.keep()
    monkeypatch.setattr(native_code, "compile_functions", None)
    native.keep()
