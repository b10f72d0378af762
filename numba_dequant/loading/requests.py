"""Checks of the arguments of a load: tensors, rows, output types and outputs."""

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
    ShapeError,
    TensorNotFoundError,
    shown,
)
from numba_dequant.format import Format, whole_number
from numba_dequant.gguf.file import TensorInfo

Pick = str | TensorInfo | re.Pattern[str]
"""A name or a glob, a tensor, or a compiled regular expression (used with `search`)."""

Select = Pick | Callable[[TensorInfo], bool] | Iterable[Pick] | None
"""One pick, several picks, a function, or None for all tensors."""


class QuantizedTensor(NamedTuple):
    """A compressed tensor as in the file. It is also a valid entry for `dequantize_many`.

    Attributes:
        data: the blocks: the `out` of the load, or a NumPy array or a `DeviceTensor`; uint8, with one dimension.
        format: the storage format.
        shape: the shape of the values, rows first.
    """

    data: Any
    format: Format
    shape: tuple[int, ...]

    def dequantize(self, dtype: Any = "float16", **options: Any) -> Any:
        """Dequantize the tensor.

        Args:
            dtype: as for `numba_dequant.dequantize`.
            options: `device`, `out`, `stream` and `mapping`, as for `numba_dequant.dequantize`.

        Returns:
            A result as from `numba_dequant.dequantize`, of the shape of the tensor.

        Raises:
            NumbaDequantError: as for `numba_dequant.dequantize`.
        """
        from numba_dequant.api import dequantize

        return dequantize(self.data, self.format, dtype, shape=self.shape, **options)


class Request(NamedTuple):
    """One tensor, or a slice of its rows, to load, and the job for its bytes."""

    tensor: TensorInfo
    job: Job

    def finished(self, result: Any) -> Any:
        """The result for the caller: `result`, or a `QuantizedTensor` with it."""
        if self.job.dtype is not None:
            return result
        return QuantizedTensor(result, self.tensor.format, self.tensor.shape)

    def blame(self, error: NumbaDequantError) -> NumbaDequantError:
        """The same error, with the path and the name of the tensor in its message."""
        return type(error)(f"{self.tensor.path}: tensor {shown(self.tensor.name)}: {error}")


def request_for(tensor: TensorInfo, dtype: str | None, out: Any = None) -> Request:
    """The request for a tensor; `dtype` None keeps it compressed."""
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
    """The requests of a load, in file order.

    Raises:
        TensorNotFoundError: a name or a pattern in `select` matches no tensor, or `out` has an array for a tensor that
            is not loaded.
        DtypeError: an output type does not exist, a pattern in `dtype` has a wrong type, or no pattern matches a
            tensor.
        OutputError: `out` is not a mapping.
        OptionError: `select` or `keep_quantized` has a wrong type.
    """
    kept = flag_option("keep_quantized", keep_quantized)
    chosen = select_tensors(tensors, select)
    outputs = {} if out is None else output_mapping(out)
    names = {tensor.name for tensor in chosen}
    for name in outputs:
        if name not in names:
            raise TensorNotFoundError(
                f"out has an array for {shown(name)}, which is not among the tensors to load; remove it"
            )
    type_of = dtype_resolver(dtype)
    requests = []
    for tensor in chosen:
        array = outputs.get(tensor.name)
        output = None if kept else output_type(type_of(tensor.name), None, array)
        requests.append(request_for(tensor, output, array))
    return requests


def tensor_named(tensors: Mapping[str, TensorInfo], name: Any) -> TensorInfo:
    """The tensor with a name, or with the name of a `TensorInfo`, which may be from another model.

    Raises:
        TensorNotFoundError: there is no such tensor.
    """
    if isinstance(name, TensorInfo):
        name = name.name
    if not isinstance(name, str):
        raise TensorNotFoundError(f"the name of a tensor must be a str or a TensorInfo, got {shown(name)}")
    return tensors[name]


def select_tensors(tensors: Mapping[str, TensorInfo], select: Select) -> list[TensorInfo]:
    """The tensors that `select` matches, in file order.

    Raises:
        TensorNotFoundError: a name, a glob or an expression matches no tensor.
        OptionError: `select` has a wrong type.
    """
    if select is None:
        return list(tensors.values())
    if isinstance(select, (str, TensorInfo, re.Pattern)):
        picks: list[Any] = [select]
    elif callable(select) and not isinstance(select, type):
        return [tensor for tensor in tensors.values() if select(tensor)]
    else:
        if isinstance(select, (bytes, bytearray, memoryview)):  # their items are numbers
            raise _wrong_selection(select)
        try:
            picks = list(select)  # type: ignore[arg-type]
        except (TypeError, RuntimeError) as error:  # nothing with items, such as a number, a class, or a nested tensor
            raise _wrong_selection(select) from error
    picked: set[str] = set()
    for pick in picks:
        picked.update(_picked(tensors, pick))
    return [tensor for tensor in tensors.values() if tensor.name in picked]


def _picked(tensors: Mapping[str, TensorInfo], pick: Any) -> list[str]:
    if isinstance(pick, TensorInfo):
        return [tensors[pick.name].name]
    if _is_expression(pick):
        names = [name for name in tensors if pick.search(name)]
        if not names:
            raise TensorNotFoundError(
                f"no tensor name matches the expression {shown(pick.pattern)}; model.tensors has the names"
            )
        return names
    if not isinstance(pick, str):
        raise _wrong_selection(pick)
    names = [pick] if pick in tensors else fnmatch.filter(tensors, pick)
    if not names:
        if not set(pick) & set("*?["):
            tensors[pick]  # raises an error that suggests a similar name
        raise TensorNotFoundError(f"no tensor name matches the glob {shown(pick)}; model.tensors has the names")
    return names


def _is_expression(pattern: object) -> bool:
    return isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)


def _wrong_selection(select: Any) -> OptionError:
    return OptionError(
        "select must be a name or a glob, a TensorInfo, a compiled expression for str, several of these or a function; "
        f"got {shown(select)}"
    )


def dtype_resolver(dtype: Any) -> Callable[[str], str | None]:
    """A function from a tensor name to its output type, which is `dtype` or that of the first matching pattern.

    A pattern is a glob or a compiled expression. The type may be None; see `output_type`.

    Raises:
        DtypeError: an output type does not exist, or a pattern has a wrong type.
    """
    if not isinstance(dtype, Mapping):
        common = None if dtype is None else dtype_name(dtype)
        return lambda name: common
    for pattern in dtype:
        if not isinstance(pattern, str) and not _is_expression(pattern):
            raise DtypeError(f"a pattern in dtype must be a glob or a compiled expression, got {shown(pattern)}")
    rules = [(pattern, None if output is None else dtype_name(output)) for pattern, output in dtype.items()]

    def first_match(name: str) -> str | None:
        for pattern, output in rules:
            if (
                pattern.search(name)
                if _is_expression(pattern)
                else fnmatch.fnmatchcase(name, pattern) or name == pattern
            ):
                return output
        raise DtypeError(
            f"dtype has no pattern that matches tensor {shown(name)}; add the pattern '*' for all other tensors"
        )

    return first_match


def slice_rows(tensor: TensorInfo, rows: slice | None) -> TensorInfo:
    """The part of a tensor with the slice `rows` of its first dimension.

    Raises:
        ShapeError: `rows` is not a slice of consecutive rows, or not of whole blocks, or the tensor is a scalar.
    """
    if rows is None:
        return tensor
    ends = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else (rows,)
    numbers = [whole_number(end) for end in ends]
    is_wrong = any(end is not None and number is None for end, number in zip(ends, numbers, strict=True))
    if not isinstance(rows, slice) or is_wrong or numbers[2] not in (None, 1):
        raise ShapeError(f"rows must be a slice of consecutive rows, such as slice(0, 100), got {shown(rows)}")
    if not tensor.shape:
        raise ShapeError(f"tensor {shown(tensor.name)} is a scalar and has no rows; omit rows")
    start, stop, _ = slice(*numbers).indices(tensor.shape[0])
    stop = max(start, stop)
    row = tensor.n_elements // tensor.shape[0] if tensor.shape[0] else 0
    block = tensor.format.block_size
    if row * start % block or row * stop % block:
        raise ShapeError(
            f"rows {start} to {stop} of tensor {shown(tensor.name)}, {tensor.shape}, are not whole blocks of {block} "
            "values; pass rows that are"
        )
    n_elements = row * (stop - start)
    return tensor._replace(
        shape=(stop - start, *tensor.shape[1:]),
        offset=tensor.offset + row * start // block * tensor.format.type_size,
        n_bytes=n_elements // block * tensor.format.type_size,
        n_elements=n_elements,
    )


def cut(tensor: TensorInfo, n_elements: int) -> list[TensorInfo]:
    """Consecutive slices of a tensor, as flat tensors of `n_elements` each, or fewer in the last one.

    `n_elements` must be a multiple of the block size. A tensor without elements has no slices.
    """
    flat = tensor._replace(shape=(tensor.n_elements,))
    starts = range(0, tensor.n_elements, n_elements)
    return [slice_rows(flat, slice(start, start + n_elements)) for start in starts]
