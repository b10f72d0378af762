"""One real block, step by step: its bytes, its fields, and how `decode` comes to the values of a run.

The steps are those of the format's own `decode`, watched while plain Python runs it: every name that it gives to
something, and what that was.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import host_bytes
from numba_dequant.bits import RUN
from numba_dequant.errors import DataError, ShapeError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.picture import Picture

EIGHT_BYTES = re.compile(r"load_8_bytes|lookup_nibbles|0x[0-9A-F]{16}")
"""What makes an integer of eight packed bytes."""


@dataclass(frozen=True)
class Step:
    """Something that `decode` gave a name.

    Attributes:
        name: the name.
        source: the line that did so.
        value: an integer, a float32, or eight float32.
    """

    name: str
    source: str
    value: Any

    @property
    def shown(self) -> str:
        """The value as text; what packs eight bytes, as these."""
        if isinstance(self.value, np.ndarray):
            return "  ".join(f"{item:.6g}" for item in self.value)
        if isinstance(self.value, (float, np.floating)):
            return f"{self.value:.6g}"
        if abs(self.value) >= 1 << 32 or EIGHT_BYTES.search(self.source):
            return "  ".join(str(byte) for byte in (int(self.value) & (1 << 64) - 1).to_bytes(8, "little"))
        return str(self.value) if abs(self.value) < 256 else f"{self.value} = {self.value:#x}"


class Explanation:
    """A block and how its values come about, which notebooks show and `print` prints.

    Attributes:
        format: its format.
        block: which block of the data it is.
        element: the element that is explained, with the run of eight that it is part of.
        raw: the bytes of the block.
        fields: name -> what the field holds.
        values: all values of the block, float32.
        steps: what `decode` does for the run.
        picture: the layout, with the bits of the element lit; None for a type without blocks.
    """

    def __init__(self, source: Format, block: int, element: int, raw: NDArray[np.uint8]) -> None:
        assert source.dequantize is not None
        self.format, self.block, self.element, self.raw = source, block, element, raw
        record = raw.view(source.layout)
        is_plain = source.block_size == 1
        self.fields: dict[str, Any] = {
            name: record[name] if is_plain else record[name][0] for name in source.layout.names or ()
        }
        with np.errstate(all="ignore"):
            self.values: NDArray[np.float32] = source.dequantize(record).reshape(-1)
            self.steps = _watched(source, raw, element // RUN)
        self.picture: Picture | None = None if is_plain else source.picture(element)

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
        width = max(map(len, [*self.fields, *(step.name for step in self.steps)]))
        yield "fields"
        for name, value in self.fields.items():
            yield f"  {name.ljust(width)}  {_short(value)}"
        if self.picture is not None:
            yield from self.picture.text.splitlines()[1 + len(self.fields) :]
        yield "steps of decode"
        for step in self.steps:
            yield f"  {step.name.ljust(width)}  {step.shown}"
        yield f"value of element {self.element}: {self.values[self.element]:.9g}"

    def _repr_html_(self) -> str:
        fields = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(_short(value))}</code></td></tr>"
            for name, value in self.fields.items()
        )
        steps = "".join(
            f"<tr><td style='text-align:left'><code>{escape(step.source)}</code></td>"
            f"<td style='text-align:left'><code>{escape(step.shown)}</code></td></tr>"
            for step in self.steps
        )
        picture = self.picture.svg if self.picture is not None else ""
        return (
            f"<p><b>{escape(self._heading())}</b>: {self.values[self.element]:.9g}</p>{picture}"
            f"<table><tr><th>field</th><th style='text-align:left'>holds</th></tr>{fields}</table>"
            f"<table><tr><th style='text-align:left'>step of decode</th><th style='text-align:left'>gives</th></tr>"
            f"{steps}</table>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/html": self._repr_html_()}

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Explanation({self._heading()!r})"


def explain(data: Any, format: str | Format, block: int = 0, element: int = 0) -> Explanation:
    """How the values of one block come about.

    >>> import numpy as np, numba_dequant as nd
    >>> data = np.float16(0.5).tobytes() + bytes(range(16))
    >>> print(nd.explain(data, "Q4_0", element=17))
    Q4_0, block 0: element 17, in the run 16 to 23
    fields
      d       0.5
      qs      [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
    bits of element 17, the highest of a byte first:
      byte   0  ████████  d[0]
      byte   1  ████████  d[1]
      byte   3  ████····  qs[1]
    steps of decode
      packed  0  1  2  3  4  5  6  7
      quants  0  0  0  0  0  0  0  0
      value   -4  -4  -4  -4  -4  -4  -4  -4
    value of element 17: -4

    Args:
        data: whole blocks, as for `dequantize`, on the host.
        format: their format.
        block: which of them.
        element: which element of the block; the steps are those of the run of eight that it is part of.

    Raises:
        UnknownFormatError, DataError: what is wrong with the argument of that name.
        ShapeError: there is no such block or element.
    """
    source = format_named(format)
    if source.dequantize is None:
        raise DataError(f"{source.name} is stored as it is: there is nothing to explain")
    raw = host_bytes(data)
    # The elements of a plain array are explained in runs.
    size, n_bytes = (source.block_size, source.type_size) if source.block_size > 1 else (RUN, RUN * source.type_size)
    n_blocks = source.n_elements(raw.size) // size
    if not 0 <= block < n_blocks:
        raise ShapeError(f"the data has {n_blocks} blocks of {size} elements, from 0 on; there is no block {block}")
    if not 0 <= element < size:
        raise ShapeError(f"a block of {source.name} has elements 0 to {size - 1}, not {element}")
    return Explanation(source, block, element, raw[block * n_bytes : (block + 1) * n_bytes].copy())


def _watched(source: Format, raw: NDArray[np.uint8], run: int) -> list[Step]:
    """What `decode` gives names to, in the order in which it does, and what it returns."""
    decode = source.decode
    assert decode is not None
    lines, first = inspect.getsourcelines(decode)
    steps: list[Step] = []
    known: dict[str, Any] = {}
    # The alignment is what a kernel vouches for.
    block = raw.view(f"u{source.alignment}")

    def note(frame: FrameType, line: int) -> None:
        for name, value in frame.f_locals.items():
            if name not in known or known[name] is not value:
                known[name] = value
                if name not in ("block", "at", "run"):
                    steps.append(Step(name, _statement(lines, line - first), value))

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code is not decode.__code__:
            return None
        last = [frame.f_lineno]

        def within(frame: FrameType, event: str, argument: Any) -> Any:
            note(frame, last[0])
            last[0] = frame.f_lineno
            if event == "return":
                source_line = _statement(lines, frame.f_lineno - first).removeprefix("return ")
                if not (steps and steps[-1].name == source_line):
                    steps.append(Step("value", source_line, argument))
            return within

        return within

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        decode(block, 0, run)
    finally:
        sys.settrace(before)
    return steps


def _statement(lines: list[str], index: int) -> str:
    return lines[index].strip() if 0 <= index < len(lines) else ""


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shown = " ".join(str(item) for item in value[:32].tolist())
        return f"[{shown}{' ...' if len(value) > 32 else ''}]"
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)
