"""A target for files that are loaded as tensors of PyTorch, and into its modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import structured
import torch
from choices import Choices
from common import check_said, folder
from computing import Scope
from loading import expected_of, ids_of
from operators import DTYPES, NUMPY, equal

import numba_dequant as nd
import numba_dequant.torch as nt

KINDS = {0: "Linear", 1: "Embedding", 2: "Parameter"}


def written(choices: Choices) -> tuple[bytes, Path]:
    described = structured.valid(choices, ids_of(Scope.formats))
    path = folder() / "module.gguf"
    path.unlink(missing_ok=True)
    content = described.content()
    path.write_bytes(content)
    return content, path


def module_of(choices: Choices, tensors: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, str]]:
    """A module with a place for some of the tensors, sometimes of another shape; and the names of the places."""
    module, names = torch.nn.Module(), {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if choices.one_in(5):
            continue
        shape = (*tensor.shape, 1) if choices.one_in(12) else tensor.shape
        kind = KINDS[choices.below(3)]
        device = choices.pick(["cpu", "cpu", "meta"])
        dtype = choices.pick([*DTYPES, torch.float32])
        if kind == "Parameter" or len(shape) != 2 or 0 in shape:
            place = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            module.register_parameter(f"p{number}", place)
            names[name] = f"p{number}"
        elif kind == "Linear":
            module.add_module(f"m{number}", torch.nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype))
            names[name] = f"m{number}.weight"
        else:
            module.add_module(f"m{number}", torch.nn.Embedding(*shape, device=device, dtype=dtype))
            names[name] = f"m{number}.weight"
    return module, names


def check_file(choices: Choices, content: bytes, path: Path) -> str:
    dtype, kept = choices.pick(DTYPES), choices.one_in(2)
    model = nd.open(path)
    found = nt.load_file(path, choices.pick(["cpu", "cpu", "meta"]), dtype, keep_quantized=kept)
    assert list(found) == list(model.tensors)
    for name, tensor in found.items():
        info = model.tensors[name]
        if kept and info.format.block_size > 1:
            row = info.shape[-1] // info.format.block_size * info.format.type_size
            assert tuple(tensor.shape) == (*info.shape[:-1], row)
            assert tensor.dtype is torch.uint8
        else:
            assert tuple(tensor.shape) == info.shape
        if tensor.is_meta:
            continue
        if tensor.dtype is torch.uint8:
            same = model.read(name).tobytes() if info.byte_order == "big" else raw_of(content, info)
            assert tensor.contiguous().numpy().tobytes() == same, name
        elif tensor.is_floating_point() and tensor.dtype is not torch.float64:
            equal(tensor, expected_of(content, info, NUMPY[dtype]))
    return "file"


def raw_of(content: bytes, info: Any) -> bytes:
    return content[info.offset : info.offset + info.n_bytes]


def check_module(choices: Choices, content: bytes, path: Path) -> str:
    model = nd.open(path)
    module, names = module_of(choices, dict(model.tensors))
    before = {name: (value.data_ptr(), value.dtype, value.shape) for name, value in module.state_dict().items()}
    kept = choices.one_in(2)
    dtype = choices.pick([None, *DTYPES])
    try:
        missing, unexpected = nt.load_model(module, path, names=names.get, keep_quantized=kept, dtype=dtype)
    except nd.NumbaDequantError as error:
        check_said(error)
        after = {name: (value.data_ptr(), value.dtype, value.shape) for name, value in module.state_dict().items()}
        assert after == before
        return "refused"
    assert not missing
    assert set(unexpected) == set(model.tensors) - set(names)
    state = module.state_dict()
    for name, place in names.items():
        info, value = model.tensors[name], state[place]
        assert not value.is_meta
        if isinstance(module.get_submodule(place.rpartition(".")[0]), (nt.QuantizedLinear, nt.QuantizedEmbedding)):
            assert value.dtype is torch.uint8
            value = nt.dequantize(value, info.format, torch.float32)
            equal(value, expected_of(content, info, "float32"))
        elif value.dtype in NUMPY and info.format.stored_dtype is None:
            equal(value, expected_of(content, info, NUMPY[value.dtype]))
        elif value.dtype in NUMPY:
            expected = expected_of(content, info, "float32")
            with np.errstate(all="ignore"):
                assert tuple(value.shape) == expected.shape
    return "module"


def modules(data: bytes) -> str:
    """`load_file` and `load_model` have the values of the file, or change nothing."""
    choices = Choices(data)
    content, path = written(choices)
    return (check_module if choices.one_in(2) else check_file)(choices, content, path)
