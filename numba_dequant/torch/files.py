"""GGUF files as PyTorch tensors, and into PyTorch modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from numba_dequant.arguments import flag_option
from numba_dequant.errors import OptionError, ShapeError, shown
from numba_dequant.formats import FORMATS
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.files import check_complete
from numba_dequant.loading.requests import Select, dtype_resolver, select_tensors
from numba_dequant.model import Model
from numba_dequant.model import open as open_model
from numba_dequant.parallel import Plan
from numba_dequant.torch.checks import DTYPES
from numba_dequant.torch.distributed import load_dtensors, load_sharded
from numba_dequant.torch.functional import resolved
from numba_dequant.torch.layers import QuantizedEmbedding, QuantizedLinear, keep_blocks
from numba_dequant.torch.loading import load, request_of, tensor_of

if TYPE_CHECKING:  # PyTorch may be built without it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Path = str | os.PathLike[str]


def load_file(
    path: Path,
    device: torch.device | str | int = "cpu",
    dtype: Any = None,
    *,
    select: Select = None,
    keep_quantized: bool = False,
    plan: Plan | Callable[[Model], Plan] | None = None,
    group: ProcessGroup | None = None,
    device_mesh: DeviceMesh | None = None,
    placements: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Load the tensors of a GGUF file, or only the part of this rank.

    >>> import numba_dequant.torch
    >>> tensors = numba_dequant.torch.load_file("model.gguf", "cuda", torch.bfloat16)  # doctest: +SKIP

    Args:
        path: a file, or the first shard of a split model.
        device: device of the tensors.
        dtype: torch.float16, torch.bfloat16 or torch.float32, or a mapping from globs to these, as for
            `Model.load_all`. None means PyTorch's default dtype. Integers and F64 keep their type.
        select: the tensors to load, as for `Model.load_all`: names, globs, expressions or a function. None means all.
        keep_quantized: keep the blocks of quantized tensors, as uint8 of shape (..., bytes per row);
            ``numba_dequant.open(path).tensors[name].format`` is their type. Other tensors are converted to `dtype`.
        plan: a `numba_dequant.parallel.Plan`, or a function that takes the `Model` and returns one. All ranks of
            `group` must call `load_file`, and each gets its part. If several ranks hold a large whole tensor, each
            reads a piece of it, and they exchange the compressed pieces; with NCCL, between their GPUs. If `path` does
            not exist on a rank, another rank reads for it.
        group: the process group of the plan; None means the default group. Without `plan`, it is an error.
        device_mesh: a mesh of one dimension. The results are DTensors on this mesh, and `device` is not used. Pass
            `placements`, too, but no `plan`.
        placements: glob -> `Shard` or `Replicate` of `torch.distributed.tensor`. The first glob that matches is used.
            Other tensors are replicated. All parts of a tensor must be equal. Parts of columns must be whole blocks.

    Returns:
        name -> tensor, in file order. On a GPU, the memory is from PyTorch's caching allocator.

    Raises:
        TensorNotFoundError, DtypeError, OptionError: an argument is wrong. Without `plan`, no tensor has been read.
        ShapeError: a tensor cannot be divided equally for `device_mesh`. No tensor has been read.
        GgufError, ReadError: the file is damaged or cannot be read.
        DeviceError: this package cannot use the GPU, it has too little memory, or another rank has failed. If PyTorch
            cannot use the device, this is a DeviceError with `plan`, and PyTorch's own error without.
    """
    if device_mesh is not None or placements is not None:
        if device_mesh is None or placements is None or plan is not None or group is not None or select is not None:
            raise OptionError("device_mesh and placements must be passed together, and without plan, group and select")
        return load_dtensors(path, dtype, device_mesh, placements, keep_quantized=keep_quantized)
    if plan is not None or group is not None:
        return load_sharded(path, device, dtype, plan, group, select=select, keep_quantized=keep_quantized)
    kept = flag_option("keep_quantized", keep_quantized)
    model = open_model(path)
    type_of = dtype_resolver(dtype)
    wanted: dict[str, torch.dtype | None] = {}
    for tensor in select_tensors(model.tensors, select):
        if kept and tensor.format.block_size > 1:
            wanted[tensor.name] = None
        else:
            output = type_of(tensor.name) or torch.get_default_dtype()
            wanted[tensor.name] = resolved(tensor.format, output)[1]
    return _load(model, wanted, torch.device(device))


def _load(model: Model, wanted: Mapping[str, torch.dtype | None], device: torch.device) -> dict[str, Tensor]:
    """Load tensors as the wanted dtypes; None keeps the blocks."""
    memory = device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")
    requests = [request_of(model.tensors[name], dtype, memory) for name, dtype in wanted.items()]
    if device.type == "meta":
        results = iter([request.finished(request.job.out) for request in requests])
    else:
        for request in requests:
            check_complete(request.tensor)
        results = load(requests, device=memory)
    return {name: tensor_of(result).to(device) for name, result in zip(wanted, results, strict=True)}


@dataclass
class _Place:
    """A parameter or a buffer of a module. If it is tied, it has several owners."""

    tensor: Tensor
    owners: list[tuple[nn.Module, str]]

    def keeps_blocks_of(self, tensor: TensorInfo) -> bool:
        """Whether all owners are layers that can have compressed weights."""
        return tensor.format.block_size > 1 and all(
            attribute == "weight"
            and (type(module) is nn.Linear or (type(module) is nn.Embedding and not module.max_norm))
            for module, attribute in self.owners
        )

    @property
    def device(self) -> torch.device:
        return torch.get_default_device() if self.tensor.is_meta else self.tensor.device


def _places(model: nn.Module) -> dict[str, _Place]:
    """Parameters and persistent buffers by name."""
    found: dict[str, _Place] = {}
    of_tensor: dict[int, _Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {
            name: each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for attribute, tensor in (module._parameters | buffers).items():
            if tensor is not None:
                place = of_tensor.setdefault(id(tensor), _Place(tensor, []))
                if not any(module is owner and attribute == name for owner, name in place.owners):
                    place.owners.append((module, attribute))
                found[f"{prefix}.{attribute}" if prefix else attribute] = place
    return found


def load_model(
    model: nn.Module,
    path: Path,
    *,
    names: Mapping[str, str] | Callable[[str], str | None] | None = None,
    keep_quantized: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[list[str], list[str]]:
    """Load a GGUF file into a module.

    Layers of the types `torch.nn.Linear` and `torch.nn.Embedding` whose tensors are quantized become `QuantizedLinear`
    and `QuantizedEmbedding`, in place. All other parameters and buffers are dequantized and replaced. Tied parameters
    stay tied. A module on the meta device needs no memory before.

    >>> import torch, numba_dequant.torch
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
    >>> names = {"token_embd.weight": "0.weight", "output.weight": "1.weight", "output.bias": "1.bias"}
    >>> missing, unexpected = numba_dequant.torch.load_model(model, "model.gguf", names=names)  # doctest: +SKIP

    Args:
        model: the module. New tensors are on the device of the old ones, or on PyTorch's default device if the old ones
            are on the meta device.
        path: a file, or the first shard of a split model.
        names: name in the file -> name in ``model.state_dict()``, as a mapping or as a function, which returns None
            for a tensor to leave out. If you omit `names`, the names must be the same.
        keep_quantized: whether weights may stay compressed.
        dtype: dtype of the dequantized parameters, and of the results of a `QuantizedEmbedding`; None means that of the
            old ones.

    Returns:
        Two lists: the names in the module for which the file has no tensor, and the names in the file that the module
        lacks or that `names` leaves out. Check that both are as you expect.

    Raises:
        ShapeError: a tensor does not have the shape of the parameter, or not the format of a compressed layer. Nothing
            has been read or changed.
        OptionError: `names` gives two tensors to one parameter, or an argument is wrong. Nothing has been read or
            changed.
        DtypeError: `dtype` is not an output type. Nothing has been read or changed.
        GgufError, ReadError: the file is damaged or cannot be read. Nothing has been changed.
        DeviceError: this package cannot use the GPU, or it has too little memory. Nothing has been changed.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, got {shown(model)}")
    file, kept = open_model(path), flag_option("keep_quantized", keep_quantized)
    translate = _translation(names)
    if dtype is not None:
        dtype = resolved("F32", dtype)[1]
    places = _places(model)
    unexpected: list[str] = []
    matched: dict[str, _Place] = {}
    taken: dict[int, str] = {}
    for tensor in file.tensors.values():
        place = places.get(translate(tensor.name) or "")
        if place is None:
            unexpected.append(tensor.name)
            continue
        _check_shape(tensor, place)
        other = taken.setdefault(id(place), tensor.name)
        if other != tensor.name:
            raise OptionError(
                f"tensors {shown(other)} and {shown(tensor.name)} are for the same parameter; give them different "
                "names, leave one out, or untie the parameters of the module"
            )
        matched[tensor.name] = place
    loaded: dict[str, Tensor] = {}
    for device in {place.device for place in matched.values()}:
        wanted = {
            name: _wanted(file.tensors[name], place, dtype, kept)
            for name, place in matched.items()
            if place.device == device
        }
        loaded |= _load(file, wanted, device)
    for name, place in matched.items():
        _replace(place, loaded[name], file.tensors[name].format.name, dtype)
    missing = [name for name, place in places.items() if id(place) not in taken]
    return missing, unexpected


def _translation(names: Any) -> Callable[[str], str | None]:
    if names is None:
        return lambda name: name
    if isinstance(names, Mapping):
        return names.get
    if not callable(names):
        raise OptionError(
            f"names must be a mapping or a function, name in the file -> name in the module, got {shown(names)}"
        )
    translate: Callable[[str], str | None] = names
    return translate


def _check_shape(tensor: TensorInfo, place: _Place) -> None:
    module, attribute = place.owners[0]
    shape = tuple(place.tensor.shape)
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)) and attribute == "weight":
        expected = FORMATS[module.qtype].n_elements(shape[1])
        if tensor.format.name != module.qtype or tensor.shape != (shape[0], expected):
            raise ShapeError(
                f"tensor {shown(tensor.name)} is {tensor.format.name} of shape {tensor.shape}, but the layer is "
                f"{module.qtype} of shape {(shape[0], expected)}; make a layer of that format and shape"
            )
    elif tensor.shape != shape:
        raise ShapeError(
            f"tensor {shown(tensor.name)} has shape {tensor.shape}, but the parameter has shape {shape}; correct names "
            "or the module"
        )


def _wanted(tensor: TensorInfo, place: _Place, dtype: torch.dtype | None, kept: bool) -> torch.dtype | None:
    """The dtype in which to load a tensor; None for blocks."""
    is_packed = isinstance(place.owners[0][0], (QuantizedLinear, QuantizedEmbedding)) and place.owners[0][1] == "weight"
    if is_packed or (kept and place.keeps_blocks_of(tensor)):
        return None
    output = dtype or place.tensor.dtype
    return resolved(tensor.format, output if output in DTYPES else torch.float32)[1]


def _replace(place: _Place, tensor: Tensor, qtype: str, dtype: torch.dtype | None) -> None:
    old = place.tensor
    is_blocks = tensor.dtype is torch.uint8 and old.dtype is not torch.uint8
    if not is_blocks:
        tensor = tensor.to((dtype or old.dtype) if old.is_floating_point() else old.dtype)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad and not is_blocks)
    for module, attribute in place.owners:
        if is_blocks:
            keep_blocks(module, tensor, qtype, dtype or old.dtype)
        elif attribute in module._parameters:
            module._parameters[attribute] = tensor
        else:
            module._buffers[attribute] = tensor
