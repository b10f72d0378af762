"""Which tensors of a model, which rows of them, to which types: the arguments of loading, checked before it starts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from numba_dequant.arguments import Job, flag_option, output_mapping, output_type
from numba_dequant.dtypes import dtype_name
from numba_dequant.errors import (
    DtypeError,
    NumbaDequantError,
    OptionError,
    OutputError,
    ShapeError,
    TensorNotFoundError,
    shown,
)
from numba_dequant.format import Format, whole_number
from numba_dequant.gguf.file import TensorInfo

Pick = str | TensorInfo | re.Pattern[str]
"""A name or a glob, a tensor, or a compiled regular expression that is searched for."""

Select = Pick | Callable[[TensorInfo], bool] | Iterable[Pick] | None
"""One of these or several, a function, or None for all."""


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

        return dequantize(self.data, self.format, dtype, shape=self.shape, **options)


class Request(NamedTuple):
    """One tensor to load: where its bytes are, of some rows only perhaps, and what is to become of them."""

    tensor: TensorInfo
    job: Job

    def finished(self, result: Any) -> Any:
        """What the caller gets: `result`, or what stands for blocks that were kept as they are."""
        if self.job.dtype is not None:
            return result
        return QuantizedTensor(result, self.tensor.format, self.tensor.shape)

    def blame(self, error: NumbaDequantError) -> NumbaDequantError:
        """The same error, saying with which tensor of which file it is."""
        return type(error)(f"{self.tensor.path}: tensor {self.tensor.name!r}: {error}")


def request_for(tensor: TensorInfo, dtype: str | None, out: Any = None) -> Request:
    """The request for a tensor; `dtype` None keeps the bytes as they are stored."""
    shape, n_elements = ((tensor.n_bytes,), tensor.n_bytes) if dtype is None else (tensor.shape, tensor.n_elements)
    return Request(tensor, Job(None, tensor.format, dtype, shape, out, tensor.name, n_elements))


def plan_requests(
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
        OutputError: `out` is given for bytes that are kept as they are, or is not a mapping.
        OptionError: `select` or `keep_quantized` is of a wrong kind.
    """
    kept = flag_option("keep_quantized", keep_quantized)
    chosen = select_tensors(tensors, select)
    outputs = {} if out is None else output_mapping(out)
    if kept and outputs:
        raise OutputError("out cannot be combined with keep_quantized=True; drop one of them")
    names = {tensor.name for tensor in chosen}
    for name in outputs:
        if name not in names:
            raise TensorNotFoundError(f"out has an array for {shown(name)}, which is not among the tensors to load")
    type_of = dtype_resolver(dtype)
    requests = []
    for tensor in chosen:
        array = outputs.get(tensor.name)
        output = None if kept else output_type(type_of(tensor.name), None, array)
        requests.append(request_for(tensor, output, array))
    return requests


def tensor_named(tensors: Mapping[str, TensorInfo], name: Any) -> TensorInfo:
    """The tensor of that name; a `TensorInfo`, of this or another model, stands for its name.

    Raises:
        TensorNotFoundError: there is none.
    """
    if isinstance(name, TensorInfo):
        name = name.name
    if not isinstance(name, str):
        raise TensorNotFoundError(f"a tensor is named by a str or a TensorInfo, got {shown(name)}")
    return tensors[name]


def select_tensors(tensors: Mapping[str, TensorInfo], select: Select) -> list[TensorInfo]:
    """The tensors that `select` picks, in file order.

    Raises:
        TensorNotFoundError: a glob, a name or an expression picks none.
        OptionError: it is of a wrong kind.
    """
    if select is None:
        return list(tensors.values())
    if isinstance(select, (str, TensorInfo, re.Pattern)):
        picks: list[Any] = [select]
    elif callable(select) and not isinstance(select, type):
        return [tensor for tensor in tensors.values() if select(tensor)]
    else:
        if isinstance(select, (bytes, bytearray, memoryview)) or not isinstance(select, Iterable):
            raise _wrong_selection(select)
        try:
            picks = list(select)
        except TypeError:  # an array without dimensions, or a class
            raise _wrong_selection(select) from None
    picked: set[str] = set()
    for pick in picks:
        picked.update(_picked(tensors, pick))
    return [tensor for tensor in tensors.values() if tensor.name in picked]


def _picked(tensors: Mapping[str, TensorInfo], pick: Any) -> list[str]:
    if isinstance(pick, TensorInfo):
        return [tensors[pick.name].name]
    if _is_expression(pick):
        found = [name for name in tensors if pick.search(name)]
        if not found:
            raise TensorNotFoundError(f"no name of a tensor matches the expression {shown(pick.pattern)}")
        return found
    if not isinstance(pick, str):
        raise _wrong_selection(pick)
    found = [pick] if pick in tensors else fnmatch.filter(tensors, pick)
    if not found:
        if not set(pick) & set("*?["):
            tensors[pick]  # says what comes near
        raise TensorNotFoundError(f"no name of a tensor matches {shown(pick)}, in which * stands for anything")
    return found


def _is_expression(thing: object) -> bool:
    return isinstance(thing, re.Pattern) and isinstance(thing.pattern, str)


def _wrong_selection(found: Any) -> OptionError:
    return OptionError(
        "select must be a name or a glob, a TensorInfo, a compiled expression for str, several of these or a function; "
        f"got {shown(found)}"
    )


def dtype_resolver(dtype: Any) -> Callable[[str], str | None]:
    """Which output type a tensor of some name gets: one for all, or that of the first pattern that matches.

    A pattern is a glob or a compiled expression, which is searched for. None leaves the type to `output_type`.

    Raises:
        DtypeError: an output type is none, or a pattern is of a wrong kind.
    """
    if not isinstance(dtype, Mapping):
        one = None if dtype is None else dtype_name(dtype)
        return lambda name: one
    for pattern in dtype:
        if not isinstance(pattern, str) and not _is_expression(pattern):
            raise DtypeError(f"a pattern in dtype must be a glob or a compiled expression, got {shown(pattern)}")
    rules = [(pattern, None if kind is None else dtype_name(kind)) for pattern, kind in dtype.items()]

    def first_match(name: str) -> str | None:
        for pattern, kind in rules:
            if (
                pattern.search(name)
                if _is_expression(pattern)
                else fnmatch.fnmatchcase(name, pattern) or name == pattern
            ):
                return kind
        raise DtypeError(f"dtype has no pattern that matches tensor {name!r}; add one for all others: '*'")

    return first_match


def slice_rows(tensor: TensorInfo, rows: slice | None) -> TensorInfo:
    """The part of a tensor that is `rows` of its first dimension.

    Raises:
        ShapeError: `rows` is not a slice of consecutive rows, or they are not whole blocks.
    """
    if rows is None:
        return tensor
    ends = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else (rows,)
    numbers = [whole_number(end) for end in ends]
    is_wrong = any(end is not None and number is None for end, number in zip(ends, numbers, strict=True))
    if not isinstance(rows, slice) or is_wrong or numbers[2] not in (None, 1):
        raise ShapeError(f"rows is a slice of consecutive rows, such as slice(0, 100), not {shown(rows)}")
    if not tensor.shape:
        raise ShapeError(f"tensor {tensor.name!r} is a scalar, and has no rows")
    start, stop, _ = slice(*numbers).indices(tensor.shape[0])
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
