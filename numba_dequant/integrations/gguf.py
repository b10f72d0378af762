"""Replacements for the package gguf (gguf-py): `dequantize` and `GGUFReader`.

Source: gguf 0.10.0 to 0.19.0, quants.py and gguf_reader.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant import api
from numba_dequant.errors import UnknownFormatError
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.integrations.patching import Replacement, require_version


def replacements() -> list[Replacement]:
    """The functions and classes of gguf-py to replace.

    Raises:
        OptionError: gguf is not installed, or its version is unknown.
    """
    require_version("gguf", "0.10", "0.19")
    import gguf

    from numba_dequant.integrations.gguf_reader import GGUFReader

    _original()
    return [Replacement(gguf.quants, "dequantize", dequantize), Replacement(gguf.gguf_reader, "GGUFReader", GGUFReader)]


@cache
def _original() -> Callable[[Any, Any], NDArray[Any]]:
    """The function of gguf-py. The first call must come before it is replaced."""
    from gguf.quants import dequantize as original

    function: Callable[[Any, Any], NDArray[Any]] = original
    return function


def dequantize(data: NDArray[Any], qtype: Any) -> NDArray[np.float32]:
    """Dequantize rows of blocks, as `gguf.dequantize` does.

    Args:
        data: array of one-byte elements, usually uint8, of shape (..., bytes per row). Each row is a whole number of
            blocks. It may be strided or a memory map. F32 and F16 data may have any type that gguf-py accepts.
        qtype: member of `gguf.GGMLQuantizationType`, or a ggml id.

    Returns:
        Array of float32 and of shape (..., elements per row). It is a view for F32.

    Raises:
        ValueError: a row is not a whole number of blocks.
        NotImplementedError: the type holds integers or F64, or it is unknown both to this package and to gguf-py.
    """
    # What ours does not take, gguf-py's takes or refuses: a lazy tensor, for example.
    fmt = _format(qtype)
    if fmt is None or not isinstance(data, np.ndarray) or data.itemsize != 1 or not data.size or not data.ndim:
        return _original()(data, qtype)
    if data.shape[-1] % fmt.type_size:
        return _original()(data, qtype)
    shape = (*data.shape[:-1], data.shape[-1] // fmt.type_size * fmt.block_size)
    values: NDArray[np.float32] = api.dequantize(data, fmt, "float32", shape=shape, device="cpu")
    return values


def _format(qtype: Any) -> Format | None:
    """The format of a type that ours dequantizes."""
    from gguf.constants import GGML_QUANT_SIZES

    try:
        fmt = format_named(qtype)
    except UnknownFormatError:
        return None
    # gguf-py has another size for Q8_1 than GGML, so that rows of it are cut wrongly.
    has_known_size = GGML_QUANT_SIZES.get(qtype, (fmt.block_size, fmt.type_size)) == (fmt.block_size, fmt.type_size)
    return fmt if has_known_size and fmt.name not in ("F32", "F16") and fmt.stored_dtype is None else None
