"""The output types: float16, bfloat16 and float32."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from numba_dequant.errors import DtypeError
from numba_dequant.locks import compile_lock

NAMES = ("float16", "bfloat16", "float32")


def dtype_name(dtype: Any) -> str:
    """The name of an output type given by name, as a NumPy, ml_dtypes or torch dtype, or as a scalar type.

    Raises:
        DtypeError: it is none of float16, bfloat16 and float32.
    """
    if isinstance(dtype, str):
        name = dtype
    else:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = str(dtype)
    name = name.removeprefix("torch.")
    if name not in NAMES:
        raise DtypeError(f"cannot dequantize to {dtype!r}; choose one of {', '.join(NAMES)}")
    return name


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
