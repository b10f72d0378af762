"""The output types: float16, bfloat16 and float32."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant.errors import DtypeError, shown
from numba_dequant.locks import compile_lock

NAMES = ("float16", "bfloat16", "float32")

DEFAULT = "float16"

_SPELLINGS = {
    **dict.fromkeys(("float16", "fp16", "f16", "half", "f2"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float32", "fp32", "f32", "float", "single", "f4"), "float32"),
}
"""What people call the output types. "float" is PyTorch's; Python's and NumPy's is float64, and is refused."""


def dtype_name(dtype: Any) -> str:
    """The name of an output type given by one of its names, or as a NumPy, ml_dtypes or PyTorch dtype.

    Raises:
        DtypeError: it is none of float16, bfloat16 and float32.
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
    """The NumPy dtype of an output type; bfloat16 is that of ml_dtypes."""
    kind: Any = name
    if name == "bfloat16":
        with compile_lock:  # a fork waits for the import
            import ml_dtypes

        kind = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(kind)
    return found
