"""Results of the benchmarks, and tables of them."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version

WIDE = 0.1
"""The spread above which a page adds a warning."""


def _times(stats):
    """The median of the readings, their quartiles and their spread; None if there are too few readings."""
    is_known = stats["rounds"] > 2
    return {
        "seconds": stats["median"],
        "quartiles": (stats["q1"], stats["q3"]) if is_known and "q1" in stats else None,
        "spread": stats["iqr"] / stats["median"] if is_known else None,
    }


class Results:
    """The results of one run, or of several that merge.py has combined, by test and parameters."""

    def __init__(self, path):
        content = json.loads(path.read_text())
        self.machine = content["machine_info"]
        self.entries = []
        for entry in content["benchmarks"]:
            test = entry["name"].partition("[")[0]
            info = entry["extra_info"] | _times(entry["stats"]) | {"runs": self.machine.get("runs", 1)}
            self.entries.append((test, entry["params"] or {}, info))

    def of(self, test, **parameters):
        """The results of a test with these parameters, in order of measurement."""
        wanted = parameters.items()
        return [(params, info) for name, params, info in self.entries if name == test and params.items() >= wanted]

    @property
    def formats(self):
        """The formats whose kernels were measured."""
        return [parameters["name"] for parameters, _ in self.of("test_kernel", dtype="float16", mapping="tile")]

    def one(self, test, **parameters):
        """The result of a test with these parameters, or None."""
        return next((info for _, info in self.of(test, **parameters)), None)


def table(head, rows):
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def spread(info):
    return None if info["spread"] is None else f"{info['spread']:.1%}"


def spread_note(infos):
    """A sentence on the spread of the readings of a table, or of the medians of several runs."""
    infos = list(infos)
    n_runs = max((info["runs"] for info in infos), default=1)
    readings = f"medians of {n_runs} runs" if n_runs > 1 else "readings"
    spreads = [info["spread"] for info in infos if info["spread"] is not None]
    if not spreads:
        return "There are too few readings to show their spread."
    n_wide = sum(spread > WIDE for spread in spreads)
    where = f"at most {max(spreads):.1%}" if len(spreads) > 1 else spread({"spread": spreads[0]})
    note = (
        f"Spread: the distance between the quartiles of the {readings}, as a share of their median. It is {where} here."
    )
    if n_wide:
        over = f", and over {WIDE:.0%} for {n_wide} of {len(spreads)}" if len(spreads) > 1 else ""
        note = f"{note[:-1]}{over}: a difference smaller than the spread says nothing."
    return note


def factor(number):
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"


def machine_line(results, copy=None):
    """The machine, what its memory copies if that was measured, the versions and the command."""
    found = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    runs = f", the medians of {found['runs']} runs" if "runs" in found else ""
    return (
        f"{found['gpu']}, driver for {found['driver']}{(copy and f', {copy}') or ''}; {found['cpu']}; "
        f"Python {found['python']}, {versions}. `{found['command']}`{runs}"
    )


def described(command, device="cpu"):
    """The machine and the versions for the results of a script, and its command."""
    import torch

    versions = {}
    for package in ("numba_dequant", "numba-cuda", "cuda-core", "numpy", "gguf", "torch"):
        try:
            versions[package.replace("_", "-")] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return {"gpu": gpu, "python": platform.python_version(), "versions": versions, "command": command}


def described_line(found):
    """That, as a line of a page."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['gpu']}; Python {found['python']}, {versions}. `{found['command']}`"
