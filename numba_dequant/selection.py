"""Which tensors of a model, which rows of them, to which types: the arguments of loading, checked before it starts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from numba_dequant.dtypes import dtype_name
from numba_dequant.errors import DtypeError, OutputError, ShapeError, TensorNotFoundError
from numba_dequant.format import Format
from numba_dequant.gguf_file import TensorInfo

Select = str | re.Pattern[str] | Callable[[TensorInfo], bool] | Iterable[str] | None
"""A glob, a compiled regular expression that is searched for, a function, several globs or names, or None for all."""


class QuantizedTensor(NamedTuple):
    """A tensor as the file stores it, ready for `dequantize`; in `dequantize_many` it can stand as it is.

    Attributes:
        data: its blocks as bytes: a NumPy array, or a `DeviceTensor`.
        format: its storage format.
        shape: rows first.
    """

    data: Any
    format: Format
    shape: tuple[int, ...]

    def dequantize(self, dtype: Any = "float16", **options: Any) -> Any:
        """The values, with the options of `numba_dequant.dequantize`."""
        from numba_dequant.api import dequantize

        return dequantize(self.data, self.format, dtype, self.shape, **options)


class Request(NamedTuple):
    """One tensor to load.

    Attributes:
        tensor: where its bytes are; of some rows only, if only they were asked for.
        dtype: the output type; None for the bytes as they are stored.
        out: the caller's array to write to, if any.
    """

    tensor: TensorInfo
    dtype: str | None
    out: Any = None


def requests(
    tensors: Mapping[str, TensorInfo],
    select: Select,
    dtype: Any,
    out: Mapping[str, Any] | None,
    *,
    keep_quantized: bool,
) -> list[Request]:
    """What is to be loaded, in file order.

    Raises:
        TensorNotFoundError: nothing has a name that was asked for, or `out` has a name that was not.
        DtypeError: an output type is none, or there is none for a tensor.
        OutputError: `out` is given for bytes that are kept as they are.
    """
    chosen = select_tensors(tensors, select)
    out = out or {}
    if keep_quantized and out:
        raise OutputError("out is for dequantized values; leave it away, or keep_quantized")
    for name in out.keys() - {tensor.name for tensor in chosen}:
        raise TensorNotFoundError(f"out has an array for {name!r}, which is not among the tensors to load")
    type_of = dtype_rule(dtype)
    return [
        Request(tensor, None if keep_quantized else type_of(tensor.name), out.get(tensor.name)) for tensor in chosen
    ]


def select_tensors(tensors: Mapping[str, TensorInfo], select: Select) -> list[TensorInfo]:
    """The tensors that `select` picks, in file order.

    Raises:
        TensorNotFoundError: a glob, a name or an expression picks none.
    """
    if select is None:
        return list(tensors.values())
    if isinstance(select, re.Pattern):
        found = [tensor for tensor in tensors.values() if select.search(tensor.name)]
        if not found:
            raise TensorNotFoundError(f"no name of a tensor matches the expression {select.pattern!r}")
        return found
    if callable(select):
        return [tensor for tensor in tensors.values() if select(tensor)]
    globs = [select] if isinstance(select, str) else list(select)
    picked: set[str] = set()
    for glob in globs:
        names = [glob] if glob in tensors else fnmatch.filter(tensors, glob)
        if not names:
            if not set(glob) & set("*?["):
                tensors[glob]  # says what comes near
            raise TensorNotFoundError(f"no name of a tensor matches {glob!r}, in which * stands for anything")
        picked.update(names)
    return [tensor for tensor in tensors.values() if tensor.name in picked]


def dtype_rule(dtype: Any) -> Callable[[str], str]:
    """Which output type a tensor of some name gets: one for all, or that of the first glob that matches.

    Raises:
        DtypeError: an output type is none.
    """
    if not isinstance(dtype, Mapping):
        one = dtype_name(dtype)
        return lambda name: one
    rules = [(glob, dtype_name(kind)) for glob, kind in dtype.items()]

    def first_match(name: str) -> str:
        for glob, kind in rules:
            if name == glob or fnmatch.fnmatchcase(name, glob):
                return kind
        raise DtypeError(f"dtype has no pattern that matches tensor {name!r}; add one for all others: '*'")

    return first_match


def rows_of(tensor: TensorInfo, rows: slice | None) -> TensorInfo:
    """The part of a tensor that is `rows` of its first dimension.

    Raises:
        ShapeError: `rows` is no slice of consecutive rows, or they are not whole blocks.
    """
    if rows is None:
        return tensor
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise ShapeError(f"rows is a slice of consecutive rows, such as slice(0, 100), not {rows!r}")
    if not tensor.shape:
        raise ShapeError(f"tensor {tensor.name!r} is a scalar, and has no rows")
    start, stop, _ = rows.indices(tensor.shape[0])
    stop = max(start, stop)
    row = tensor.n_elements // tensor.shape[0] if tensor.shape[0] else 0
    block = tensor.format.block_size
    if row * start % block or row * stop % block:
        raise ShapeError(
            f"rows {start} to {stop} of tensor {tensor.name!r}, {tensor.shape}, are not whole blocks of {block}"
        )
    n_elements = row * (stop - start)
    return tensor._replace(
        shape=(stop - start, *tensor.shape[1:]),
        offset=tensor.offset + row * start // block * tensor.format.type_size,
        n_bytes=n_elements // block * tensor.format.type_size,
        n_elements=n_elements,
    )
