"""The primitives from which every `decode` is built.

Each is a plain Python function, which can be stepped through and which runs in Numba's CUDA simulator. For the CPU
and for CUDA, `kernels/intrinsics.py` replaces the bodies with machine instructions.

`block` is a one-dimensional array of unsigned integers, and `at` is a byte offset. The item size of the array is the
alignment that the caller guarantees. Loads use it, and the plain Python bodies check it. On a GPU, a load of four or
eight bytes reads the whole words around them, so four bytes after the end of `block` must be readable, too.

A decode must follow these rules, so that it gives the same result in Python, NumPy and Numba: integers are signed
64-bit, with shifts and masks (never ``/``, ``//``, ``%``). Floats are float32: results of the functions below, or
constants made by `np.float32`. An integer is converted to a float before it multiplies a float.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import OptionError

RUN = 8
"""Elements that one call of `decode` returns."""

Function = TypeVar("Function", bound=Callable[..., Any])

shared_helpers: list[Callable[..., Any]] = []
"""Functions that decodes may call in addition to the primitives; each target compiles them."""


def helper(function: Function) -> Function:
    """Decorator: let decodes call `function`, which must follow the rules of a decode."""
    shared_helpers.append(function)
    return function


def _load(block: NDArray[Any], at: int, width: int, signed: bool) -> int:
    if at % min(width, block.itemsize):
        raise ValueError(f"misaligned load of {width} bytes at byte {at}; the array is aligned to {block.itemsize}")
    item = block.view(np.uint8)[at : at + width].tobytes()
    if len(item) != width:
        raise IndexError(f"load of {width} bytes at byte {at} exceeds the array of {block.nbytes} bytes")
    return int.from_bytes(item, "little", signed=signed)


def load_u8(block: Any, at: int) -> int:
    """One byte."""
    return _load(block, at, 1, signed=False)


def load_i8(block: Any, at: int) -> int:
    """One signed byte."""
    return _load(block, at, 1, signed=True)


def load_u16(block: Any, at: int) -> int:
    """Two bytes, little-endian."""
    return _load(block, at, 2, signed=False)


def load_u32(block: Any, at: int) -> int:
    """Four bytes, little-endian."""
    return _load(block, at, 4, signed=False)


def load_8_bytes(block: Any, at: int) -> int:
    """Eight bytes, little-endian, as one signed integer, to be masked and shifted together."""
    return _load(block, at, 8, signed=True)


def _as_float32(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def half(bits: int) -> np.float32:
    """The float16 with these 16 bits, as float32."""
    return np.float32(np.uint16(bits).view(np.float16))


def bf16(bits: int) -> np.float32:
    """The bfloat16 with these 16 bits, as float32."""
    return _as_float32(bits << 16)


def single(bits: int) -> np.float32:
    """The float32 with these 32 bits."""
    return _as_float32(bits)


def to_float(number: int) -> np.float32:
    """An integer from ``-2**31`` to ``2**31 - 1`` as a float32. Compiled code has 32 bits for it.

    Raises:
        OverflowError: the integer is out of range. Compiled code does not check this.
    """
    if not -(2**31) <= number < 2**31:
        raise OverflowError(
            f"to_float takes signed integers of 32 bits, got {number}; shift it right, or convert its bits in parts"
        )
    return np.float32(number)


def unsigned_bytes(eight: int) -> NDArray[np.float32]:
    """Eight bytes, packed in an integer, as eight float32: 0 to 255, the lowest byte first."""
    return np.array([eight & (2**64 - 1)], "<u8").view(np.uint8).astype(np.float32)


def signed_bytes(eight: int) -> NDArray[np.float32]:
    """Eight bytes, packed in an integer, as eight float32: -128 to 127, the lowest byte first."""
    return np.array([eight & (2**64 - 1)], "<u8").view(np.int8).astype(np.float32)


def centred_bytes(eight: int, centre: int) -> NDArray[np.float32]:
    """Eight unsigned bytes, packed in an integer, as eight float32, with `centre` subtracted from each.

    Raises:
        OverflowError: `centre` is not from 0 to ``2**23 - 1``. Compiled code does not check this.
    """
    if not 0 <= centre < 2**23:
        raise OverflowError(
            f"centre must be from 0 to {2**23 - 1}, got {centre}; use unsigned_bytes, and subtract the centre"
        )
    return unsigned_bytes(eight) - np.float32(centre)


def spread_bits(byte: int) -> int:
    """The eight bits of a byte, one per byte of the result, the lowest bit first."""
    return sum(((byte >> bit) & 1) << (8 * bit) for bit in range(8))


def load_8_floats(block: Any, at: int) -> NDArray[np.float32]:
    """Eight float32, from 32 bytes."""
    return np.array([single(load_u32(block, at + 4 * k)) for k in range(8)])


def load_8_halves(block: Any, at: int) -> NDArray[np.float32]:
    """Eight float16, from 16 bytes, as float32."""
    return np.array([half(load_u16(block, at + 2 * k)) for k in range(8)])


def load_8_bf16(block: Any, at: int) -> NDArray[np.float32]:
    """Eight bfloat16, from 16 bytes, as float32."""
    return np.array([bf16(load_u16(block, at + 2 * k)) for k in range(8)])


def store_float16(out: Any, index: int, values: Any, count: int) -> None:
    """Round the first `count` of eight values to float16 and store them at element `index`."""
    _store(out, index, values[:count])


def store_bfloat16(out: Any, index: int, values: Any, count: int) -> None:
    """Round the first `count` of eight values to bfloat16 and store them at element `index`."""
    _store(out, index, values[:count])


def store_float32(out: Any, index: int, values: Any, count: int) -> None:
    """Store the first `count` of eight values at element `index`."""
    _store(out, index, values[:count])


def store_float32_in_pairs(out: Any, index: int, values: Any, count: int) -> None:
    """Store eight values. Two neighbouring threads store two neighbouring runs together."""
    _store(out, index, values)


def _store(out: Any, index: int, values: Any) -> None:
    with np.errstate(all="ignore"):  # overflow to infinity is intended
        out[index : index + len(values)] = values


def copy_16_bytes(tile: Any, at: int, data: Any, start: int) -> None:
    """Copy 16 aligned bytes of `data` from byte `start` to byte `at` of `tile`."""
    tile.view(np.uint8)[at : at + 16] = data.view(np.uint8)[start : start + 16]


def copy_byte(tile: Any, at: int, data: Any, start: int) -> None:
    """Copy byte `start` of `data` to byte `at` of `tile`."""
    tile.view(np.uint8)[at] = data.view(np.uint8)[start]


def is_aligned(data: Any, start: int) -> bool:
    """Whether byte `start` of `data` lies at an address that is a multiple of 16."""
    return bool((data.ctypes.data + start) % 16 == 0)


def stop_unless(condition: bool) -> None:
    """End a kernel with a driver error if `condition` is False. Plain Python raises an IndexError instead."""
    if not condition:
        raise IndexError("an index is out of range")


class LookupTable:
    """A constant table of signed integers for decodes; it must be a global of the module that uses it.

    Raises:
        OptionError: the items are not signed integers. Compiled code would read them as such.
    """

    def __init__(self, items: NDArray[Any]) -> None:
        if items.dtype.kind != "i":
            raise OptionError(
                f"a LookupTable holds signed integers, not {items.dtype}; view the items as signed integers, and mask "
                "what `lookup` returns"
            )
        self.items = items
        self.name = f"table_{hashlib.sha256(items.dtype.str.encode() + items.tobytes()).hexdigest()[:16]}"


def lookup(table: LookupTable, index: int) -> int:
    """One item of a table."""
    return int(table.items[index])


def lookup_nibbles(table: LookupTable, eight: int) -> int:
    """Look up eight nibbles, one per byte of an integer, in a table of 16 signed bytes. The results are packed too."""
    nibbles = (eight & (2**64 - 1)).to_bytes(8, "little")
    return int.from_bytes(table.items[list(nibbles)].tobytes(), "little", signed=True)
