"""The output types, and their names in Python libraries."""

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
    """An output type. Rounding to it is in `ROUNDS` of `kernels/intrinsics.py`, or in `NumbaTarget.rounds` of a target.

    Attributes:
        name: the name in NumPy, ml_dtypes and PyTorch.
        store: the primitive that rounds and stores eight values.
        spellings: other names. "float" is PyTorch's name; np.float and Python's float are float64, and are refused.
        store_in_pairs: a primitive that stores two neighbouring runs, if that is faster on a GPU.
        capability: the minimum compute capability of a GPU that converts to this type.
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

PRODUCT_TYPES = ("float16", "bfloat16", "float32")
"""The types of the activations and of the bias of a product."""

DEFAULT = "float16"

_SPELLINGS = {spelling: name for name, each in OUTPUT_TYPES.items() for spelling in (name, *each.spellings)}


def dtype_name(dtype: Any) -> str:
    """The name of an output type that is given as a name or as a NumPy, ml_dtypes or PyTorch dtype.

    None means `DEFAULT`.

    Raises:
        DtypeError: `dtype` is not one of `OUTPUT_TYPES`.
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
            numpy_type = np.dtype(dtype)
        except Exception:  # a foreign class may raise any exception
            raise _refused(dtype, "") from None
        if not numpy_type.isnative:
            raise _refused(dtype, ", which has the wrong byte order")
        if numpy_type.name in NAMES:
            return str(numpy_type.name)
        raise _refused(dtype, f", which is {numpy_type.name}")
    try:
        text = "" if hasattr(dtype, "shape") else str(dtype)  # an array has none: its values may be in freed memory
    except Exception:
        raise _refused(dtype, "") from None
    name = text.removeprefix("torch.")
    if name in NAMES and name != text:
        return name
    raise _refused(dtype, "")


def _name_of_text(text: str) -> str:
    match = re.fullmatch(r"((?:torch|np|numpy|jnp|jax\.numpy|ml_dtypes)\.)?([<>=|]?)(\w+)", text.strip().lower())
    if match is not None:
        module, order, name = match.groups()
        # np.float was Python's float, which has 64 bits.
        is_double = name == "float" and module not in (None, "torch.")
        if order == (">" if sys.byteorder == "little" else "<") and name in _SPELLINGS:
            raise _refused(text, ", which has the wrong byte order")
        if name in _SPELLINGS and not is_double:
            return _SPELLINGS[name]
    raise _refused(text, "")


def _refused(dtype: Any, why: str) -> DtypeError:
    return DtypeError(f"cannot dequantize to {shown(dtype)}{why}; choose one of {', '.join(NAMES)}")


@lru_cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of an output type, from ml_dtypes if NumPy does not have it."""
    scalar_type: Any = name
    if not hasattr(np, name):
        with compile_lock:  # a fork waits for the import
            import ml_dtypes

        scalar_type = getattr(ml_dtypes, name)
    dtype: np.dtype[Any] = np.dtype(scalar_type)
    return dtype
