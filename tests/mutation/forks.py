"""Tests in processes that are forked for one mutant each, and that may hang, eat memory or die."""

import contextlib
import gc
import os
import resource
import select
import signal
import time
import types

import pytest
from selection import PYTEST

MEMORY = 4 << 30
START = 120
"""Seconds for what comes before the first test."""


def watched(work):
    """What `work(say)` says last in a process of its own. The process ends when it says nothing for too long.

    It says "wait SECONDS" before something that takes time, and its result at the end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            size = _memory() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work(lambda text: os.write(writer, f"{text}\n".encode()))
        except BaseException as error:
            os.write(writer, f"killed: {type(error).__name__} outside of tests\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return _last_word(reader)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


def _last_word(reader):
    said, end = b"", time.monotonic() + START
    while select.select([reader], [], [], max(0, end - time.monotonic()))[0]:
        got = os.read(reader, 1 << 16)
        if not got:
            return "killed: the process died"
        said += got
        *lines, said = said.split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word != "wait":
                return f"{word} {rest}".strip()
            end = time.monotonic() + float(rest)
    return "killed: time limit"


def _memory():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


class Reports:
    """A plugin of pytest. It says before each test how long it may take, and stops at the first failure.

    Attributes:
        seconds: test -> seconds that it has taken without a change.
        failed: if the run does not stop, the tests that fail.
    """

    def __init__(self, say, seconds, stops=True):
        self.say, self.seconds, self.stops, self.failed = say, seconds, stops, []

    def pytest_runtest_logstart(self, nodeid):
        self.say(f"wait {10 + 5 * self.seconds[nodeid]}")

    def pytest_runtest_logreport(self, report):
        if report.failed and self.stops:
            self.say(f"killed by {report.nodeid}")
            os._exit(0)
        if not report.passed:
            self.failed.append(report.nodeid)


class Chosen:
    """A plugin of pytest. It keeps the chosen tests, in their order."""

    def __init__(self, tests):
        self.tests = tests

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self.tests if test in by_name]


def silence():
    """Let nothing that this process prints be seen."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def with_fresh_import(tests, seconds, temporary, say, stops=True):
    """Import the package, which nothing has imported yet, and run tests."""
    silence()
    reports = Reports(say, seconds, stops)
    files = sorted({test.partition("::")[0] for test in tests})
    status = pytest.main([*PYTEST, "--basetemp", temporary, *files], plugins=[reports, Chosen(tests)])
    if stops and status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        say("killed: the import or the collection of tests fails")
    else:
        say("failed " + "\t".join(reports.failed) if reports.failed else "survived")


def with_collected(items, seconds, say, change=None, stops=True):
    """Run tests that have been collected, after `change()`; it returns whether it could make the change."""
    config = items[0].config
    reports = Reports(say, seconds, stops)
    config.pluginmanager.register(reports)
    if change is not None and not change():
        say("import")
        return
    for item, following in zip(items, [*items[1:], None], strict=True):
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    say("failed " + "\t".join(reports.failed) if reports.failed else "survived")


class Functions:
    """The functions of a module that is imported, and whose code can be exchanged."""

    def __init__(self, path, source):
        self.path, self.source = path, source
        self.live = [
            each for each in gc.get_objects() if type(each) is types.FunctionType and each.__code__.co_filename == path
        ]

    def exchange(self, changed):
        """Give the functions the code of a changed source. Returns whether that was possible for what has changed."""
        old, new = ({}, {})
        for codes, source in ((old, self.source), (new, changed)):
            for code in _codes(compile(source, self.path, "exec", dont_inherit=True)):
                codes.setdefault(_key(code), []).append(code)
        has_changed = False
        for function in self.live:
            key = _key(function.__code__)
            before, after = old.get(key, []), new.get(key, [])
            if before == after:
                continue
            if len(before) != 1 or len(after) != 1:
                return False
            try:
                function.__code__ = after[0]
            except ValueError:  # other variables of the functions around it
                return False
            has_changed = True
        return has_changed


def _codes(code):
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes(each)


def _key(code):
    return code.co_name, code.co_firstlineno
