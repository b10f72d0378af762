"""A GGUF storage format: its block layout, and properties derived from it."""

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

from numba_dequant.bits import RUN, LookupTable
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.errors import DataError, OptionError, ShapeError, shown
from numba_dequant.halves import RUNS, Order
from numba_dequant.interop import is_freed

if TYPE_CHECKING:
    from numba_dequant.explain.block_picture import BlockPicture

Dequantize: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
Decode: TypeAlias = Callable[[Any, int, int], Any]


def block_layout(**fields: str | tuple[str, int]) -> np.dtype[np.void]:
    """A structured dtype with the fields of GGML's C struct, in order, little-endian and packed.

    Each field is a NumPy type code, or a type code and a count: ``block_layout(d="f2", qs=("i1", 32))``.
    """
    described: list[tuple[str, str] | tuple[str, str, tuple[int]]] = []
    for name, code in fields.items():
        if isinstance(code, str):
            described.append((name, "<" + code))
        else:
            described.append((name, "<" + code[0], (code[1],)))
    return np.dtype(described)


def field_offsets(layout: np.dtype[np.void]) -> tuple[int, ...]:
    """Byte offset of each field in the block, in order."""
    fields = layout.fields
    assert fields is not None
    assert layout.names is not None
    return tuple(fields[name][1] for name in layout.names)


def whole_number(thing: Any, least: int | None = None) -> int | None:
    """An integer of any library as an int; None for anything else, for a bool, and for less than `least`."""
    number = thing
    if type(thing) is not int:
        if isinstance(thing, (bool, np.bool_, type)) or is_freed(thing):
            return None
        try:
            number = operator.index(thing)
        except Exception:  # a foreign object may raise any exception
            return None
    return None if least is not None and number < least else number


def element_of(name: str, element: Any, size: int) -> int:
    """Check the index of an element in a block of `size` elements.

    Raises:
        ShapeError: it is not an integer, or out of range.
    """
    number = whole_number(element)
    if number is None:
        raise ShapeError(f"element must be a whole number, got {shown(element)}")
    if not 0 <= number < size:
        raise ShapeError(f"element must be from 0 to {size - 1} in a block of {name}, got {shown(number)}")
    return number


@dataclass(frozen=True, eq=False)
class Factors:
    """The weights of a format in the form that products use: ``scale * quants + offset * minimum``.

    The functions are written like `decode`. The tensor cores multiply the quants, which are float16, with the columns,
    and the minima, which are exact in TF32 (11 bits), with sums of the columns. The scales and the offsets multiply the
    float32 results.

    Attributes:
        quants: ``quants(block, at, run)`` returns eight float16; see `halves.py`. ``run = 4 * group + lane``, where
            ``group`` is the number of a group of 32 elements, and ``lane`` is 0 to 3. `order` says which elements of
            the group they are.
        scale: ``scale(block, at)`` returns one float32 for the block.
        order: which eight elements of a group each lane holds.
        minimum: ``minimum(block, at, number)`` returns a float32 for `minimum_size` elements of the block. None if
            there are no minima.
        minimum_size: number of elements that share a minimum, 16 or 32.
        offset: ``offset(block, at)`` returns one float32 for the block. None means 1.
        table: the table that `quants` reads with `lookup_in_tile`; None if there is none.
    """

    quants: Decode
    scale: Callable[[Any, int], Any]
    order: Order = RUNS
    minimum: Decode | None = None
    minimum_size: int = 32
    offset: Callable[[Any, int], Any] | None = None
    table: LookupTable | None = None


@dataclass(frozen=True, eq=False)
class Format:
    """One GGUF storage format.

    Attributes:
        name: GGML's name, for example ``"Q4_K"``.
        ggml_id: the number of the format in GGUF files.
        block_size: elements per block; 1 for a plain array type.
        layout: the fields of a block as a NumPy structured dtype, in GGML's order.
        summary: the contents of a block, in one line.
        dequantize: the specification: blocks of dtype `layout` and shape ``(n,)`` in, float32 of shape
            ``(n, block_size)`` out. None for a type that is returned as it is stored.
        decode: the same values, written to be compiled: ``decode(block, at, run)`` returns the eight float32
            elements ``8 * run`` to ``8 * run + 7`` of the block whose bytes start at ``at``.
        factors: the same values, as products need them. None means that products round the values of `decode` to
            float16.

    Raises:
        OptionError: a field has a wrong type or value.
    """

    name: str
    ggml_id: int
    block_size: int
    layout: np.dtype[np.void] = field(repr=False)
    summary: str = field(repr=False)
    dequantize: Dequantize | None = field(default=None, repr=False)
    decode: Decode | None = field(default=None, repr=False)
    factors: Factors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.summary, str):
            raise OptionError(f"name and summary must be strings, got {shown(self.name)} and {shown(self.summary)}")
        if not self.name.isprintable():  # it becomes the name of a function, and a NUL in it ends the compiler
            raise OptionError(f"the name of a format must be printable characters, got {shown(self.name)}")
        ggml_id, block_size = whole_number(self.ggml_id, 0), whole_number(self.block_size, 1)
        if ggml_id is None or ggml_id >= 2**32:
            raise OptionError(f"{self.name}: ggml_id must be from 0 to 2**32 - 1, got {shown(self.ggml_id)}")
        if block_size is None or (block_size != 1 and block_size % RUN):
            raise OptionError(f"{self.name}: block_size must be 1 or a multiple of {RUN}, got {shown(self.block_size)}")
        if not isinstance(self.layout, np.dtype) or self.layout.hasobject:
            got = shown(self.layout)
            raise OptionError(f"{self.name}: layout must be a structured NumPy dtype (see block_layout), got {got}")
        fields = sorted((field[1], field[0].itemsize) for field in (self.layout.fields or {}).values())
        ends = [0, *(offset + size for offset, size in fields)]
        if not self.layout.itemsize or ends != [*(offset for offset, _ in fields), self.layout.itemsize]:
            raise OptionError(f"{self.name}: layout must have named fields and no padding, got {self.layout}")
        if (self.dequantize is None) != (self.decode is None):
            raise OptionError(f"{self.name}: pass both `dequantize` and `decode`, or neither")
        if self.decode is None and (block_size != 1 or len(fields) != 1 or self.layout[0].subdtype is not None):
            raise OptionError(
                f"{self.name}: without `decode`, values are passed on as they are stored, so block_size must be 1 and "
                f"layout must have one field, which is a number; got {block_size} and {self.layout}"
            )
        for function in (self.dequantize, self.decode):
            if function is not None and not (callable(function) and isinstance(function, Hashable)):
                raise OptionError(f"{self.name}: dequantize and decode must be functions, got {shown(function)}")
        if self.factors is not None and (not isinstance(self.factors, Factors) or self.decode is None):
            got = shown(self.factors)
            raise OptionError(f"{self.name}: factors must be a Factors of a format with `decode`, got {got}")
        object.__setattr__(self, "ggml_id", ggml_id)
        object.__setattr__(self, "block_size", block_size)
        _formats.setdefault(_key(self._fields), self)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return (
            self.name, self.ggml_id, self.block_size, self.layout, self.summary, self.dequantize, self.decode,
            self.factors,
        )  # fmt: skip

    def __copy__(self) -> Format:
        """The format itself, because formats compare by identity and compiled code is cached per format."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Format:
        """The format itself."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Format], tuple[Any, ...]]:
        """Unpickling returns the format itself.

        A registered format is pickled as its name and the module that registers it, which unpickling imports. Any
        other format is pickled as its fields; its functions must be importable.
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
        """Bits per element, including scales."""
        return 8 * self.type_size / self.block_size

    @property
    def alignment(self) -> int:
        """Alignment in bytes of every block in an aligned array: 1, 2, 4 or 8."""
        return math.gcd(self.type_size, 8)

    @property
    def stored_dtype(self) -> np.dtype[Any] | None:
        """NumPy dtype of a type that is returned as it is stored (integers, F64); None for other formats."""
        if self.decode is not None:
            return None
        assert self.layout.fields is not None
        return self.layout[0]

    def result_dtype(self, dtype: str) -> np.dtype[Any]:
        """The NumPy dtype of the values: `stored_dtype` if there is one, else that of output type `dtype`."""
        return self.stored_dtype or numpy_dtype(dtype)

    @cached_property
    def bit_map(self) -> NDArray[np.bool_]:
        """Which elements each bit of a block affects: bool, shape (bits of a block, `block_size`).

        Bit ``8 * b + k`` is bit k of byte b; bit 0 is the lowest. The map is found by flipping bits and comparing the
        results of `dequantize`.

        Raises:
            ShapeError: the format has no blocks.
        """
        if self.dequantize is None or self.block_size == 1:
            raise ShapeError(
                f"{self.name} has no blocks, because each element is stored separately; choose a format of blocks"
            )
        from numba_dequant.explain.bit_map import bit_map

        return bit_map(self.layout, self.block_size, self.dequantize)

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest finite value of an element if all float fields, such as the scale, are 1.

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
        """A picture of a block. It highlights the bits of `element`, and shows the bytes `raw` if given.

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
            ShapeError: the format has no blocks, or `element` is out of range.
            DataError: `raw` is not one block as uint8.
        """
        from numba_dequant.explain import format_view

        return format_view.picture(self, element, raw)

    @property
    def text(self) -> str:
        """The picture, the range of the values and the description, as text."""
        from numba_dequant.explain import format_view

        return format_view.text(self)

    @property
    def description(self) -> str:
        """The docstring of the module of a built-in format: formula, packing, source. Otherwise the summary."""
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
        """Number of elements in `n_bytes` of compressed data.

        Raises:
            DataError: `n_bytes` is not a whole number of blocks.
        """
        number = n_bytes if type(n_bytes) is int and n_bytes >= 0 else whole_number(n_bytes, 0)
        if number is None:
            raise DataError(f"n_bytes must be a whole number, 0 or more, got {shown(n_bytes)}")
        if number % self.type_size:
            raise DataError(
                f"{self.name} data comes in blocks of {self.type_size} bytes, but {shown(number)} bytes were given: "
                f"the last {number % self.type_size} are not a whole block. Pass whole blocks."
            )
        return number // self.type_size * self.block_size

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (rows first).

        Raises:
            ShapeError: a row is not a whole number of blocks, or an extent is not an integer.
        """
        extents = [whole_number(extent, 0) for extent in shape] if isinstance(shape, (tuple, list)) else [None]
        # Integers of NumPy would wrap around in the products below.
        whole = [extent for extent in extents if extent is not None]
        if len(whole) < len(extents):
            raise ShapeError(f"shape must be a tuple of whole numbers, rows first, got {shown(shape)}")
        row = whole[-1] if whole else 1
        if row % self.block_size:
            raise ShapeError(
                f"a row of a {self.name} tensor is a whole number of blocks of {self.block_size} elements, "
                f"but the last dimension of shape {shown(tuple(whole))} is {row}"
            )
        return math.prod(whole) // self.block_size * self.type_size


# Every live format by its fields, so that unpickling returns the same object.
_formats: weakref.WeakValueDictionary[tuple[Any, ...], Format] = weakref.WeakValueDictionary()


def _key(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    # The key has neither the summary nor the factors: formats with the same `decode` have the same values.
    return fields[:4] + fields[5:7]


def _same(*fields: Any) -> Format:
    return _formats.get(_key(fields)) or Format(*fields)
