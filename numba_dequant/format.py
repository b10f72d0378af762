"""A GGUF storage format: one declared block layout, and everything that follows from it."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from numba_dequant.bits import RUN
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DataError, OptionError, ShapeError, shown

if TYPE_CHECKING:
    from numba_dequant.explain.block_picture import BlockPicture

Dequantize: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
Decode: TypeAlias = Callable[[Any, int, int], Any]


def block_layout(**fields: str | tuple[str, int]) -> np.dtype[np.void]:
    """The fields of a block, in the order of GGML's C struct, little-endian and without padding.

    Each field is a NumPy type code, or a pair of one and a count: ``block_layout(d="f2", qs=("i1", 32))``.
    """
    described: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
    for name, kind in fields.items():
        if isinstance(kind, str):
            described.append((name, "<" + kind))
        else:
            described.append((name, "<" + kind[0], (kind[1],)))
    return np.dtype(described)


def field_offsets(layout: np.dtype[np.void]) -> tuple[int, ...]:
    """Byte position of each field within its block, in the order of the fields."""
    fields = layout.fields
    assert fields is not None
    assert layout.names is not None
    return tuple(fields[name][1] for name in layout.names)


def whole_number(thing: Any, least: int | None = None) -> int | None:
    """A whole number of any library as an int; None for anything else, for a bool, and for less than `least`."""
    found = thing
    if type(thing) is not int:
        if isinstance(thing, (bool, np.bool_, type)):
            return None
        try:
            found = operator.index(thing)
        except Exception:  # a foreign object may fail in any way when it is asked what it is
            return None
    return None if least is not None and found < least else found


def element_of(name: str, element: Any, size: int) -> int:
    """The number of an element of a block of `size`.

    Raises:
        ShapeError: it is not a whole number, or there is no such element.
    """
    found = whole_number(element)
    if found is None:
        raise ShapeError(f"element must be a whole number, got {shown(element)}")
    if not 0 <= found < size:
        raise ShapeError(f"a block of {name} has elements 0 to {size - 1}, not {shown(found)}")
    return found


@dataclass(frozen=True, eq=False)
class Format:
    """One GGUF storage format.

    Attributes:
        name: GGML's name, for example ``"Q4_K"``.
        ggml_id: the number that a GGUF file stores for it.
        block_size: elements per block; 1 for a plain array type.
        layout: the block's fields as a NumPy structured dtype, in GGML's order.
        summary: one line on what the block holds.
        dequantize: the values, written to be read: blocks of dtype `layout` and shape ``(n,)`` in,
            float32 of shape ``(n, block_size)`` out. None for a type that is returned as it is stored.
        decode: the same values, written to run fast: ``decode(block, at, run)`` gives the eight float32
            elements ``8 * run`` to ``8 * run + 7`` of the block whose bytes start at ``at``.
    """

    name: str
    ggml_id: int
    block_size: int
    layout: np.dtype[np.void] = field(repr=False)
    summary: str = field(repr=False)
    dequantize: Dequantize | None = field(default=None, repr=False)
    decode: Decode | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.summary, str):
            raise OptionError(f"a format has a name and a summary, got {shown(self.name)} and {shown(self.summary)}")
        ggml_id, block_size = whole_number(self.ggml_id, 0), whole_number(self.block_size, 1)
        if ggml_id is None or ggml_id >= 2**32:
            raise OptionError(f"{self.name}: ggml_id must be a whole number of 32 bits, got {shown(self.ggml_id)}")
        if block_size is None or (block_size != 1 and block_size % RUN):
            found = shown(self.block_size)
            raise OptionError(f"{self.name}: block_size must be 1 or a multiple of {RUN}, got {found}")
        if not isinstance(self.layout, np.dtype) or self.layout.hasobject:
            found = shown(self.layout)
            raise OptionError(f"{self.name}: layout must be a structured NumPy dtype, as of block_layout, got {found}")
        sizes = [kind[0].itemsize for kind in (self.layout.fields or {}).values()]
        if not self.layout.itemsize or sum(sizes) != self.layout.itemsize:
            raise OptionError(f"{self.name}: the layout must name its fields and leave no byte out: {self.layout}")
        if (self.dequantize is None) != (self.decode is None):
            raise OptionError(f"{self.name}: give both `dequantize` and `decode`, or neither")
        for function in (self.dequantize, self.decode):
            if function is not None and not (callable(function) and isinstance(function, Hashable)):
                raise OptionError(f"{self.name}: dequantize and decode must be functions, got {shown(function)}")
        object.__setattr__(self, "ggml_id", ggml_id)
        object.__setattr__(self, "block_size", block_size)
        _formats.setdefault(_key(self._fields), self)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.name, self.ggml_id, self.block_size, self.layout, self.summary, self.dequantize, self.decode

    def __copy__(self) -> Format:
        """The format itself: it compares by identity, and its compiled code is kept by it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Format:
        """The format itself."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Format], tuple[Any, ...]]:
        """What comes out of a pickle is the format itself.

        One that is registered is pickled by name, and by the module that registers it, which is imported where it is
        read. Any other is pickled by its fields: its functions must be importable.
        """
        from numba_dequant import formats

        if formats.FORMATS.get(self.name) is self:
            return formats.registered, (self.name, getattr(self.decode, "__module__", None))
        return _same, self._fields

    @property
    def type_size(self) -> int:
        """Bytes per block."""
        return self.layout.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Storage cost of one element, in bits."""
        return 8 * self.type_size / self.block_size

    @property
    def alignment(self) -> int:
        """Bytes to which every block of an aligned array is aligned: 1, 2, 4 or 8."""
        return math.gcd(self.type_size, 8)

    @property
    def stored_dtype(self) -> np.dtype[Any] | None:
        """NumPy dtype of a type that is returned as it is stored (integers, F64); None for all others."""
        if self.decode is not None:
            return None
        assert self.layout.fields is not None
        return self.layout[0]

    def result_dtype(self, dtype: str) -> np.dtype[Any]:
        """The NumPy dtype of the values: that of an output type, or the one they are stored in."""
        return self.stored_dtype or numpy_dtype(dtype)

    @cached_property
    def bit_map(self) -> NDArray[np.bool_]:
        """Which elements each bit of a block can change: shape (bits of a block, `block_size`).

        Bit ``8 * b + k`` is bit k of byte b, the lowest bit first. It is found by flipping bits and looking at what
        `dequantize` makes of it.

        Raises:
            ShapeError: the type has no blocks.
        """
        if self.dequantize is None or self.block_size == 1:
            raise ShapeError(f"{self.name} has no blocks: each element is stored by itself")
        from numba_dequant.explain.bit_map import bit_map

        return bit_map(self.layout, self.block_size, self.dequantize)

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """The least and the greatest value of an element where all floats of a block, its scales, are 1.

        >>> from numba_dequant import FORMATS
        >>> FORMATS["Q4_0"].value_range
        (-8.0, 7.0)

        Raises:
            ShapeError: the type has no blocks.
        """
        from numba_dequant.explain.bit_map import value_range

        bits = self.bit_map
        assert self.dequantize is not None
        return value_range(self.layout, self.block_size, self.dequantize, bits)

    def picture(self, element: int | None = None, raw: NDArray[np.uint8] | None = None) -> BlockPicture:
        """A picture of a block, and of the bits that decide one of its elements; with `raw`, of a block of these bytes.

        >>> from numba_dequant import FORMATS
        >>> print(FORMATS["Q4_0"].picture(element=17))
        Q4_0: 18 bytes for 32 elements, 4.5 bits per weight; lit: the 20 bits of element 17
          d       0-1  float16     a bit decides all elements
          qs     2-17  16 x uint8  a bit decides 1 element
        bits of element 17, the highest of a byte first:
          byte   0  ████████  d, byte 0
          byte   1  ████████  d, byte 1
          byte   3  ████····  qs[1]

        Raises:
            ShapeError: the type has no blocks, or the block has no such element.
            DataError: `raw` is not the bytes of one block.
        """
        from numba_dequant.explain import format_view

        return format_view.picture(self, element, raw)

    @property
    def text(self) -> str:
        """What is known of the format, as text: its picture, the range of its values, where it comes from."""
        from numba_dequant.explain import format_view

        return format_view.text(self)

    @property
    def description(self) -> str:
        """What the file that defines the format says of it, with the source of the layout; else the summary."""
        from numba_dequant.explain import format_view

        return format_view.description(self)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self._repr_mimebundle_()["text/html"]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from numba_dequant.explain import format_view

        return format_view.mime_bundle(self)

    def n_elements(self, n_bytes: int) -> int:
        """Elements in `n_bytes` of compressed data.

        Raises:
            DataError: `n_bytes` is not a whole number of blocks.
        """
        found = whole_number(n_bytes, 0)
        if found is None:
            raise DataError(f"n_bytes must be a whole number, 0 or more, got {shown(n_bytes)}")
        if found % self.type_size:
            raise DataError(
                f"{self.name} data comes in blocks of {self.type_size} bytes, but {shown(found)} bytes were given: "
                f"{found % self.type_size} too many. Pass whole blocks."
            )
        return found // self.type_size * self.block_size

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a tensor of `shape` (rows first) takes.

        Raises:
            ShapeError: a row is not a whole number of blocks, or an extent is not a whole number.
        """
        if not isinstance(shape, (tuple, list)) or not all(whole_number(extent, 0) is not None for extent in shape):
            raise ShapeError(f"shape must be a tuple of whole numbers, rows first, got {shown(shape)}")
        row = shape[-1] if shape else 1
        if row % self.block_size:
            raise ShapeError(
                f"a row of a {self.name} tensor is a whole number of blocks of {self.block_size} elements, "
                f"but the last dimension of shape {shape} is {row}"
            )
        return math.prod(shape) // self.block_size * self.type_size


# What every format was made of, so that a copy of it that comes out of a pickle is that format itself.
_formats: weakref.WeakValueDictionary[tuple[Any, ...], Format] = weakref.WeakValueDictionary()


def _key(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    return fields[:4] + fields[5:]


def _same(*fields: Any) -> Format:
    return _formats.get(_key(fields)) or Format(*fields)
