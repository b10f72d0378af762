"""Tables of metadata and tensors, for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

MAX_ROWS = 500
"""Maximum rows of a table in a notebook."""

MAX_LINES = 60
"""Maximum rows of a table in a `repr`."""

WIDEST_NAME = 100
"""Maximum characters of a name in a table."""


def printable(text: str) -> str:
    """Escape control characters, bidirectional marks and invalid bytes, so that text cannot control the terminal."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8 (surrogateescape)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def cell(name: str) -> str:
    """A name for a table; a long name is cut in the middle."""
    shown = printable(name)
    return shown if len(shown) <= WIDEST_NAME else f"{shown[:60]}...{shown[-30:]}"


def metadata_rows(entries: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The rows of a table of metadata."""
    return [(cell(key), printable(value)) for key, value in entries]


def text(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str, total: int | None = None) -> str:
    """A table for a terminal; `sides` has < or > for each column.

    If `total` is more than the number of rows, a last line says how many are missing. All cells must be `printable`.
    """
    shown = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    if total is not None and total > len(rows):
        lines.append(f"and {total - len(rows):,} more")
    return "\n".join(lines)


TENSOR_HEAD, TENSOR_SIDES = ("tensor", "format", "shape", "bytes"), "<<>>"


def tensor_rows(tensors: Iterable[Any]) -> list[tuple[str, str, str, str]]:
    """Name, format, shape and bytes of each `TensorInfo`."""
    return [
        (cell(each.name), each.format.name, " x ".join(map(str, each.shape)) or "scalar", f"{each.n_bytes:,}")
        for each in tensors
    ]


def html(head: Sequence[str], rows: Sequence[Sequence[str]], total: int | None = None) -> str:
    """A table for a notebook. If `total` is more than the number of rows, a last line says how many are missing."""
    from html import escape  # only notebooks need it

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag} style='text-align:left'>{escape(printable(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    more = f"<p>and {total - len(rows):,} more</p>" if total is not None and total > len(rows) else ""
    return f"<table>{line(head, 'th')}{body}</table>{more}"
