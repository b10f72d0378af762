"""DLPack export of bfloat16, which NumPy and cuda.core do not support."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_dequant.dtypes import numpy_dtype

UNSIGNED, BFLOAT = 1, 4
"""Type codes of DLPack."""

POINTER = ctypes.sizeof(ctypes.c_void_p)


class Bfloat16Array(np.ndarray[Any, Any]):
    """A NumPy array of bfloat16 that `torch.from_dlpack` and `jax.numpy.from_dlpack` accept without a copy.

    Slices, copies and bfloat16 results of arithmetic have this class too. ``array.view(Bfloat16Array)`` converts an
    array with ml_dtypes' bfloat16. NumPy's own ``from_dlpack`` does not support bfloat16; use ``numpy.asarray``.
    """

    __module__ = "numba_dequant"  # the public name, so that pickles do not depend on this file

    def __dlpack__(self, **options: Any) -> Any:
        if self.dtype != numpy_dtype("bfloat16"):
            return super().__dlpack__(**options)
        bits = self.view(np.ndarray).view(np.uint16)
        try:
            capsule = bits.__dlpack__(**options)
        except TypeError:  # NumPy 1 accepts only `stream`
            if options.get("copy"):
                bits = bits.copy()
            if options.get("dl_device") not in (None, self.__dlpack_device__()):
                raise BufferError(
                    "the array is on the CPU and cannot be exported to another device; copy it there first"
                ) from None
            capsule = bits.__dlpack__(stream=options.get("stream"))
        patch_dlpack_dtype(capsule)
        return capsule

    def __array_wrap__(self, array: NDArray[Any], context: Any = None, return_scalar: bool = False) -> Any:
        if array is self:
            return array
        if return_scalar or not array.ndim:
            return array[()]
        return array.view(Bfloat16Array if array.dtype == numpy_dtype("bfloat16") else np.ndarray)

    def __repr__(self) -> str:
        return repr(self.view(np.ndarray))


def shareable(array: NDArray[Any]) -> NDArray[Any]:
    """The same array, as a `Bfloat16Array` if its dtype is bfloat16, so that DLPack can export it."""
    return array.view(Bfloat16Array) if array.dtype == numpy_dtype("bfloat16") else array


def patch_dlpack_dtype(capsule: object) -> None:
    """Change the dtype in an unused capsule from uint16 to bfloat16."""
    # An unversioned capsule begins with the DLTensor. In a versioned one, a version (8 bytes), a context, a deleter and
    # flags (8) precede it. In a DLTensor, a pointer, a device (8) and the number of dimensions (4) precede the code.
    name = _function("PyCapsule_GetName", ctypes.c_char_p, ctypes.py_object)(capsule)
    start = 16 + 2 * POINTER if name == b"dltensor_versioned" else 0
    address = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(capsule, name)
    code = ctypes.c_uint8.from_address(address + start + POINTER + 12)
    assert code.value == UNSIGNED
    code.value = BFLOAT


def _function(name: str, *types: Any) -> Any:
    # An attribute of ctypes.pythonapi would change the argument types for the whole process.
    return ctypes.PYFUNCTYPE(*types)((name, ctypes.pythonapi))
