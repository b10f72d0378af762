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
        """The tests that can notice a mutant, and whether its code runs when the package is imported."""
        lines = self._executed(module)
        found = set().union(*(lines.get(line, ()) for line in mutant.lines))
        at_import = mutant.name is not None or "" in found
        if mutant.name is not None:
            found = found.union(*lines.values(), self._mention(mutant.name))
        return found & self.seconds.keys(), at_import

    def cheapest(self, tests, seconds):
        """The tests that come first if all of them may take so long; at least one."""
        seen, order = Counter(), {}
        for test in sorted(tests, key=lambda each: (self.seconds[each], each)):
            function = test.partition("[")[0]
            order[test] = seen[function] // ALIKE, self.seconds[test], test
            seen[function] += 1
        chosen = []
        for test in sorted(tests, key=order.get):
            seconds -= self.seconds[test]
            if seconds < 0 and chosen:
                break
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

    def _mention(self, name):
        """The tests that execute a line of the package that has this name, and those of files that have it."""
        if name in self._mentions:
            return self._mentions[name]
        word, found = re.compile(rf"\b{name}\b"), set()
        measured = {os.path.relpath(path, root) for root, data in self._data for path in data.measured_files()}
        for module in sorted(measured):
            with open(module, encoding="utf-8") as file:
                for line, text in enumerate(file, 1):
                    if word.search(text):
                        found |= self._executed(module).get(line, set())
        for path in sorted({test.partition("::")[0] for test in self.seconds}):
            with open(path, encoding="utf-8") as file:
                if word.search(file.read()):
                    found.update(test for test in self.seconds if test.startswith(f"{path}::"))
        self._mentions[name] = found
        return found


if __name__ == "__main__":
    # In a copy of the repository: run all tests once, without a change.
    where, *tests = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    pytest.main([*PYTEST, "-m", MARKS, *tests], plugins=[Recorder(where, os.getcwd())])
