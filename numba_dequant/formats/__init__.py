"""The registry: every `Format` that a module of this folder defines, found by scanning the folder."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from numba_dequant.errors import UnknownFormatError
from numba_dequant.format import Format

_formats: dict[str, Format] = {}
_with_id: dict[int, Format] = {}

FORMATS: Mapping[str, Format] = MappingProxyType(_formats)
"""Every known format by name, ordered by ggml id."""

REMOVED_IDS = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Ids that GGML once gave to formats and has taken back."""


def register(new: Format) -> Format:
    """Add a format to `FORMATS`; it then works everywhere that a built-in one does.

    Raises:
        ValueError: the name or the ggml id is taken.
    """
    for known in _formats.values():
        if known.name == new.name or known.ggml_id == new.ggml_id:
            raise ValueError(f"{new.name} (ggml id {new.ggml_id}) clashes with {known.name} (ggml id {known.ggml_id})")
    everything = sorted([*_formats.values(), new], key=lambda each: each.ggml_id)
    _formats.clear()
    _formats.update((each.name, each) for each in everything)
    _with_id[new.ggml_id] = new
    return new


def format_named(name: str | Format) -> Format:
    """The format of that name.

    Raises:
        UnknownFormatError: there is none.
    """
    if isinstance(name, Format):
        return name
    found = _formats.get(name)
    if found is None:
        near = difflib.get_close_matches(str(name).upper(), _formats, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownFormatError(f"unknown format {name!r}.{hint} Known formats: {', '.join(_formats)}")
    return found


def format_with_id(ggml_id: int) -> Format:
    """The format that a GGUF file names by this number.

    Raises:
        UnknownFormatError: the number is unassigned, or its format was removed from GGML.
    """
    if ggml_id in _with_id:
        return _with_id[ggml_id]
    removed = " (a format that GGML has removed)" if ggml_id in REMOVED_IDS else ""
    raise UnknownFormatError(f"unknown ggml type {ggml_id}{removed}")


for _module in pkgutil.iter_modules(__path__):
    for _value in vars(import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_value, Format) and _value.name not in _formats:
            register(_value)
