"""Explains one real block: its bytes, its fields, and the steps of `decode`, recorded while plain Python runs it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import host_bytes
from numba_dequant.bits import RUN
from numba_dequant.errors import DataError, ShapeError, shown
from numba_dequant.explain.block_picture import BlockPicture
from numba_dequant.explain.trace import trace_decode
from numba_dequant.format import Format, element_of, whole_number
from numba_dequant.formats import format_named


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


def explain(data: Any, format: str | int | Format, block: int = 0, element: int = 0) -> Explanation:
    """Explain how the values of one block are computed.

    >>> import numpy as np, numba_dequant as nd
    >>> data = np.float16(0.5).tobytes() + bytes(range(16))
    >>> print(nd.explain(data, "Q4_0", element=17))
    Q4_0, block 0: element 17, in the run 16 to 23
    fields
      d   0.5
      qs  [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
    bytes
         0  00 38 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d
        16  0e 0f
    bits of element 17, the highest of a byte first:
      byte   0  00000000  d, byte 0
      byte   1  00111000  d, byte 1
      byte   3  0000····  qs[1]
    steps of decode
      packed = load_8_bytes(block, at + QS + 8 * (run & 1))
          load_8_bytes(block, 2)  0  1  2  3  4  5  6  7
          packed                  0  1  2  3  4  5  6  7
      quants = (packed >> (4 * (run >> 1))) & 0x0F0F0F0F0F0F0F0F
          quants                  0  0  0  0  0  0  0  0
      half(load_u16(block, at + D)) * centred_bytes(quants, 8)
          load_u16(block, 0)      14336 = 0x3800
          half(14336)             0.5
          centred_bytes(0, 8)     -8  -8  -8  -8  -8  -8  -8  -8
          value                   -4  -4  -4  -4  -4  -4  -4  -4
    value of element 17: -4

    Args:
        data: whole blocks, as for `dequantize`, on the host.
        format: the format of the blocks.
        block: the index of the block.
        element: the index of the element in the block; the steps are those of its run of eight.

    Raises:
        UnknownFormatError: `format` is unknown.
        DataError: `data` is not whole blocks on the host, or `format` is a type that is returned as it is stored.
        ShapeError: `block` or `element` is out of range.
    """
    fmt = format_named(format)
    if fmt.dequantize is None:
        raise DataError(f"{fmt.name} is stored as it is, so there is nothing to explain; pass a format of blocks")
    raw = host_bytes(data)
    # Plain arrays are explained in runs of eight elements.
    size, n_bytes = (fmt.block_size, fmt.type_size) if fmt.block_size > 1 else (RUN, RUN * fmt.type_size)
    n_blocks = fmt.n_elements(raw.size) // size
    number = whole_number(block, 0)
    if number is None or number >= n_blocks:
        raise ShapeError(f"the data has {n_blocks} blocks of {size} elements; there is no block {shown(block)}")
    element = element_of(fmt.name, element, size)
    return Explanation(fmt, number, element, raw[number * n_bytes : (number + 1) * n_bytes].copy())


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shown = " ".join(str(item) for item in value[:32].tolist())
        return f"[{shown}{' ...' if len(value) > 32 else ''}]"
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)
