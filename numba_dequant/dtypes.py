"""The output types, a row each, and by which names people ask for them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant import bits
from numba_dequant.errors import DtypeError, shown
from numba_dequant.locks import compile_lock


@dataclass(frozen=True)
class OutputType:
    """What there is to know of an output type. Each target of Numba adds how it rounds to it (`NumbaTarget.rounds`).

    Attributes:
        name: as NumPy, ml_dtypes and PyTorch have it.
        store: the primitive that rounds eight values and writes them.
        spellings: its other names. "float" is PyTorch's; Python's and NumPy's is float64, and is refused.
        store_in_pairs: the primitive for two neighbouring runs at once, where that is faster on a GPU.
        capability: the least compute capability of a GPU that can convert to it.
    """

    name: str
    store: Callable[..., None]
    spellings: tuple[str, ...]
    store_in_pairs: Callable[..., None] | None = None
    capability: tuple[int, int] = (0, 0)


OUTPUT_TYPES = {
    each.name: each
    for each in (
        OutputType("float16", bits.store_float16, ("fp16", "f16", "half", "f2")),
        OutputType("bfloat16", bits.store_bfloat16, ("bf16",), capability=(8, 0)),
        OutputType(
            "float32", bits.store_float32, ("fp32", "f32", "float", "single", "f4"), bits.store_float32_in_pairs
        ),
    )
}

NAMES = tuple(OUTPUT_TYPES)

DEFAULT = "float16"

_SPELLINGS = {spelling: name for name, each in OUTPUT_TYPES.items() for spelling in (name, *each.spellings)}


def dtype_name(dtype: Any) -> str:
    """The name of an output type given by one of its names, or as a NumPy, ml_dtypes or PyTorch dtype.

    Raises:
        DtypeError: it is none of `OUTPUT_TYPES`.
    """
    if type(dtype) is str and dtype in NAMES:
        return dtype
    try:
        hash(dtype)
    except Exception:
        raise _refused(dtype, "") from None
    return _name_of(dtype)


@lru_cache(maxsize=64)
def _name_of(dtype: Any) -> str:
    if dtype is None:
        return DEFAULT
    if isinstance(dtype, str):
        return _name_of_text(dtype)
    if isinstance(dtype, (np.dtype, type)):
        try:
            kind = np.dtype(dtype)
        except Exception:  # a foreign class may have any attribute that NumPy looks at
            raise _refused(dtype, "") from None
        if not kind.isnative:
            raise _refused(dtype, ", which is of the other byte order")
        if kind.name in NAMES:
            return str(kind.name)
        raise _refused(dtype, f", which is {kind.name}")
    try:
        text = str(dtype)
    except Exception:
        raise _refused(dtype, "") from None
    name = text.removeprefix("torch.")
    if name in NAMES and name != text:
        return name
    raise _refused(dtype, "")


def _name_of_text(text: str) -> str:
    found = re.fullmatch(r"((?:torch|np|numpy|jnp|jax\.numpy|ml_dtypes)\.)?([<>=|]?)(\w+)", text.strip().lower())
    if found is not None:
        module, order, name = found.groups()
        # np.float was Python's float, of 64 bits.
        is_double = name == "float" and module not in (None, "torch.")
        if order == (">" if sys.byteorder == "little" else "<") and name in _SPELLINGS:
            raise _refused(text, ", which is of the other byte order")
        if name in _SPELLINGS and not is_double:
            return _SPELLINGS[name]
    raise _refused(text, "")


def _refused(dtype: Any, why: str) -> DtypeError:
    return DtypeError(f"cannot dequantize to {shown(dtype)}{why}; choose one of {', '.join(NAMES)}")


@lru_cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of an output type; one that NumPy does not have is that of ml_dtypes."""
    kind: Any = name
    if not hasattr(np, name):
        with compile_lock:  # a fork waits for the import
            import ml_dtypes

        kind = getattr(ml_dtypes, name)
    found: np.dtype[Any] = np.dtype(kind)
    return found
