"""A `GGUFReader` for gguf-py that makes the fields of the metadata when they are looked at.

gguf-py makes two arrays per item of an array, so that the vocabulary takes most of the time in which it opens a file.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
from gguf.gguf_reader import GGUFReader as Original
from numpy.typing import NDArray

from numba_dequant.errors import GgufError
from numba_dequant.gguf.header import ByteOrder
from numba_dequant.gguf.positions import entry_positions


class Position(int):
    """The byte position of a field that has not been made yet."""


class Fields(OrderedDict[str, Any]):
    """The fields by name. A field is made by gguf-py's code when it is looked at, and kept.

    What needs all values, such as `items` and `values`, makes all fields first.
    """

    maker: GGUFReader | None = None
    """A reader of the file, whose own fields do not matter."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if type(value) is Position:
            value = self._made(value)
            self[name] = value
        return value

    def _made(self, position: Position) -> Any:
        reader: Any = copy.copy(self.maker)  # threads may be here at the same time
        reader.fields = OrderedDict()
        reader.make_fields(int(position), 1)
        (field,) = reader.fields.values()
        return field

    def get(self, name: str, default: Any = None) -> Any:
        """The field called `name`, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401  (`get` is this method)

    def copy(self) -> Any:
        """An OrderedDict of all fields."""
        return OrderedDict(self)

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce__(self) -> Any:
        return self.copy().__reduce__()


def _of_all(name: str) -> Any:
    def method(self: Fields, *others: Any, **options: Any) -> Any:
        for fields in (self, *others):
            if isinstance(fields, Fields):
                for each in fields:
                    fields[each]
        return getattr(OrderedDict, name)(self, *others, **options)

    return method


# These methods of `OrderedDict` do not call `__getitem__`.
for _name in ("items", "values", "pop", "popitem", "__eq__", "__ne__"):
    setattr(Fields, _name, _of_all(_name))

OVERRIDABLE = ("_get", "_get_str", "_get_field_parts", "_push_field", "_build_fields")


class GGUFReader(Original):
    """gguf-py's `GGUFReader`, whose `fields` are made when they are looked at."""

    fields: Any

    def _build_fields(self, offs: int, count: int) -> int:
        if any(getattr(type(self), name) is not getattr(GGUFReader, name) for name in OVERRIDABLE):
            return self.make_fields(offs, count)  # a subclass wants to see each field
        try:
            positions, end = entry_positions(self.data.view(np.ndarray), offs, int(count), self._order())
        except GgufError:
            return self.make_fields(offs, count)  # gguf-py accepts more, or has an error of its own
        if not positions.keys().isdisjoint(self.fields):
            return self.make_fields(offs, count)
        fields = Fields(self.fields)
        maker: Any = copy.copy(self)
        maker.data = self.data.view(np.ndarray)  # a part is then made in a third of the time
        fields.maker = maker
        fields.update((name, Position(position)) for name, position in positions.items())
        self.fields = fields
        return end

    def make_fields(self, offs: int, count: int) -> int:
        """Make fields at once, by gguf-py's code; returns the position after the last one."""
        end: int = super()._build_fields(offs, count)
        return end

    def _order(self) -> ByteOrder:
        is_little = (sys.byteorder == "little") == (self.byte_order == "I")
        return "little" if is_little else "big"

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> NDArray[Any]:
        # The same array as gguf-py's, by fewer steps: each view of a memory map takes microseconds.
        one = np.dtype(dtype)
        part: NDArray[Any] = self.data[offset : offset + one.itemsize * int(count)]
        order = self.byte_order if override_order is None else override_order
        one = one if order == "I" else one.newbyteorder(order)
        return part if one == part.dtype else part.view(one)
