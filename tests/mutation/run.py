"""Mutation tests: does a test fail if the code is a little wrong? README.md says what this does and how to use it."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import argued  # noqa: E402
import results as table  # noqa: E402
from mutants import mutants  # noqa: E402

# In them every survivor is killed or argued. The order is that of the table.
MODULES = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "numba_dequant/formats").glob("*.py")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "numba_dequant/gguf").glob("[!_]*.py")),
    "numba_dequant/backends/host.py",
    "numba_dequant/backends/reference.py",
    "numba_dequant/halves.py",
    "numba_dequant/loading/requests.py",
]
# The other files of tests/plain start processes, compile much, or test other things.
TESTS = [
    "api",
    "arguments",
    "bfloat16",
    "changed_files",
    "cursor",
    "data_and_out",
    "explanation",
    "factors",
    "format_copies",
    "formats",
    "gguf_errors",
    "gguf_file",
    "gguf_fuzz",
    "gguf_metadata",
    "gguf_rules",
    "gguf_source",
    "hostile_text",
    "info_and_diff",
    "known_weaknesses",
    "limits",
    "loader",
    "many",
    "matmul",
    "not_gguf",
    "odd_arguments",
    "paths",
    "positions",
    "primitives",
    "reading",
    "selection",
    "shards",
    "slices",
    "string_walk",
    "tensor_table",
    "usual_entries",
]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".*_cache")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="paths from the root of the repository; all if none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these mutants")
    parser.add_argument("--line", type=int, help="the mutants of this line")
    parser.add_argument("--seconds", type=float, default=4, help="how long the tests of a mutant take, at most")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="only the tests of these files")
    parser.add_argument("--recorded", metavar="FOLDER", help="keep here which tests execute which lines")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run nothing")
    parser.add_argument(
        "--state", metavar="FILE", help="keep how mutants end; run only those that do not end as killed"
    )
    parser.add_argument("--write", action="store_true", help="write the results to the table of README.md")
    return parser.parse_args()


def main():
    asked, known = arguments(), argued.entries()
    modules = [Path(each).as_posix() for each in asked.modules] or MODULES
    found = {module: mutants((ROOT / module).read_text("utf-8")) for module in modules}
    asked_for = {module: [each for each in of if _is_asked_for(asked, each)] for module, of in found.items()}
    if asked.list:
        for module, of in asked_for.items():
            for each in of:
                print(f"{module}:{each.line} {each.number} {each.function}: {each.text}")
        return 0
    state = Path(asked.state) if asked.state else None
    results = table.Results(json.loads(state.read_text("utf-8")) if state and state.exists() else {})
    to_run = {
        module: [each for each in of if not results.is_killed(module, each) and (module, *each.identity) not in known]
        for module, of in asked_for.items()
    }
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        for module, number, outcome, seconds in run(asked, to_run, Path(folder)):
            results.add(module, found[module][number], outcome, seconds)
    if state:
        state.write_text(results.json(), "utf-8")
    rows = [table.Row.of(module, of, results, known) for module, of in asked_for.items()]
    for row in rows:
        for mutant, outcome in row.survivors:
            print(f"{row.module}:{mutant.line} {mutant.number} {mutant.function}: {mutant.text} {outcome}".rstrip())
    print(table.text(rows), end="")
    if asked.write:
        if asked.only or asked.line or asked.tests:
            raise SystemExit("--write needs all mutants and all tests of a module")
        table.write(HERE / "README.md", rows)
    return int(any(row.survivors for row in rows))


def _is_asked_for(asked, mutant):
    return (asked.line is None or mutant.line == asked.line) and (not asked.only or mutant.number in asked.only)


def run(asked, chosen, folder):
    """Run the tests of the chosen mutants. Returns module, number, outcome and seconds of each."""
    if not any(chosen.values()):
        return []
    # Who ends this program early, as `timeout` does, keeps what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    copies = [folder / str(job) / "copy" for job in range(asked.jobs)]
    for copy in copies:
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED, symlinks=True)
    tests = asked.tests or [f"tests/plain/test_{name}.py" for name in TESTS]
    recorded = record(copies, tests, Path(asked.recorded) if asked.recorded else folder / "recorded")
    started, orders = [], []
    for job, copy in enumerate(copies):
        mine = {module: [each.number for each in found[job :: asked.jobs]] for module, found in chosen.items()}
        order = {"mutants": mine, "seconds": asked.seconds, "recorded": str(recorded), "folder": str(copy.parent)}
        order["results"] = str(copy.parent / "results")
        Path(order["results"]).touch()
        orders.append(order)
        (copy.parent / "order.json").write_text(json.dumps(order))
        started.append(_start(copy, "worker.py", str(copy.parent / "order.json")))
    try:
        wait(started)
    except KeyboardInterrupt:
        for process, _ in started:
            process.kill()
            process.wait()
        print("interrupted: the mutants that have not been run count as survivors", flush=True)
    results = {}
    for order in orders:
        for line in re.findall(r"(.*)\n", Path(order["results"]).read_text()):  # the last line may be incomplete
            module, number, outcome, seconds = json.loads(line)
            _, before = results.get((module, number), (None, 0))  # what needs a new import has two results
            results[module, number] = outcome, before + seconds
    return [(*key, *result) for key, result in sorted(results.items())]


def record(copies, tests, folder):
    """Run all tests once, to see which lines each executes. A folder that has that of the same files is kept."""
    mark = hashlib.sha256(json.dumps(tests).encode())
    for name in ("numba_dequant", "tests"):
        for path in sorted((copies[0] / name).rglob("*.py")):
            if path.parent.name != "mutation":
                mark.update(path.read_bytes())
    done = folder / "done"
    if done.exists() and done.read_text() == mark.hexdigest():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    start, started = time.monotonic(), []
    for job, copy in enumerate(copies):
        mine = folder / str(job)
        mine.mkdir(parents=True)
        if tests[job :: len(copies)]:
            started.append(_start(copy, "selection.py", str(mine), *tests[job :: len(copies)]))
    wait(started)
    done.write_text(mark.hexdigest())
    print(f"recorded {len(tests)} files of tests in {time.monotonic() - start:.0f} s", flush=True)
    return folder


def _start(copy, program, *arguments):
    """A program of this folder, that imports the package of a copy."""
    paths = os.pathsep.join(filter(None, (str(copy), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    log = (copy.parent / f"{program}.log").open("w+")
    command = [sys.executable, str(HERE / program), *arguments]
    return subprocess.Popen(command, cwd=copy, env=environment, stdout=log, stderr=log), log


def wait(started):
    """Wait for programs. Raises RuntimeError, with what they have printed, if one fails."""
    for process, log in started:
        with log:
            if process.wait():
                log.seek(0)
                raise RuntimeError(f"{process.args[1]} fails: {log.read()[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
