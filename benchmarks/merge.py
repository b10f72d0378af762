"""Combine several runs of the benchmarks on one kind of machine.

python benchmarks/merge.py RUN1.json RUN2.json RUN3.json benchmarks/results/h100.json
python benchmarks/merge.py RUN1.json RUN2.json RUN3.json benchmarks/results/h100-many.json --tests test_gpu test_host

With `--tests`, other tests are left out. A reading of the result is the median of a run. So the quartiles of the result
tell how much runs differ, and report.py says so. A benchmark that is not in all runs is left out.
"""

import argparse
import json
import statistics
from pathlib import Path


def merged(runs, tests=None):
    """The combined content of the files of several runs, in the order of the first: of some tests, or of all."""
    first, *others = runs
    for other in others:
        for key in ("gpu", "driver", "versions", "command"):
            if other["machine_info"][key] != first["machine_info"][key]:
                raise SystemExit(f"the runs differ in {key}; run the same command on the same kind of machine")
    by_name = [{entry["name"]: entry for entry in run["benchmarks"]} for run in runs]
    names = [name for name in by_name[0] if all(name in run for run in by_name)]
    names = [name for name in names if tests is None or name.partition("[")[0] in tests]
    entries = [of_benchmark([run[name] for run in by_name]) for name in names]
    return {"machine_info": first["machine_info"] | {"runs": len(runs)}, "benchmarks": entries}


def of_benchmark(entries):
    """One benchmark in several runs as one."""
    medians = [entry["stats"]["median"] for entry in entries]
    low, _, high = statistics.quantiles(medians, n=4, method="inclusive")
    stats = {"median": statistics.median(medians), "q1": low, "q3": high, "iqr": high - low}
    stats |= {"min": min(medians), "max": max(medians), "rounds": len(medians)}
    stats["iterations"] = entries[0]["stats"]["iterations"]
    extra = {name: middle([entry["extra_info"].get(name) for entry in entries]) for name in entries[0]["extra_info"]}
    return entries[0] | {"stats": stats, "extra_info": extra}


def middle(values):
    """The median of numbers; for anything else, the value of the first run."""
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return statistics.median_low(values) if are_numbers else values[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the files of two runs or more")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--tests", nargs="+", metavar="NAME", help="tests to keep; all if omitted")
    asked = parser.parse_args()
    if len(asked.runs) < 2:
        parser.error("pass the files of two runs or more, and the file to write")
    found = merged([json.loads(path.read_text()) for path in asked.runs], asked.tests)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
