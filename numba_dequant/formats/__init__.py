"""The registry: every `Format` that a module of this folder defines, found by scanning the folder."""

from __future__ import annotations

import difflib
import enum
import pkgutil
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from types import MappingProxyType
from typing import Any

from numba_dequant.errors import OptionError, UnknownFormatError, shown, warn_once
from numba_dequant.format import Format, whole_number
from numba_dequant.locks import compile_lock

_formats: dict[str, Format] = {}
_with_id: dict[int, Format] = {}

FORMATS: Mapping[str, Format] = MappingProxyType(_formats)
"""Every known format by name, ordered by ggml id."""

REMOVED_IDS = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Ids of formats that GGML has removed."""

# Source: enum ggml_type of the llama.cpp fork that microsoft/BitNet has been built on (Eddie-Wang1120/llama.cpp, its
# ggml.h); 36 is also in the ggml.h of ik_llama.cpp, which reads such files.
BITNET_IDS = {36: "I2_S", 37: "I8_S", 38: "TL1"}
"""Ids of the formats of Microsoft's BitNet."""

# Source: enum ggml_type of ggml/include/ggml.h in ikawrakow/ik_llama.cpp, commit 8337e4cd.
IK_LLAMA_IDS = {
    97: "Q8_0_X4 Q8_1_X4 Q8_2_X4",
    133: "Q6_0 IQ1_BN IQ2_BN Q8_K64 IQ2_K IQ3_K IQ4_K IQ5_K IQ6_K IQ2_TN IQ1_TN IQ4_KS IQ2_KS IQ4_KSS Q8_K16 Q8_K32 "
    "Q8_KR8 Q8_K128 Q8_KV IQ5_KS IQ2_KT IQ3_KT IQ4_KT IQ3_KS IQ2_KL IQ1_KT",
    202: "Q4_0_R8",
    206: "Q5_0_R4",
    208: "Q8_0_R8",
    210: "Q2_K_R4 Q3_K_R4 Q4_K_R4 Q5_K_R4 Q6_K_R4",
    216: "IQ2_XXS_R4 IQ2_XS_R4 IQ3_XXS_R4 IQ1_S_R4 IQ4_NL_R4 IQ3_S_R4 IQ2_S_R4 IQ4_XS_R8",
    229: "IQ1_M_R4 BF16_R16",
    233: "Q6_0_R4",
    335: "IQ2_BN_R4",
    337: "IQ2_K_R4 IQ3_K_R4 IQ4_K_R4 IQ5_K_R4",
    344: "IQ4_KS_R4",
    352: "IQ5_KS_R4 MXFP4_R8",
    397: "Q8_K_R16 Q8_KV_R8 Q8_K_R8",
}
"""Formats of ik_llama.cpp, a fork of llama.cpp. Each key is the id of the first name; the others follow it."""


def register(new: Format) -> Format:
    """Add a format to `FORMATS`. It then works like a built-in one.

    Raises:
        OptionError: `new` is not a `Format`, or its name (ignoring case) or its ggml id is taken.
    """
    if not isinstance(new, Format):
        raise OptionError(f"register takes a Format, got {shown(new)}")
    for known in _formats.values():
        if known.name.upper() == new.name.upper() or known.ggml_id == new.ggml_id:
            raise OptionError(
                f"{new.name} (ggml id {new.ggml_id}) clashes with {known.name} (ggml id {known.ggml_id}); "
                "choose another name or id"
            )
    everything = sorted([*_formats.values(), new], key=lambda each: each.ggml_id)
    _formats.clear()
    _formats.update((each.name, each) for each in everything)
    _with_id[new.ggml_id] = new
    return new


ENTRY_POINTS = "numba_dequant.formats"
"""The entry point group by which installed packages add formats. Each entry point names a `Format`, or a module that
registers formats when it is imported. They are loaded at the first unknown name or id."""

_plugins_are_loaded = False


def _load_plugins() -> None:
    """Register the formats of installed packages, once. A package that fails causes a warning."""
    global _plugins_are_loaded  # noqa: PLW0603 set first, because a plugin may look up a format
    with compile_lock:  # other threads wait until the formats are registered
        if _plugins_are_loaded:
            return
        _plugins_are_loaded = True
        from importlib.metadata import entry_points  # takes as long as a third of `import numba_dequant`

        for each in entry_points(group=ENTRY_POINTS):
            try:
                plugin = each.load()
                if isinstance(plugin, Format) and _formats.get(plugin.name) is not plugin:
                    register(plugin)
            except Exception as error:
                warn_once(f"the formats of {each.value!r} are not registered: {type(error).__name__}: {error}")


def registered(name: str, module: str | None) -> Format:
    """The format called `name`, for `pickle`. If it is unknown, import `module`, which registers it.

    Raises:
        UnknownFormatError: no such format is registered.
    """
    if name not in _formats and module is not None:
        with suppress(ImportError):
            import_module(module)
    return format_named(name)


def format_named(name: Any) -> Format:
    """The format with this name (ignoring case), ggml id, or member of gguf-py's GGMLQuantizationType.

    Raises:
        UnknownFormatError: there is no such format.
    """
    if type(name) is str:
        fmt = _formats.get(name)
        if fmt is not None:
            return fmt
    if isinstance(name, Format):
        return name
    if isinstance(name, str):
        return _format_spelled(name, name)
    ggml_id = whole_number(name)
    if ggml_id is None and isinstance(name, enum.Enum):
        ggml_id = whole_number(name.value)
    if ggml_id is None:
        raise UnknownFormatError(f"format must be a name such as 'Q8_0', a ggml id or a Format, got {shown(name)}")
    if isinstance(name, enum.Enum):
        # LlamaFileType is an enum too, but its numbers are file types, not ggml ids.
        if "MOSTLY_" in name.name.upper() or _type_of_files(name.name) is not None:
            return _format_spelled(name.name, name)
        named = _spelled(name.name)
        if named is not None and named.ggml_id != ggml_id:
            raise UnknownFormatError(
                f"{shown(name)} has the name of {named.name}, whose ggml id is {named.ggml_id}, not {shown(ggml_id)}; "
                "pass the name or the id"
            )
    if not 0 <= ggml_id < 2**32:
        raise UnknownFormatError(
            f"a ggml id is a number from 0 to 2**32 - 1, got {shown(ggml_id)}; pass the id or the name of a format"
        )
    return format_with_id(ggml_id)


def _spelled(text: str) -> Format | None:
    """The format with this name, ignoring case, surrounding blanks, and the prefix of GGML's enum."""
    upper = text.strip().upper().removeprefix("GGML_TYPE_").removeprefix("GGMLQUANTIZATIONTYPE.")
    fmt = _formats.get(upper)
    if fmt is None:
        _load_plugins()
    return fmt or next((known for known in _formats.values() if known.name.upper() == upper), None)


def _format_spelled(text: str, given: Any) -> Format:
    fmt = _spelled(text)
    if fmt is not None:
        return fmt
    usual = _type_of_files(text)
    if usual is not None:
        raise UnknownFormatError(
            f"{shown(given)} is a file type. Most tensors of such a file are {usual.name}, but others differ. Pass the "
            f"type of the tensor itself, such as {usual.name!r}"
        )
    upper = text.strip().upper()[:40]
    if re.fullmatch("[0-9]{1,9}", upper) and int(upper) in _with_id:
        raise UnknownFormatError(f"unknown format {shown(given)}. Pass a ggml id as an int: {int(upper)}")
    near = difflib.get_close_matches(upper.removeprefix("GGML_TYPE_"), _formats, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownFormatError(f"unknown format {shown(given)}.{hint} Known formats: {', '.join(_formats)}")


_FILE_TYPES = {"MOSTLY_IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "Q8_K_XL": "Q8_0"}
"""File types whose name differs from the format of most of their tensors."""


def _type_of_files(text: str) -> Format | None:
    """The format of most tensors in a file of this llama.cpp file type; None if it is not a file type."""
    upper = text.strip().upper().removeprefix("LLAMA_FTYPE_")
    match = re.fullmatch("(UD-)?(MOSTLY_|ALL_)?(.+?)(_XS|_S|_M|_L|_XL|_MOE)?", upper)
    if match is None:
        return None
    prefix, mostly, name, size = match.groups()
    whole = name + (size or "")
    if whole in _formats and not prefix and not mostly:
        return None
    known = _FILE_TYPES.get((mostly or "") + whole) or _FILE_TYPES.get(whole)
    return _formats.get(known or (whole if whole in _formats else name))


def format_with_id(ggml_id: int) -> Format:
    """The format with this ggml id, as GGUF files store it.

    Raises:
        UnknownFormatError: the id is unknown, or GGML has removed its format.
    """
    if ggml_id not in _with_id:
        _load_plugins()
    if ggml_id in _with_id:
        return _with_id[ggml_id]
    raise UnknownFormatError(f"unknown ggml type {ggml_id}{_origin(ggml_id)}")


def _origin(ggml_id: int) -> str:
    """Which project uses an unknown id, if one is known, and what to do."""
    removed, bitnet = REMOVED_IDS.get(ggml_id), BITNET_IDS.get(ggml_id)
    if bitnet:
        return (
            f" ({bitnet} of Microsoft's BitNet, which only its own programs read; or, in files of 2024, {removed}, "
            "which GGML has removed: quantize the model again)"
        )
    if removed:
        return f" ({removed}, a format that GGML has removed: quantize the model again)"
    for first, names in IK_LLAMA_IDS.items():
        listed = names.split()
        if first <= ggml_id < first + len(listed):
            name = listed[ggml_id - first]
            return f" ({name} of ik_llama.cpp, a fork of llama.cpp; only programs made for that fork read it)"
    return "; install a newer numba_dequant, or register a Format with this id"


for _module in pkgutil.iter_modules(__path__):
    if _module.name.startswith("_"):
        continue
    for _value in vars(import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_value, Format) and _value.name not in _formats:
            register(_value)

_BUILT_IN = frozenset(_formats.values())

PASSED_ON = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Formats that store an output type."""


def is_built_in(fmt: Format) -> bool:
    """Whether a format is part of this package, so that its compiled code depends on this package alone."""
    return fmt in _BUILT_IN and getattr(fmt.decode, "__module__", "").startswith(f"{__name__}.")


def is_passed_on(fmt: Format, dtype: str) -> bool:
    """Whether a format stores its elements as `dtype`, so that they are only copied."""
    return PASSED_ON.get(fmt.name) == dtype and is_built_in(fmt)
