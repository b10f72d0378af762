"""bfloat16 in DLPack, by which other libraries take arrays without a copy: NumPy and cuda.core do not export it."""

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
    """A NumPy array of bfloat16 that `torch.from_dlpack` and `jax.numpy.from_dlpack` take, without a copy.

    In all else it is a NumPy array. Slices, copies and results of arithmetic in bfloat16 are such arrays too; an array
    of ml_dtypes' bfloat16 becomes one by ``array.view(Bfloat16Array)``. NumPy's own ``from_dlpack`` knows no bfloat16:
    use ``numpy.asarray``.
    """

    __module__ = "numba_dequant"  # where it is public, so that pickles hold wherever it is defined

    def __dlpack__(self, **options: Any) -> Any:
        if self.dtype != numpy_dtype("bfloat16"):
            return super().__dlpack__(**options)
        bits = self.view(np.ndarray).view(np.uint16)
        try:
            capsule = bits.__dlpack__(**options)
        except TypeError:  # NumPy 1 knows only `stream`
            if options.get("copy"):
                bits = bits.copy()
            if options.get("dl_device") not in (None, self.__dlpack_device__()):
                raise BufferError("the array lies on the CPU, and is not copied elsewhere") from None
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
    """The same array, of a class that other libraries can take by DLPack whatever its dtype."""
    return array.view(Bfloat16Array) if array.dtype == numpy_dtype("bfloat16") else array


def patch_dlpack_dtype(capsule: object) -> None:
    """Correct the type in a capsule of uint16, which nobody has seen yet."""
    # The DLTensor starts the old kind of capsule; the new kind puts a version (8 bytes), a context, a deleter and flags
    # (8) before it. Within it, the type's code follows a pointer, a device (8) and the number of dimensions (4).
    name = _function("PyCapsule_GetName", ctypes.c_char_p, ctypes.py_object)(capsule)
    start = 16 + 2 * POINTER if name == b"dltensor_versioned" else 0
    address = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(capsule, name)
    code = ctypes.c_uint8.from_address(address + start + POINTER + 12)
    assert code.value == UNSIGNED
    code.value = BFLOAT


def _function(name: str, *types: Any) -> Any:
    # Not an attribute of ctypes.pythonapi: its types would be everybody's.
    return ctypes.PYFUNCTYPE(*types)((name, ctypes.pythonapi))
