"""Pictures of a block: all bytes and bits, coloured by field, with the bits of one element highlighted.

They are drawn from the layout and from `bit_map`: as SVG for light and dark pages, and as text for terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

PALETTE = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#BBBBBB", "#A6CEE3")
"""Colours for black text, most of them from Okabe and Ito's palette for colour-blind readers."""

BYTES_PER_ROW = 16
WIDTH, HEIGHT, GAP, MARGIN = 46, 34, 3, 40
LEGEND_ROW = 20
LETTER = 7.4
"""Width of a letter of the legend."""
FONT = "font-family='ui-monospace, SFMono-Regular, Menlo, Consolas, monospace'"

INK = "<style>svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>"
"""Text colours of an SVG file, which has no page to inherit them from."""


MAX_LETTERS = 8
"""Maximum letters of a name in a box."""


@dataclass(frozen=True)
class Field:
    """A field of a block.

    Attributes:
        name: GGML's name.
        start: the first byte.
        n_bytes: the size in bytes.
        kind: the items, for example "128 x uint8".
        item_size: bytes per item.
        decides: what each bit affects, for example "1 element" or "16 to 256 elements".
    """

    name: str
    start: int
    n_bytes: int
    kind: str
    item_size: int
    decides: str

    def label(self, byte: int) -> str:
        """The item of the field that a byte of the block belongs to."""
        item, rest = divmod(byte - self.start, self.item_size)
        which = f"[{item}]" if self.n_bytes > self.item_size else ""
        return f"{self.name}{which}" + (f", byte {rest}" if self.item_size > 1 else "")

    def mark(self, byte: int) -> str:
        """A short label: the name at the start of the field, then the index at the start of each item."""
        item, rest = divmod(byte - self.start, self.item_size)
        if byte == self.start:
            return self.name if len(self.name) <= MAX_LETTERS else f"{self.name[: MAX_LETTERS - 1]}…"
        return "" if rest else str(item)


class BlockPicture:
    """A picture of a block, for notebooks and for `print`.

    Attributes:
        title: the title.
        fields: the fields, in order.
        element: the element whose bits are highlighted, or None.
        raw: the bytes of a real block, or None.
        svg: the picture as SVG for a page.
        svg_file: the picture as SVG for a file.
        text: the picture as text.
        bytes_text: the part of `text` with the bytes and the bits of the element.
    """

    def __init__(
        self,
        title: str,
        layout: np.dtype[np.void],
        bits: NDArray[np.bool_],
        element: int | None = None,
        raw: NDArray[np.uint8] | None = None,
    ) -> None:
        self.title = title
        self.element = element
        self.raw = raw
        self.fields = [_field(layout, name, bits) for name in layout.names or ()]
        self._bits = bits
        self._n_bytes = layout.itemsize

    @property
    def svg(self) -> str:
        """The picture as SVG."""
        return "".join(_svg(self, self._bits, self._n_bytes))

    @property
    def svg_file(self) -> str:
        """The picture as SVG for a file."""
        return self.svg.replace("<title>", f"{INK}<title>", 1)

    @property
    def text(self) -> str:
        """The picture as text."""
        return "\n".join([self.title, *_fields(self), *_bytes(self, self._bits)])

    @property
    def bytes_text(self) -> str:
        """The bytes and the bits of the element, as text."""
        return "\n".join(_bytes(self, self._bits))

    def _repr_html_(self) -> str:
        return self.svg

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/html": self.svg, "image/svg+xml": self.svg_file}

    def __str__(self) -> str:
        return self.text


def _field(layout: np.dtype[np.void], name: str, bits: NDArray[np.bool_]) -> Field:
    assert layout.fields is not None
    dtype, start = layout.fields[name][:2]
    count = dtype.itemsize // dtype.base.itemsize
    items = dtype.base.name if dtype.shape == () else f"{count} x {dtype.base.name}"
    decided = bits[8 * start : 8 * (start + dtype.itemsize)].sum(axis=1)
    return Field(name, start, dtype.itemsize, items, dtype.base.itemsize, _decides(decided, bits.shape[1]))


def _key(picture: BlockPicture) -> str:
    """The legend of the marks in the boxes."""
    if picture.element is None:
        return "dark bits decide one element, grey ones up to 8, light ones more, outlined ones none"
    if picture.raw is None:
        return f"dark bits decide element {picture.element}; the highest bit of a byte comes first"
    return f"bold bits decide element {picture.element}; the highest bit of a byte comes first"


def _decides(counts: NDArray[Any], block_size: int) -> str:
    least, most = int(counts.min()), int(counts.max())
    if not most:
        return "nothing"
    if least == most:
        return "all elements" if most == block_size else f"{most} element{'s' * (most > 1)}"
    return f"{least} to {most} elements"


def _svg(picture: BlockPicture, bits: NDArray[np.bool_], n_bytes: int) -> Iterator[str]:
    n_rows = -(-n_bytes // BYTES_PER_ROW)
    columns = min(n_bytes, BYTES_PER_ROW)
    top = 30
    legend = top + n_rows * (HEIGHT + GAP) + 14
    rows = [_legend_row(item) for item in picture.fields]
    stops = [22.0]
    for column in zip(*rows, strict=True):
        stops.append(stops[-1] + LETTER * (max(map(len, column)) + 2))
    width = max(MARGIN + columns * (WIDTH + GAP), 620, round(MARGIN + stops[-1]))
    height = legend + LEGEND_ROW * (len(rows) + 1) + 4
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
            x: float = MARGIN + byte % BYTES_PER_ROW * (WIDTH + GAP)
            y = top + byte // BYTES_PER_ROW * (HEIGHT + GAP)
            colour = PALETTE[number % len(PALETTE)]
            yield from _byte(picture, bits[8 * byte : 8 * byte + 8], colour, item, byte, x, y)
    for number, texts in enumerate(rows):
        y = legend + number * LEGEND_ROW
        yield f"<rect x='{MARGIN}' y='{y}' width='14' height='14' rx='2' fill='{PALETTE[number % len(PALETTE)]}'/>"
        for x, text in zip(stops, texts, strict=False):
            yield f"<text x='{MARGIN + x:g}' y='{y + 11}'>{escape(text)}</text>"
    yield f"<text x='{MARGIN}' y='{legend + LEGEND_ROW * len(rows) + 13}' font-size='11'>{_key(picture)}</text>"
    yield "</svg>"


def _legend_row(item: Field) -> tuple[str, str, str, str]:
    last = item.start + item.n_bytes - 1
    where = f"byte {item.start}" if item.n_bytes == 1 else f"bytes {item.start} to {last}"
    return item.name, where, item.kind, f"a bit decides {item.decides}"


def _byte(
    picture: BlockPicture, bits: NDArray[np.bool_], colour: str, item: Field, byte: int, x: float, y: float
) -> Iterator[str]:
    """A byte: its label or value, and below it the bits, the highest first."""
    element, raw = picture.element, picture.raw
    is_lit = bits[:, element] if element is not None else np.ones(8, bool)
    # A byte without highlighted bits is transparent, so its label has the text colour of the page.
    box, ink, faded = (1, "#000", 1) if is_lit.any() else (0.25, "currentColor", 0.6)
    label = item.mark(byte) if raw is None else f"{raw[byte]:02x}"
    yield f"<rect x='{x}' y='{y}' width='{WIDTH}' height='{HEIGHT}' rx='3' fill='{colour}' fill-opacity='{box}'/>"
    size = 11 if len(label) < 6 else 9
    middle = f"x='{x + WIDTH / 2}' y='{y + 14}' text-anchor='middle'"
    if label:
        yield f"<text {middle} font-size='{size}' fill='{ink}' fill-opacity='{faded}'>{escape(label)}</text>"
    if not is_lit.any():
        return
    for bit in range(8):
        at = x + 3 + (7 - bit) * (WIDTH - 6) / 8
        if raw is not None:
            weight, shade = ("bold", 1) if is_lit[bit] else ("normal", 0.35)
            yield (
                f"<text x='{at + 2.5:g}' y='{y + 29}' font-size='8' text-anchor='middle' fill='#000' "
                f"font-weight='{weight}' fill-opacity='{shade}'>{raw[byte] >> bit & 1}</text>"
            )
            continue
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


def _fields(picture: BlockPicture) -> Iterator[str]:
    names = max(len(item.name) for item in picture.fields)
    kinds = max(len(item.kind) for item in picture.fields)
    for item in picture.fields:
        last = item.start + item.n_bytes - 1
        where = f"{item.start}" if item.n_bytes == 1 else f"{item.start}-{last}"
        yield f"  {item.name.ljust(names)}  {where:>7}  {item.kind.ljust(kinds)}  a bit decides {item.decides}"


def _bytes(picture: BlockPicture, bits: NDArray[np.bool_]) -> Iterator[str]:
    if picture.raw is not None or picture.element is None:
        yield from _rows(picture)
    if picture.element is None:
        return
    yield f"bits of element {picture.element}, the highest of a byte first:"
    for item in picture.fields:
        for byte in range(item.start, item.start + item.n_bytes):
            lit = bits[8 * byte : 8 * byte + 8, picture.element]
            if lit.any():
                yield f"  byte {byte:>3}  {_bits(picture, byte, lit)}  {item.label(byte)}"


def _rows(picture: BlockPicture) -> Iterator[str]:
    """The bytes in rows: their values, or the first letters of their fields."""
    if picture.raw is not None:
        cells = [f"{byte:02x}" for byte in picture.raw]
    else:
        cells = [item.name[:2].ljust(2) for item in picture.fields for _ in range(item.n_bytes)]
    for start in range(0, len(cells), BYTES_PER_ROW):
        yield f"  {start:>4}  {' '.join(cells[start : start + BYTES_PER_ROW])}".rstrip()


def _bits(picture: BlockPicture, byte: int, lit: NDArray[np.bool_]) -> str:
    """The bits of a byte that affect an element; for a real block, their values."""
    if picture.raw is None:
        return "".join("█" if is_lit else "·" for is_lit in lit[::-1])
    return "".join(
        digit if is_lit else "·" for digit, is_lit in zip(f"{picture.raw[byte]:08b}", lit[::-1], strict=True)
    )
