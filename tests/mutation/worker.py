"""Runs the tests of some mutants in a copy of the repository, and writes how each mutant ends.

Most mutants change functions only. Their tests are collected once, and each mutant gets a fork whose functions have
other code. Other mutants need a new import: a fork of a process that has not imported the package.
"""

import contextlib
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections import Counter

import pytest
from forks import Chosen, Functions, watched, with_collected, with_fresh_import
from mutants import mutants
from selection import PYTEST, Selection

FIRST_FILES = 3


class Work:
    """The mutants of one worker, the tests of each, and where results go."""

    def __init__(self, order):
        self.results, self.root = order["results"], os.getcwd()
        self.temporary = os.path.join(order["folder"], "temporary")
        self.selection = Selection(order["recorded"])
        self.seconds = self.selection.seconds
        self.sources, self.all, self.tests, self.fresh = {}, {}, {}, set()
        self.kills, self.sound = Counter(), set()
        for module, numbers in order["mutants"].items():
            with open(module, encoding="utf-8") as file:
                self.sources[module] = file.read()
            found = mutants(self.sources[module])
            for number in numbers:
                tests, at_import = self.selection.tests(module, found[number])
                key = module, number
                self.all[key] = found[number]
                self.tests[key] = self.selection.cheapest(tests, order["seconds"]) if tests else []
                if at_import:
                    self.fresh.add(key)

    def in_order(self, key):
        """The tests of a mutant: first those that have killed others, then the cheapest."""

        def rank(test):
            seconds = self.seconds[test]
            return -self.kills[test] / (seconds + 0.05), seconds, test

        return sorted(self.tests[key], key=rank)

    def needed(self, keys):
        return sorted({test for key in keys for test in self.tests[key]})

    def without(self, outcome):
        """Never use tests again that fail without a change."""
        failing = set(outcome.removeprefix("failed ").split("\t")) if outcome.startswith("failed ") else set()
        self.seconds = {test: seconds for test, seconds in self.seconds.items() if test not in failing}
        for key, tests in self.tests.items():
            self.tests[key] = [test for test in tests if test not in failing]
        if outcome != "survived" and not failing:
            raise RuntimeError(f"the tests without a change: {outcome}")

    def outcome(self, key, run):
        """How a mutant ends: what `run(tests, has_change)` says.

        Some tests fail where they come first in a process, with a change and without. They kill nothing.
        """
        while self.tests[key]:
            outcome = run(self.in_order(key), True)
            killer = outcome.removeprefix("killed by ")
            if killer == outcome or killer in self.sound:
                return outcome
            if run([killer], False) == "survived":
                self.sound.add(killer)
                return outcome
            self.without(f"failed {killer}")
        return "survived: no test executes it"

    def write(self, key, outcome, start):
        module, number = key
        if outcome.startswith("killed by "):
            self.kills[outcome.removeprefix("killed by ").strip()] += 1
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps([module, number, outcome, round(time.monotonic() - start, 3)]) + "\n")

    def clean(self):
        with contextlib.suppress(FileNotFoundError):
            for each in os.scandir(self.temporary):
                if each.is_dir(follow_symlinks=False):
                    shutil.rmtree(each, ignore_errors=True)


class Server:
    """A plugin of pytest. In place of running all tests, it runs those of each mutant in a fork."""

    def __init__(self, work, keys):
        self.work, self.keys = work, keys

    def pytest_runtestloop(self, session):
        work = self.work
        items = {item.nodeid: item for item in session.items}
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        session.config.pluginmanager.unregister(reporter)
        session.config._tmp_path_factory.getbasetemp()
        functions = {
            module: Functions(os.path.join(work.root, module), source) for module, source in work.sources.items()
        }
        gc.collect()
        gc.freeze()
        needed = [items[test] for test in work.needed(self.keys) if test in items]
        work.without(watched(lambda say: with_collected(needed, work.seconds, say, stops=False)))
        for key in self.keys:
            start = time.monotonic()
            changed = work.all[key].apply(work.sources[key[0]])

            def run(tests, has_change, key=key, changed=changed):
                chosen = [items[test] for test in tests if test in items]
                change = (lambda: functions[key[0]].exchange(changed)) if has_change else None
                return watched(lambda say: with_collected(chosen, work.seconds, say, change, stops=has_change))

            outcome = work.outcome(key, run)
            if outcome == "survived" and key in work.fresh:
                outcome = "import"
            work.write(key, outcome, start)
            work.clean()
        return True


def with_exchanged_functions(work, keys):
    """All mutants that change functions, in one process that has collected their tests."""
    needed = work.needed(keys)
    files = sorted({test.partition("::")[0] for test in needed})
    if not files:
        for key in keys:
            work.write(key, "survived: no test executes it", time.monotonic())
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            arguments = [*PYTEST, "--basetemp", work.temporary, *files]
            status = pytest.main(arguments, plugins=[Chosen(needed), Server(work, keys)])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(int(status))
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"pytest ends with status {os.waitstatus_to_exitcode(status)}")


def with_fresh_imports(work, keys):
    """All mutants that need a new import, each in the file of its module."""
    needed = work.needed(keys)
    if needed:
        work.without(watched(lambda say: with_fresh_import(needed, work.seconds, work.temporary, say, stops=False)))
    for key in keys:
        start = time.monotonic()
        module, _ = key

        def run(tests, has_change, key=key, module=module):
            source = work.sources[module]
            with open(module, "w", encoding="utf-8", newline="") as file:
                file.write(work.all[key].apply(source) if has_change else source)
            outcome = "survived"
            for each in _rounds(work, tests):
                outcome = watched(
                    lambda say, t=each: with_fresh_import(t, work.seconds, work.temporary, say, stops=has_change)
                )
                if outcome != "survived":
                    break
            return outcome

        try:
            outcome = work.outcome(key, run)
        finally:
            with open(module, "w", encoding="utf-8", newline="") as file:
                file.write(work.sources[module])
        work.write(key, outcome, start)
        work.clean()


def _rounds(work, tests):
    """Tests in two parts: first those of a few files, because the import of a file of tests takes time."""
    value = Counter()
    for test in tests:
        value[test.partition("::")[0]] += 1 + 100 * work.kills[test]
    first = sorted(value, key=lambda file: (-value[file], file))[:FIRST_FILES]
    early = [test for test in tests if test.partition("::")[0] in first]
    late = [test for test in tests if test.partition("::")[0] not in first]
    return [each for each in (early, late) if each]


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        work = Work(json.load(file))
    sys.path.insert(0, work.root)
    for module in ("numpy", "numba", "ml_dtypes", "gguf", "tqdm"):
        with contextlib.suppress(ImportError):
            __import__(module)  # each fork has them then
    functions = [key for key in work.all if work.all[key].name is None]
    if functions:
        with_exchanged_functions(work, functions)
    with open(work.results, "a+", encoding="utf-8") as file:
        file.seek(0)
        results = [json.loads(line) for line in file]
    again = {(module, number) for module, number, outcome, _ in results if outcome == "import"}
    rest = [key for key in work.all if work.all[key].name is not None or key in again]
    if rest:
        with_fresh_imports(work, rest)


if __name__ == "__main__":
    main()
