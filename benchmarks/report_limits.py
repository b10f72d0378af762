"""Write docs/products-limits.md: what limits each product that is slower than its aim.

python benchmarks/profile_products.py       # the counters; test_products.py has measured the times
python benchmarks/report_limits.py [benchmarks/results]
"""

import json
import sys
from pathlib import Path

from tables import Results, described_line, table

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "products-limits.md"

SMALL = (4096, 4096)
MANY_SLOTS = 0.9
"""From this share of the issue slots of the floor's time, instructions leave no room."""

BUSY_SLOTS, BUSY_PIPE, IDLE_START = 0.6, 0.65, 0.85
"""Shares from which issue slots and a pipe count as a limit, and below which the multiprocessors' idle time does."""

ISSUES = "another warp's turn"
"""The only wait that is no wait: the warp could have issued."""

INTRODUCTION = """\
# What limits products with compressed weights

The aim is a share of the floor, the time to read the bytes of the weight: 90 % with one column (85 % for 4096x4096),
and 80 % with eight. [products.md](products.md) has all times. This page lists the products that are slower than their
aim, with counters of the profiler and what they say. `benchmarks/report_limits.py` writes the page.

The profiler runs each kernel alone, with empty caches. Kernels of a series overlap, so they begin earlier.

- **Slots needed**: the issue slots that the instructions of the kernel take, as a share of all slots that the
  multiprocessors have in the time of the floor. Above 100 %, the instructions alone take longer than the floor. Near
  100 % is out of reach too, because warps also wait.
- **Slots used**: the share of issue slots that are used while a multiprocessor has work.
- **Busiest pipe**: the pipe for instructions that is used most, and how much.
- **Memory**: the used share of the memory's rate.
- **At work**: the share of the kernel's time in which a multiprocessor has work, on average.
- **Most waits**: what warps wait for most, and the share of their time.
"""


def percent(share):
    return f"{share:.0%}"


def aim(row):
    """The share of the floor that a product should reach."""
    if row["n_columns"] > 1:
        return 0.8
    return 0.85 if (row["n_rows"], row["n_elements"]) == SMALL else 0.9


def slots_needed(row, floor):
    """Issue slots of the kernel, as a share of those in the time of the floor."""
    return row["issue"] * row["busy"] * row["ns"] * 1e-9 / floor


def wait(row):
    """What warps wait for most, and the share of their time."""
    return max(((name, share) for name, share in row["stalls"].items() if name != ISSUES), key=lambda each: each[1])


def limits(row, floor):
    """What the counters say, in a few words."""
    pipe, share = max(row["pipes"].items(), key=lambda each: each[1])
    found = []
    if slots_needed(row, floor) >= MANY_SLOTS or row["issue"] >= BUSY_SLOTS:
        found.append("instructions")
    if share >= BUSY_PIPE:
        found.append(f"the pipe for {pipe}")
    if not found:
        found.append(f"waits: {wait(row)[0]}")
    if row["busy"] < IDLE_START:
        found.append("begin and end of a short kernel")
    if row["kernels"] > 1 and (row["n_rows"], row["n_elements"]) == SMALL:
        found.append("the kernel before it, which prepares the columns")
    return ", ".join(found)


def rows_of(folder):
    """The rows of the table, and the number of products that were compared."""
    profile = json.loads((folder / "products-profile.json").read_text())
    results, rows = Results(folder / "h100-products.json"), []
    for row in profile["rows"]:
        case = {each: row[each] for each in ("name", "n_rows", "n_elements", "n_columns")}
        info = results.one("test_product", **case, overlaps=True)
        floor, share = info["floor s"], info["floor s"] / info["seconds"]
        if share >= aim(row):
            continue
        pipe, used = max(row["pipes"].items(), key=lambda each: each[1])
        waits, part = wait(row)
        line = [row["name"], f"{row['n_rows']}x{row['n_elements']}", row["n_columns"]]
        line += [percent(share), percent(aim(row))]
        line += [percent(slots_needed(row, floor)), percent(row["issue"]), f"{pipe}, {percent(used)}"]
        line += [percent(row["memory"]), percent(row["busy"]), f"{waits}, {percent(part)}", limits(row, floor)]
        rows.append(line)
    return rows, profile


def page(folder=RESULTS):
    """The text of the page, or None if there are no results."""
    if not (folder / "products-profile.json").exists():
        return None
    rows, profile = rows_of(folder)
    head = ["format", "shape", "columns", "floor / ours", "aim", "slots needed", "slots used", "busiest pipe", "memory"]
    head += ["at work", "most waits", "limit"]
    count = f"{len(rows)} of {len(profile['rows'])} products are slower than their aim."
    return "\n\n".join([INTRODUCTION + "\n" + count, table(head, rows), described_line(profile)]) + "\n"


def main():
    text = page(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    if text is None:
        raise SystemExit("there are no counters; the docstring has the commands")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
