"""Text, HTML and pictures of a format, for terminals and notebooks."""

from __future__ import annotations

import html
import inspect
import sys

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import DataError, shown
from numba_dequant.explain.block_picture import BlockPicture
from numba_dequant.format import Format, element_of


def picture(fmt: Format, element: int | None, raw: NDArray[np.uint8] | None) -> BlockPicture:
    """See `Format.picture`."""
    bits = fmt.bit_map
    title = f"{fmt.name}: {fmt.type_size} bytes for {fmt.block_size} elements"
    title += f", {fmt.bits_per_weight:.4g} bits per weight"
    if element is not None:
        element = element_of(fmt.name, element, fmt.block_size)
        title += f"; lit: the {int(bits[:, element].sum())} bits of element {element}"
    is_block = isinstance(raw, np.ndarray) and raw.dtype == np.uint8 and raw.shape == (fmt.type_size,)
    if raw is not None and not is_block:
        got = f"{raw.dtype} of shape {raw.shape}" if isinstance(raw, np.ndarray) else shown(raw)
        raise DataError(f"raw must be one block of {fmt.name}, uint8 of shape ({fmt.type_size},), got {got}")
    return BlockPicture(title, fmt.layout, bits, element, raw)


def description(fmt: Format) -> str:
    """See `Format.description`."""
    module = sys.modules.get(getattr(fmt.decode, "__module__", ""))
    is_ours = module is not None and module.__name__.startswith("numba_dequant.formats.")
    return inspect.cleandoc(module.__doc__ or "") if module is not None and is_ours else fmt.summary


def text(fmt: Format) -> str:
    """See `Format.text`."""
    if fmt.dequantize is None or fmt.block_size == 1:
        plural = "s" * (fmt.type_size > 1)
        return f"{fmt.name}: {fmt.type_size} byte{plural} for an element. The id in a file is {fmt.ggml_id}."
    return f"{fmt.picture().text}\n{_range(fmt)}\n\n{description(fmt)}"


def mime_bundle(fmt: Format) -> dict[str, str]:
    """The text, the HTML and the picture for notebooks."""
    plain = text(fmt)
    if fmt.dequantize is None or fmt.block_size == 1:
        return {"text/plain": plain, "text/html": f"<p>{html.escape(plain)}</p>"}
    shown_picture = fmt.picture()
    paragraphs = [_range(fmt), *description(fmt).split("\n\n")]
    page = shown_picture.svg + "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs)
    return {"text/plain": plain, "text/html": page, "image/svg+xml": shown_picture.svg_file}


def _range(fmt: Format) -> str:
    least, greatest = fmt.value_range
    has_floats = any(fmt.layout[name].base.kind == "f" for name in fmt.layout.names or ())
    where = ", where the floats of the block are 1" if has_floats else ""
    return f"Values go from {least:.6g} to {greatest:.6g}{where}. The id in a file is {fmt.ggml_id}."
