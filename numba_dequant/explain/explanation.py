"""Explains one real block: its bytes, its fields, and the steps of `decode`, recorded while plain Python runs it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import RUN
from numba_dequant.explain.block_picture import BlockPicture
from numba_dequant.explain.trace import trace_decode
from numba_dequant.format import Format


class Explanation:
    """The explanation of a block, for notebooks and for `print`.

    Attributes:
        format: the format.
        block: the index of the block in the data.
        element: the explained element; the steps are those of its run of eight.
        raw: the bytes of the block.
        fields: field name -> contents.
        values: all values of the block, float32.
        steps: the steps of `decode` for the run.
        picture: the picture of the block with the bits of the element; None for a type without blocks.
    """

    def __init__(self, fmt: Format, block: int, element: int, raw: NDArray[np.uint8]) -> None:
        assert fmt.dequantize is not None
        assert fmt.decode is not None
        self.format, self.block, self.element, self.raw = fmt, block, element, raw
        record = raw.view(fmt.layout)
        is_plain = fmt.block_size == 1
        self.fields: dict[str, Any] = {
            name: record[name] if is_plain else record[name][0] for name in fmt.layout.names or ()
        }
        with np.errstate(all="ignore"):
            self.values: NDArray[np.float32] = fmt.dequantize(record).reshape(-1)
            # The alignment that kernels guarantee.
            self.steps = trace_decode(fmt.decode, raw.view(f"u{fmt.alignment}"), element // RUN)
        self.picture: BlockPicture | None = None if is_plain else fmt.picture(element, raw)

    @property
    def run(self) -> NDArray[np.float32]:
        """The eight values of the run."""
        first = self.element // RUN * RUN
        return self.values[first : first + RUN]

    @property
    def text(self) -> str:
        """The explanation as text."""
        return "\n".join(self._lines())

    def _heading(self) -> str:
        first = self.element // RUN * RUN
        return (
            f"{self.format.name}, block {self.block}: element {self.element}, in the run {first} to {first + RUN - 1}"
        )

    def _lines(self) -> Iterator[str]:
        yield self._heading()
        yield "fields"
        width = max(map(len, self.fields))
        for name, value in self.fields.items():
            yield f"  {name.ljust(width)}  {_short(value)}"
        yield "bytes"
        yield self.picture.bytes_text if self.picture else f"  {self.raw.tobytes().hex(' ')}"
        yield "steps of decode"
        width = max(len(label) for _, rows in self._by_statement() for label, _ in rows)
        for statement, rows in self._by_statement():
            if statement:
                yield f"  {statement}"
            for label, value in rows:
                yield f"      {label.ljust(width)}  {value}"
        yield f"value of element {self.element}: {self.values[self.element]:.9g}"

    def _by_statement(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Each statement of `decode` with rows (label, value) of its calls and assignments."""
        statement = ""
        rows: list[tuple[str, str]] = []
        for step in self.steps:
            if rows and step.source != statement:
                yield statement, rows
                rows = []
            statement = step.source
            rows += [(call.label, call.shown) for call in step.calls]
            rows.append((step.name, step.shown))
        yield statement, rows

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"

        def row(label: str, value: str, indent: str = "") -> str:
            cells = f"{indent}<code>{escape(label)}</code>", f"<code>{escape(value)}</code>"
            return f"<tr><td {left}>{cells[0]}</td><td {left}>{cells[1]}</td></tr>"

        fields = "".join(row(name, _short(value)) for name, value in self.fields.items())
        steps = "".join(
            (f"<tr><td {left} colspan='2'><code><b>{escape(statement)}</b></code></td></tr>" if statement else "")
            + "".join(row(label, value, "&emsp;") for label, value in rows)
            for statement, rows in self._by_statement()
        )
        picture = self.picture.svg if self.picture is not None else ""
        return (
            f"<p><b>{escape(self._heading())}</b>: {self.values[self.element]:.9g}</p>{picture}"
            f"<table><tr><th {left}>field</th><th {left}>holds</th></tr>{fields}</table>"
            f"<table><tr><th {left}>step of decode</th><th {left}>gives</th></tr>{steps}</table>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        bundle = {"text/plain": self.text, "text/html": self._repr_html_()}
        if self.picture is not None:
            bundle["image/svg+xml"] = self.picture.svg_file
        return bundle

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Explanation({self._heading()!r})"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shown = " ".join(str(item) for item in value[:32].tolist())
        return f"[{shown}{' ...' if len(value) > 32 else ''}]"
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)
