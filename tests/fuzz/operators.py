"""A target for the operators and functions for PyTorch, on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from choices import Choices
from common import check_said
from computing import Array, Scope, blocks, expected_values

import numba_dequant as nd
import numba_dequant.torch as nt

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NUMPY = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch will remove them
        return torch.quantize_per_tensor(torch.zeros(2, 34), 1.0, 0, torch.quint8)


def odd(choices: Choices) -> Any:
    """Something that is no tensor of blocks."""
    return choices.pick(
        [
            *(None, 5, 2.5, "odd", b"odd", [1, 2], (1, 2), {}, True, np.zeros(3), torch.float16, torch.device("cpu")),
            *(torch.zeros(()), torch.zeros(0), torch.zeros(3, 34, 2), torch.zeros(2, 17, dtype=torch.complex64).conj()),
            *(torch.zeros(2, 34, dtype=torch.bool), torch.zeros(34, device="meta"), torch.eye(34).to_sparse()),
            *(
                torch.zeros(1, dtype=torch.uint8).expand(2, 34),
                torch.zeros(2, 33, dtype=torch.uint8),
                nd.FORMATS["Q8_0"],
            ),
            *(torch.zeros(2, 34, dtype=torch.float64), torch.nn.Parameter(torch.zeros(2, 17)), torch.zeros(4, 4, 34)),
            *(
                torch.zeros(34, dtype=torch.int64),
                torch.zeros(2, 34).to(torch.float8_e4m3fn),
                1 << 70,
                -1,
                float("nan"),
            ),
            *(quantized(), torch.zeros(2, 34).t(), object()),
        ]
    )


def layout(choices: Choices, tensor: torch.Tensor) -> torch.Tensor:
    """The same elements with other strides."""
    way = choices.below(5)
    if way == 1 and tensor.dim():
        room = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        room[..., 1::2] = tensor
        return room[..., 1::2]
    if way == 2 and tensor.dim() == 2:
        return tensor.t().contiguous().t()
    if way == 3:
        room = torch.empty(tensor.numel() + 3, dtype=tensor.dtype)
        room[3:] = tensor.reshape(-1)
        return room[3:].view(tensor.shape)
    return tensor


class Case:
    """Blocks of a matrix, and their values."""

    def __init__(self, choices: Choices) -> None:
        self.fmt = choices.pick([fmt for fmt in Scope.formats if fmt.stored_dtype is None])
        self.rows, self.n_blocks = choices.pick([1, 2, 3, 0, 5]), choices.pick([1, 2, 1, 0])
        self.length = self.n_blocks * self.fmt.block_size
        self.raw = blocks(choices, self.rows * self.n_blocks * self.fmt.type_size)
        matrix = torch.from_numpy(self.raw.copy()).view(self.rows, self.n_blocks * self.fmt.type_size)
        self.data = layout(choices, matrix)

    def values(self, dtype: torch.dtype) -> Array:
        return expected_values(self.raw, self.fmt, NUMPY[dtype]).reshape(self.rows, self.length)


def equal(found: torch.Tensor, expected: Array) -> None:
    """Equal values; a NaN is equal to a NaN."""
    assert tuple(found.shape) == expected.shape, (found.shape, expected.shape)
    wide = found.detach().to(torch.float32).numpy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(wide, expected.astype(np.float32))


def with_odd(choices: Choices, arguments: dict[str, Any]) -> bool:
    """Perhaps makes one argument odd; returns whether it did."""
    if not choices.one_in(2):
        return False
    arguments[choices.pick(list(arguments))] = odd(choices)
    return True


def operators(data: bytes) -> str:
    """A function has the values of its arguments, or refuses them with an error of ours."""
    choices = Choices(data)
    name = choices.pick([call.__name__ for call in CALLS])
    call = next(call for call in CALLS if call.__name__ == name)
    try:
        return f"{name}: {call(choices)}"
    except nd.NumbaDequantError as error:
        check_said(error)
        return f"{name}: refused"


def dequantize(choices: Choices) -> str:
    case, dtype = Case(choices), choices.pick(DTYPES)
    shape = choices.pick([None, (case.rows, case.length), (-1,), case.rows * case.length, (-1, 32), torch.Size([3])])
    out = choices.pick([None, None, torch.zeros(case.rows, case.length, dtype=dtype), torch.zeros(4, dtype=dtype)])
    if out is not None and choices.one_in(3):
        out = choices.pick(
            [out.t(), out[..., None], out.to(torch.float64), out.clone().requires_grad_(), out.reshape(-1)]
        )
    arguments = {"data": case.data, "qtype": case.fmt, "dtype": dtype, "shape": shape, "out": out}
    is_odd = with_odd(choices, arguments)
    found = nt.dequantize(**arguments)
    if not is_odd:
        assert out is None or found is out
        equal(found.reshape(case.rows, case.length), case.values(dtype))
    return "values"


def get_rows(choices: Choices) -> str:
    case, dtype = Case(choices), choices.pick(DTYPES)
    shape = choices.pick([(), (0,), (1,), (3,), (2, 2), (2, 0, 3), (300,)])
    chosen = [choices.below(max(case.rows, 1)) for _ in range(min(int(np.prod(shape)), 5))] or [0]
    numbers = torch.tensor((chosen * (int(np.prod(shape)) + 1))[: int(np.prod(shape))], dtype=torch.int64).view(shape)
    wrong = choices.pick([-1, case.rows, 1 << 40, -(1 << 62)]) if choices.one_in(8) and numbers.numel() else None
    if wrong is not None:
        numbers.view(-1)[-1] = wrong
    indices = layout(choices, numbers.to(choices.pick([torch.int64, torch.int32, torch.int64])))
    arguments = {"data": case.data, "indices": indices, "qtype": case.fmt, "dtype": dtype}
    is_odd = with_odd(choices, arguments)
    try:
        found = nt.get_rows(**arguments)
    except IndexError:
        assert is_odd or wrong is not None or not case.rows
        return "out of range"
    if not is_odd:
        fits = (indices >= 0) & (indices < case.rows)
        assert bool(fits.all()), f"rows {indices} of {case.rows}"
        values = case.values(dtype)
        equal(found, values[indices.long().numpy()] if case.rows else np.empty((*shape, case.length), values.dtype))
    return "values"


def linear(choices: Choices) -> str:
    case = Case(choices)
    dtype = choices.pick([*DTYPES, torch.float64, torch.int32, torch.complex64, torch.float8_e4m3fn])
    shape = (*choices.some([1, 2, 0, 3], 3), case.length + (choices.one_in(12) and 1))
    input_ = layout(choices, (torch.arange(int(np.prod(shape))) % 17 - 8).view(shape).to(dtype))
    bias = choices.pick([None, torch.ones(case.rows, dtype=dtype), torch.ones(case.rows), torch.ones(case.rows + 1)])
    if input_.is_floating_point() and choices.one_in(3):
        input_.requires_grad_(requires_grad=True)
    arguments = {"input": input_, "weight": case.data, "qtype": case.fmt, "bias": bias}
    is_odd = with_odd(choices, arguments)
    found = nt.linear(**arguments)
    if is_odd:
        return "values"
    assert tuple(found.shape) == (*shape[:-1], case.rows)
    if dtype in (torch.float32, torch.float64):
        with np.errstate(all="ignore"):
            columns, weight = input_.detach().double().numpy(), case.values(torch.float32).astype(np.float64)
            added = 0 if bias is None else bias.double().numpy()
            expected, size = columns @ weight.T + added, np.abs(columns) @ np.abs(weight).T + 1
            known = np.isfinite(size) & (size < 1e30)
            wrong = np.abs(found.detach().double().numpy() - expected) > 1e-5 * size
        assert not wrong[known].any()
    if found.requires_grad:
        found.sum().backward()
        assert input_.grad is not None
        assert input_.grad.shape == input_.shape
    return "values"


def mul_mat_id(choices: Choices) -> str:
    case = Case(choices)
    experts, n, k = choices.pick([1, 2, 3, 0]), choices.pick([0, 1, 2, 5]), choices.pick([1, 2, 0])
    weight = case.data.contiguous().expand(experts, *case.data.shape) if experts else case.data.new_empty(0, 2, 34)
    input_ = (torch.arange(n * case.length) % 5).view(n, case.length).float()
    ids = torch.tensor([choices.below(max(experts, 1)) for _ in range(n * k)], dtype=torch.int64).view(n, k)
    if ids.numel() and choices.one_in(6):
        ids[-1, -1] = choices.pick([-1, experts, 1 << 50])
    arguments = {"blocks": weight, "x": input_, "ids": ids, "ggml_type": case.fmt.ggml_id, "out_features": case.rows}
    is_odd = with_odd(choices, arguments)
    found = nt.ggml.mul_mat_id(**arguments)
    if is_odd or not experts:
        return "values"
    assert tuple(found.shape) == (n, k, case.rows)
    assert n * k == 0 or int(ids.max()) < experts
    with np.errstate(all="ignore"):
        values = case.values(torch.float32).astype(np.float64)
        expected = input_.double().numpy() @ values.T
        size = np.abs(input_.double().numpy()) @ np.abs(values).T + 1
        known = np.isfinite(size) & (size < 1e30)
        wrong = np.abs(found.double().numpy() - expected[:, None]) > 1e-5 * size[:, None]
    assert not (wrong & known[:, None]).any()
    return "values"


CALLS = [dequantize, get_rows, linear, mul_mat_id]
