"""Which tests execute which lines of the package, and how long each of them takes."""

import json
import os
import re
import sys
import time
from collections import Counter, defaultdict

import coverage
import pytest

PACKAGE = "numba_dequant"
MARKS = "not long and not toolkit and not gpu"
PYTEST = ["-q", "-p", "no:cacheprovider", "-p", "no:cov", "-o", "faulthandler_timeout=0", "--tb=line"]
# Tests of one function with many parameters are much alike. The first ones come before those of other functions end.
ALIKE = 3


class Recorder:
    """A plugin of pytest. It records the lines that each test executes, its outcome and its seconds."""

    def __init__(self, folder, root):
        self.folder, self.root = folder, root
        self.seconds, self.not_passed = {}, set()
        package = os.path.join(root, PACKAGE, "*")
        self.coverage = coverage.Coverage(os.path.join(folder, "lines.db"), config_file=False, include=[package])
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        start = time.perf_counter()
        yield
        self.seconds[item.nodeid] = round(time.perf_counter() - start, 4)
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report):
        if not report.passed:  # what is skipped kills nothing
            self.not_passed.add(report.nodeid)

    def pytest_sessionfinish(self):
        self.coverage.stop()
        self.coverage.save()
        passed = {name: seconds for name, seconds in self.seconds.items() if name not in self.not_passed}
        with open(os.path.join(self.folder, "tests.json"), "w", encoding="utf-8") as file:
            json.dump({"root": self.root, "seconds": passed}, file)


class Selection:
    """What has been recorded in a folder, read in a copy of the repository."""

    def __init__(self, folder):
        self.seconds, self._data, self._lines, self._mentions = {}, [], {}, {}
        for each in sorted(os.listdir(folder)):
            path = os.path.join(folder, each, "tests.json")
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    recorded = json.load(file)
                self.seconds |= recorded["seconds"]
                data = coverage.CoverageData(os.path.join(folder, each, "lines.db"))
                data.read()
                self._data.append((recorded["root"], data))

    def tests(self, module, mutant):
        """The tests that can notice a mutant, and whether its code runs when the package is imported.

        Each test has a number: how many tests execute the same line, of all lines for which the test was found, or of
        the same function. The fewer, the more the test has to do with the mutant.
        """
        lines = self._executed(module)
        places = [lines.get(line, set()) for line in mutant.lines]
        at_import = mutant.name is not None or any("" in names for names in places)
        found = set().union(*places)
        places += [lines.get(line, set()) for line in mutant.around]
        if mutant.name:
            places += self._mentions_of(mutant.name)
            found = found.union(*places)
        numbers = {}
        if at_import:
            found = found.union(*lines.values())
            numbers = dict.fromkeys(found, len(self.seconds))
        for names in sorted(places, key=len, reverse=True):
            numbers |= dict.fromkeys(names & found, len(names))
        return {test: number for test, number in numbers.items() if test in self.seconds}, at_import

    def cheapest(self, tests, seconds):
        """The tests that run if they may take so long together: half of the time for those of rare lines."""
        seen, alike = Counter(), {}
        for test in sorted(tests, key=lambda each: (self.seconds[each], each)):
            function = test.partition("[")[0]
            alike[test] = seen[function] // ALIKE
            seen[function] += 1
        chosen = self._first(tests, seconds / 2, lambda each: (tests[each], self.seconds[each], each))
        seconds -= sum(self.seconds[each] for each in chosen)
        rest = tests.keys() - set(chosen)
        return chosen + self._first(rest, seconds, lambda each: (alike[each], self.seconds[each], each))

    def _first(self, tests, seconds, order):
        chosen = []
        for test in sorted(tests, key=order):
            if self.seconds[test] <= seconds:
                seconds -= self.seconds[test]
                chosen.append(test)
        return chosen

    def _executed(self, module):
        """Line -> the tests that execute it. The name of the import is empty."""
        if module not in self._lines:
            found = self._lines[module] = defaultdict(set)
            for root, data in self._data:
                path = os.path.join(root, module)
                if path in data.measured_files():
                    for line, names in data.contexts_by_lineno(path).items():
                        found[line].update(names)
        return self._lines[module]

    def _mentions_of(self, name):
        """For each line of the package with this name, the tests that execute it; and the tests of files with it."""
        if name in self._mentions:
            return self._mentions[name]
        word, found = re.compile(rf"\b(?:{name})\b"), []
        measured = {os.path.relpath(path, root) for root, data in self._data for path in data.measured_files()}
        for module in sorted(measured):
            with open(module, encoding="utf-8") as file:
                found += [self._executed(module).get(at, set()) for at, line in enumerate(file, 1) if word.search(line)]
        for path in sorted({test.partition("::")[0] for test in self.seconds}):
            with open(path, encoding="utf-8") as file:
                if word.search(file.read()):
                    found.append({test for test in self.seconds if test.startswith(f"{path}::")})
        self._mentions[name] = found
        return found


if __name__ == "__main__":
    # In a copy of the repository: run all tests once, without a change.
    where, *tests = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    pytest.main([*PYTEST, "-m", MARKS, *tests], plugins=[Recorder(where, os.getcwd())])
