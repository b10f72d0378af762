"""The table of results: one row for each module."""

from dataclasses import dataclass, field

BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
HEAD = "| module | mutants | killed | argued | surviving | score | seconds |\n|---|--:|--:|--:|--:|--:|--:|\n"


@dataclass
class Row:
    """The results of a module. The score is the share of killed mutants among those that are not argued."""

    module: str
    mutants: int
    killed: int
    argued: int
    seconds: float
    survivors: list = field(default_factory=list)

    @classmethod
    def of(cls, module, found, results, known):
        row = cls(module, len(found), 0, 0, sum(each["seconds"] for each in results.values()))
        for each in found:
            if results[each.number]["outcome"].startswith("killed"):
                row.killed += 1
            elif (module, each.function, each.text) in known:
                row.argued += 1
            else:
                row.survivors.append(each)
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
