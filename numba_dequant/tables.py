"""What a model holds, as rows of a table: for the terminal and for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST_ROWS = 500
"""Rows of a table in a notebook."""

MOST_LINES = 60
"""Rows of a table that is printed unasked."""


def plain(name: str) -> str:
    """A name from a file, which must not steer the terminal."""
    return name if name.isprintable() else repr(name)


def short(value: Any) -> str:
    """A metadata value in a few words."""
    if not isinstance(value, (str, int, float, bool)):
        shown = [short(item) for item in value[:3]]
        more = ", ..." if len(value) > len(shown) else ""
        return f"[{', '.join(shown)}{more}] ({len(value):,} items)"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)


def metadata_rows(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values."""
    return [(plain(key), short(value)) for key, value in metadata.items()]


def text(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str, most: int | None = None) -> str:
    """A table for a terminal; `sides` has < or > for each column. Of a long one, the beginning."""
    shown = [head, *rows[:most]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    if most is not None and len(rows) > most:
        lines.append(f"and {len(rows) - most:,} more")
    return "\n".join(lines)


TENSOR_HEAD, TENSOR_SIDES = ("tensor", "format", "shape", "bytes"), "<<>>"


def tensor_rows(tensors: Iterable[Any]) -> list[tuple[str, str, str, str]]:
    """Name, format, shape and size of each `TensorInfo`."""
    return [
        (plain(each.name), each.format.name, " x ".join(map(str, each.shape)) or "scalar", f"{each.n_bytes:,}")
        for each in tensors
    ]


def html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a notebook; of a long one, the beginning."""

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag} style='text-align:left'>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows[:MOST_ROWS])
    more = f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else ""
    return f"<table>{line(head, 'th')}{body}</table>{more}"
