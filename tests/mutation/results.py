"""The results of mutants, and the table with one row for each module."""

import json
from dataclasses import dataclass, field

BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
HEAD = "| module | mutants | killed | argued | surviving | score | seconds |\n|---|--:|--:|--:|--:|--:|--:|\n"


class Results:
    """How the mutants of modules end: "killed ..." or "survived ...", and in how many seconds."""

    def __init__(self, of):
        self._of = of

    def add(self, module, mutant, outcome, seconds):
        _, before = self.of(module, mutant)
        self._of.setdefault(module, {})["\t".join(mutant.identity)] = [outcome, round(before + seconds, 3)]

    def of(self, module, mutant):
        return self._of.get(module, {}).get("\t".join(mutant.identity), ("", 0))

    def is_killed(self, module, mutant):
        return self.of(module, mutant)[0].startswith("killed")

    def json(self):
        return json.dumps(self._of, indent=1, sort_keys=True)


@dataclass
class Row:
    """The results of a module. The score is the share of killed mutants among those that are not argued."""

    module: str
    mutants: int
    killed: int = 0
    argued: int = 0
    seconds: float = 0
    survivors: list = field(default_factory=list)

    @classmethod
    def of(cls, module, found, results, known):
        row = cls(module, len(found))
        for each in found:
            outcome, seconds = results.of(module, each)
            row.seconds += seconds
            if (module, *each.identity) in known:
                row.argued += 1
            elif outcome.startswith("killed"):
                row.killed += 1
            else:
                row.survivors.append((each, outcome.removeprefix("survived").strip(": ")))
        return row

    def line(self):
        counted = self.mutants - self.argued
        score = f"{100 * self.killed / counted:.1f} %" if counted else "-"
        numbers = [self.mutants, self.killed, self.argued, len(self.survivors), score, round(self.seconds)]
        return f"| `{self.module}` | " + " | ".join(map(str, numbers)) + " |\n"


def text(rows):
    return HEAD + "".join(row.line() for row in rows)


def write(path, rows):
    """Replace the rows of these modules; those of others stay."""
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {line.split("`")[1]: line for line in old.splitlines(keepends=True) if "`" in line}
    lines |= {row.module: row.line() for row in rows}
    new = HEAD + "".join(lines[module] for module in sorted(lines))
    path.write_text(before + BEGIN + new + END + after, "utf-8")
