"""Pictures of a block: every byte and bit, coloured by field; those that decide one element, lit.

Drawn from the layout and from `bit_map`: nothing is known of any one format. SVG for notebooks, which needs no script
and reads on light and on dark pages; text for terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

PALETTE = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00")
"""Okabe and Ito's colours on which black can be read; colour-blind people can tell them apart."""

BYTES_PER_ROW = 16
WIDTH, HEIGHT, GAP, MARGIN = 46, 34, 3, 40
LEGEND_ROW = 20
FONT = "font-family='ui-monospace, SFMono-Regular, Menlo, Consolas, monospace'"


@dataclass(frozen=True)
class Field:
    """A field of a block.

    Attributes:
        name: GGML's.
        start: its first byte.
        n_bytes: its length.
        kind: its items, for example "128 x uint8".
        decides: what its bits decide, for example "1 element" or "16 to 256 elements".
    """

    name: str
    start: int
    n_bytes: int
    kind: str
    decides: str


class Picture:
    """A picture of a block, which notebooks show and `print` prints.

    Attributes:
        title: what it shows.
        fields: the fields, in order.
        element: the element whose bits are lit, or None.
        svg: the picture as SVG.
        text: the picture as text.
    """

    def __init__(
        self, title: str, layout: np.dtype[np.void], bits: NDArray[np.bool_], element: int | None = None
    ) -> None:
        self.title = title
        self.element = element
        self.fields = [_field(layout, name, bits) for name in layout.names or ()]
        self._bits = bits
        self._n_bytes = layout.itemsize

    @property
    def svg(self) -> str:
        """The picture as SVG."""
        return "".join(_svg(self, self._bits, self._n_bytes))

    @property
    def text(self) -> str:
        """The picture as text."""
        return "\n".join(_text(self, self._bits))

    def _repr_html_(self) -> str:
        return self.svg

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/html": self.svg}

    def __str__(self) -> str:
        return self.text


def _field(layout: np.dtype[np.void], name: str, bits: NDArray[np.bool_]) -> Field:
    assert layout.fields is not None
    kind, start = layout.fields[name][:2]
    count = kind.itemsize // kind.base.itemsize
    what = kind.base.name if kind.shape == () else f"{count} x {kind.base.name}"
    decided = bits[8 * start : 8 * (start + kind.itemsize)].sum(axis=1)
    return Field(name, start, kind.itemsize, what, _decides(decided, bits.shape[1]))


def _decides(counts: NDArray[Any], block_size: int) -> str:
    least, most = int(counts.min()), int(counts.max())
    if not most:
        return "nothing"
    if least == most:
        return "all elements" if most == block_size else f"{most} element{'s' * (most > 1)}"
    return f"{least} to {most} elements"


def _svg(picture: Picture, bits: NDArray[np.bool_], n_bytes: int) -> Iterator[str]:
    n_rows = -(-n_bytes // BYTES_PER_ROW)
    columns = min(n_bytes, BYTES_PER_ROW)
    top = 30
    legend = top + n_rows * (HEIGHT + GAP) + 14
    width = max(MARGIN + columns * (WIDTH + GAP), 620)
    height = legend + LEGEND_ROW * len(picture.fields) + 4
    yield (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' {FONT} font-size='12' fill='currentColor'>"
    )
    yield f"<title>{escape(picture.title)}</title>"
    yield f"<text x='0' y='16' font-size='13'>{escape(picture.title)}</text>"
    for row in range(n_rows):
        y = top + row * (HEIGHT + GAP) + HEIGHT / 2 + 4
        yield f"<text x='{MARGIN - 8}' y='{y}' text-anchor='end' opacity='0.7'>{row * BYTES_PER_ROW}</text>"
    for number, item in enumerate(picture.fields):
        for byte in range(item.start, item.start + item.n_bytes):
            x = MARGIN + byte % BYTES_PER_ROW * (WIDTH + GAP)
            y = top + byte // BYTES_PER_ROW * (HEIGHT + GAP)
            label = item.name if byte == item.start else str(byte - item.start)
            yield from _byte(
                picture.element, bits[8 * byte : 8 * byte + 8], PALETTE[number % len(PALETTE)], label, x, y
            )
    for number, item in enumerate(picture.fields):
        y = legend + number * LEGEND_ROW
        colour = PALETTE[number % len(PALETTE)]
        last = item.start + item.n_bytes - 1
        where = f"byte {item.start}" if item.n_bytes == 1 else f"bytes {item.start} to {last}"
        yield f"<rect x='{MARGIN}' y='{y}' width='14' height='14' rx='2' fill='{colour}'/>"
        for x, text in ((22, item.name), (110, where), (250, item.kind), (370, f"a bit decides {item.decides}")):
            yield f"<text x='{MARGIN + x}' y='{y + 11}'>{escape(text)}</text>"
    yield "</svg>"


def _byte(element: int | None, bits: NDArray[np.bool_], colour: str, label: str, x: float, y: float) -> Iterator[str]:
    """A byte: its name or number within the field, and below it the bits, the highest first."""
    is_lit = bits[:, element] if element is not None else np.ones(8, bool)
    # On a byte that is not lit the page shines through, so the label has the page's colour.
    box, ink, faded = (1, "#000", 1) if is_lit.any() else (0.25, "currentColor", 0.6)
    yield f"<rect x='{x}' y='{y}' width='{WIDTH}' height='{HEIGHT}' rx='3' fill='{colour}' fill-opacity='{box}'/>"
    size = 11 if len(label) < 6 else 9
    middle = f"x='{x + WIDTH / 2}' y='{y + 14}' text-anchor='middle'"
    yield f"<text {middle} font-size='{size}' fill='{ink}' fill-opacity='{faded}'>{escape(label)}</text>"
    if not is_lit.any():
        return
    for bit in range(8):
        at = x + 3 + (7 - bit) * (WIDTH - 6) / 8
        if element is None:
            # One element: black. A few: grey. Many: light. None: an outline.
            n_elements = int(bits[bit].sum())
            shade = 0.85 if n_elements == 1 else 0.5 if 0 < n_elements <= 8 else 0.2 if n_elements else 0
        else:
            shade = 0.85 if is_lit[bit] else 0
        yield (
            f"<rect x='{at:g}' y='{y + 21}' width='{(WIDTH - 6) / 8 - 1:g}' height='9' fill='#000' "
            f"fill-opacity='{shade}' stroke='#000' stroke-opacity='0.35' stroke-width='0.5'/>"
        )


def _text(picture: Picture, bits: NDArray[np.bool_]) -> Iterator[str]:
    yield picture.title
    names = max(len(item.name) for item in picture.fields)
    kinds = max(len(item.kind) for item in picture.fields)
    for item in picture.fields:
        last = item.start + item.n_bytes - 1
        where = f"{item.start}" if item.n_bytes == 1 else f"{item.start}-{last}"
        yield f"  {item.name.ljust(names)}  {where:>7}  {item.kind.ljust(kinds)}  a bit decides {item.decides}"
    if picture.element is None:
        return
    yield f"bits of element {picture.element}, the highest of a byte first:"
    for item in picture.fields:
        for byte in range(item.start, item.start + item.n_bytes):
            lit = bits[8 * byte : 8 * byte + 8, picture.element]
            if lit.any():
                shown = "".join("█" if is_lit else "·" for is_lit in lit[::-1])
                label = item.name if item.n_bytes == 1 else f"{item.name}[{byte - item.start}]"
                yield f"  byte {byte:>3}  {shown}  {label}"
