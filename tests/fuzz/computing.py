"""Targets for arrays in memory: `dequantize`, batches and products, with shapes, strides and types of all kinds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from choices import Choices
from common import check_said, patched

import numba_dequant as nd
from numba_dequant.backends import matmul
from numba_dequant.backends.devices import is_simulated
from numba_dequant.dtypes import numpy_dtype

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = ["float16", "bfloat16", "float32"]
FORMATS = list(nd.FORMATS.values())
FEW = [nd.FORMATS[name] for name in ("Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "TQ1_0", "F16", "F32", "I32", "BF16", "Q2_0")]
"""Formats that a short run compiles."""

EXTENTS = [0, 1, 2, 3, 1, 2, 5]


DEVICES = ("cuda",) if is_simulated() else ("cpu", "cpu", "reference")


class Scope:
    """Which formats the targets use, and on which devices they compute; "cuda" is Numba's simulator."""

    formats = FEW
    devices = DEVICES


def on_host(found: Any) -> Array:
    """A result as an array."""
    values: Array = found if isinstance(found, np.ndarray) else found.copy_to_host()
    return values


def blocks(choices: Choices, n_bytes: int) -> Array:
    """Bytes of blocks."""
    seed = int.from_bytes(choices.bytes(2), "little")
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


def strided(choices: Choices, array: Array) -> Array:
    """The same elements, with other strides."""
    way = choices.below(6)
    if way == 0 or not array.ndim:
        return array
    if way == 1:
        room = np.empty((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
        room[..., 1::2] = array
        return room[..., 1::2]
    if way == 2:
        return np.asfortranarray(array)
    if way == 3:
        return np.ascontiguousarray(array[::-1])[::-1]
    if way == 4:
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    raw = np.empty(array.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    return unaligned


def shape_of(choices: Choices, n_elements: int) -> tuple[int, ...] | None:
    """A shape for as many elements, mostly; None for none."""
    if choices.one_in(3):
        return None
    if choices.one_in(12):
        return choices.pick([(-1,), (-1, -1), (0, -1), (1 << 62, 0), (1 << 62, 1 << 62), (1,) * 65, (-2, 3), (7, 11)])
    extents = []
    for divisor in choices.some([2, 3, 32, 1, 256], 3):
        if n_elements and n_elements % divisor == 0:
            extents.append(divisor)
            n_elements //= divisor
    return (*extents, choices.pick([n_elements, n_elements, -1]))


def same_bits(found: Any, expected: Array) -> None:
    """Equal bit for bit; a NaN need only be a NaN."""
    values = on_host(found)
    assert values.dtype == expected.dtype, (values.dtype, expected.dtype)
    assert values.shape == expected.shape, (values.shape, expected.shape)
    bits = f"u{expected.itemsize}"
    with np.errstate(all="ignore"):
        missing = np.isnan(expected) if expected.dtype.kind not in "iu" else np.zeros(expected.shape, bool)
        assert (np.isnan(values) == missing).all() if missing.any() else True
    flat, other = np.ascontiguousarray(values).view(bits), np.ascontiguousarray(expected).view(bits)
    assert (flat[~missing] == other[~missing]).all()


def expected_values(raw: Array, fmt: Any, dtype: str) -> Array:
    """The values by `Format.dequantize`, in one dimension."""
    if fmt.stored_dtype is not None:
        return raw.view(fmt.stored_dtype).copy()
    if not raw.size:
        return np.empty(0, numpy_dtype(dtype))
    with np.errstate(all="ignore"):
        return fmt.dequantize(raw.view(fmt.layout)).reshape(-1).astype(np.float32).astype(numpy_dtype(dtype))


def output(choices: Choices, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """An array to write to, which is sometimes wrong; None for none."""
    if choices.one_in(2):
        return None
    way = choices.below(12)
    if way == 0:
        return np.empty((*shape, 1), dtype)
    if way == 1:
        return strided(choices, np.zeros(shape, dtype))
    if way == 2:
        return np.empty(shape, numpy_dtype(choices.pick(DTYPES)))
    if way == 3:
        array = np.zeros(shape, dtype)
        array.flags.writeable = False
        return array
    return np.zeros(shape, dtype)


def one(choices: Choices, dtype: str) -> tuple[tuple[Any, ...], Array | None, Array]:
    """A tensor of a batch: its entry, its `out`, and its values in one dimension."""
    fmt = choices.pick(Scope.formats)
    n_blocks = choices.pick([0, 1, 2, 3, 6, 9, 30])
    raw = blocks(choices, n_blocks * fmt.type_size)
    expected = expected_values(raw, fmt, dtype)
    shape = shape_of(choices, expected.size)
    given: Any = raw.reshape(n_blocks, -1) if choices.one_in(2) and n_blocks else raw
    given = strided(choices, given)
    if choices.one_in(10):
        cut = raw[:-1] if fmt.type_size > 1 else raw
        given = choices.pick([cut, raw.tobytes(), memoryview(given), bytearray(raw), given.view(np.int8)])
    fits = (
        shape is not None
        and 0 <= min(shape, default=0) <= max(shape, default=0) < 1 << 20
        and math.prod(shape) == expected.size
    )
    out = output(choices, shape if shape is not None and fits and len(shape) < 60 else expected.shape, expected.dtype)
    if out is not None and raw.size and choices.one_in(8):  # in the memory of the data
        room = np.zeros(raw.size + expected.nbytes + 64, np.uint8)
        start = choices.pick([0, 8, 64, raw.size // 8 * 8, -(-raw.size // 64) * 64])
        given = room[: raw.size]
        given[:] = raw
        out = room[start : start + expected.nbytes].view(expected.dtype)
    name = choices.pick([fmt.name, fmt.ggml_id, fmt, fmt.name.lower()])
    return ((given, name) if shape is None else (given, name, shape)), out, expected


def check_alone(
    choices: Choices, entry: Any, out: Array | None, expected: Array, how: tuple[str, str], *, must: bool
) -> None:
    """`dequantize` of one tensor of a batch; `must` says that the batch took it."""
    given, format_, *shape = entry
    out = out if choices.one_in(2) else None
    before = None if out is None else out.tobytes()
    options: dict[str, Any] = {"shape": shape[0] if shape else None, "out": out, "device": how[1]}
    try:
        values = nd.dequantize(given, format_, how[0], **options)
    except nd.NumbaDequantError as error:
        check_said(error)
        assert not must or out is not None
        assert out is None or out.tobytes() == before
    else:
        assert out is None or values is out
        same_bits(on_host(values).reshape(-1), expected)


def batches(data: bytes) -> str:
    """`dequantize_many`, `prepare_many` and `dequantize`: each tensor has the values that it has alone."""
    choices = Choices(data)
    dtype, device = choices.pick(DTYPES), choices.pick(Scope.devices)
    chosen = [one(choices, dtype) for _ in range(choices.below(5))]
    tensors = {number: entry for number, (entry, _, _) in enumerate(chosen)}
    outputs = {number: out for number, (_, out, _) in enumerate(chosen)}
    out = None if any(each is None for each in outputs.values()) or choices.one_in(3) else outputs
    if out and choices.one_in(6):
        out[0] = choices.pick(list(out.values()))
    before = None if out is None else {number: array.tobytes() for number, array in out.items() if array is not None}
    try:
        batch = nd.prepare_many(tensors, dtype, device=device, out=out)
    except nd.NumbaDequantError as error:
        check_said(error)
        if before is not None and out is not None:
            assert all(out[number].tobytes() == raw for number, raw in before.items())  # type: ignore[union-attr]
        found: dict[int, Any] = {}
    else:
        found = batch.run()
        assert list(found) == list(tensors)
    for number, values in found.items():
        same_bits(on_host(values).reshape(-1), chosen[number][2])
    for number, entry in tensors.items():
        check_alone(choices, entry, chosen[number][1], chosen[number][2], (dtype, device), must=bool(found))
    return "values" if found else "refused"


def numbers(choices: Choices, shape: tuple[int, ...]) -> Array:
    """Small numbers of a type that can be multiplied; sometimes of another."""
    seed = int.from_bytes(choices.bytes(2), "little")
    values = np.random.default_rng(seed).normal(0, 4, shape)
    dtype = choices.pick([*DTYPES, *DTYPES, *DTYPES, "float64", ">f4", "int8"])
    array = values.astype(numpy_dtype(dtype) if dtype in DTYPES else dtype)
    return strided(choices, array)


def products(data: bytes) -> str:
    """`matmul` is the product of the values, or refuses what does not fit."""
    choices = Choices(data)
    fmt = choices.pick(Scope.formats)
    rows, n_blocks = choices.pick([0, 1, 2, 3, 5, 17]), choices.pick([1, 1, 2, 3, 0])
    length = n_blocks * fmt.block_size
    raw = blocks(choices, rows * n_blocks * fmt.type_size)
    x_shape = (*choices.some(EXTENTS, 3), length + (choices.one_in(12) and choices.pick([1, -1, 32])))
    x = numbers(choices, tuple(max(extent, 0) for extent in x_shape))
    weight: Any = strided(choices, raw.reshape(rows, -1) if rows and n_blocks else raw)
    shape = choices.pick([(rows, length), (rows, length), None, (rows * 2, length), (length,), (-1, length)])
    packed = (weight, fmt) if shape is None else (weight, fmt, shape)
    if choices.one_in(4):
        packed = nd.QuantizedTensor(weight, fmt, shape)
    bias = numbers(choices, (rows + choices.one_in(10),)) if choices.one_in(2) else None
    dtype = choices.pick([None, *DTYPES])
    result_type = dtype or (x.dtype.name if x.dtype.name in DTYPES else "float32")
    out = output(choices, (*x.shape[:-1], rows), numpy_dtype(result_type))
    before = None if out is None else out.tobytes()
    try:
        with patched((matmul, "TILE", choices.pick([1, 300, 1 << 20]))):
            found = nd.matmul(x, packed, bias=bias, dtype=dtype, out=out, device=choices.pick(Scope.devices))
    except nd.NumbaDequantError as error:
        check_said(error)
        assert out is None or out.tobytes() == before
        return "refused"
    assert out is None or found is out
    values = expected_values(raw, fmt, "float32")
    # The last dimension of x says how long a row is.
    values = values.reshape(-1, x.shape[-1]) if x.shape[-1] else np.empty((found.shape[-1], 0), np.float32)
    assert found.shape == (*x.shape[:-1], len(values))
    assert found.dtype == numpy_dtype(result_type) or out is not None
    is_right(on_host(found), x, values, bias)
    return "values"


def is_right(found: Array, x: Array, values: Array, bias: Array | None) -> None:
    """The product agrees with one in float64, as far as float32 sums and the result's type can."""
    with np.errstate(all="ignore"):
        columns, weight = x.astype(np.float64), values.astype(np.float64)
        expected = columns @ weight.T
        size = np.abs(columns) @ np.abs(weight).T
        if bias is not None:
            expected, size = expected + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
        known = np.isfinite(size) & (size < 30000)
        error = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0}[found.dtype.name]
        allowed = error * np.abs(expected) + 1e-5 * size + 1e-7
        difference = np.abs(found.astype(np.float64) - expected)
    assert (difference <= allowed)[known].all(), float((difference - allowed)[known].max())
