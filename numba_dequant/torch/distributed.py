"""Load GGUF files on several ranks of `torch.distributed`. Each rank reads its part, and shared tensors are read once.

No rank reads a tensor before all ranks have agreed on the file and the plan. No rank sends before all have read and
have memory for their parts, and no rank returns before all have dequantized. So an error on one rank becomes an error
on all ranks, and no rank waits for another one that has failed.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from numba_dequant.arguments import flag_option
from numba_dequant.errors import DeviceError, OptionError, ReadError, ShapeError, shown
from numba_dequant.formats import FORMATS, format_named
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.chunks import Chunk, TensorSlice
from numba_dequant.loading.files import OpenFiles, check_complete
from numba_dequant.loading.requests import dtype_resolver
from numba_dequant.model import Model
from numba_dequant.model import open as open_model
from numba_dequant.parallel import Part, Placement, Plan, Replicate, Shard, plan
from numba_dequant.parallel.placements import checked_rules
from numba_dequant.torch.functional import dequantize, resolved
from numba_dequant.torch.ranks import Ranks, Routes, Share, told

Planner = Plan | Callable[[Model], Plan]

SLAB = 4 << 20
"""Bytes that a rank reads at a time if it needs only some columns."""


def load_sharded(
    path: Any, device: Any, dtype: Any, planner: Any, group: Any, *, select: Any = None, keep_quantized: Any
) -> dict[str, Tensor]:
    """The tensors of this rank by the plan; see `load_file`. A wrong argument of one rank is an error on all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError("a plan needs a process group; call torch.distributed.init_process_group first")
    ranks = Ranks(group)
    with ranks.all_or_none("use its arguments"):
        if planner is None:
            raise OptionError(
                "group is passed without plan, so nothing says which rank holds what; pass plan, or omit group to load "
                "all tensors on this rank"
            )
        if not isinstance(planner, Plan) and not callable(planner):
            raise OptionError(f"plan must be a Plan or a function that returns one for a model, got {shown(planner)}")
        if select is not None:
            raise OptionError(
                "select cannot be combined with plan, which says which tensors each rank holds; omit select"
            )
        kept = flag_option("keep_quantized", keep_quantized)
        device = _usable(device)
        type_of = dtype_resolver(dtype)
    model, shares, hosts = _agree(ranks, path, planner)
    routes = Routes(ranks, shares, hosts, device)
    with ranks.all_or_none("read its part"):
        raw = {} if model is None else _read(model, ranks.rank, routes)
    blocks = routes.exchange(raw)
    with ranks.all_or_none("dequantize its part"):
        return {
            share.name: _values(share, blocks.pop(share.name), device, type_of, keep_quantized=kept)
            for share in shares[ranks.rank]
        }


def _usable(device: Any) -> torch.device:
    """The device as PyTorch's. Raises DeviceError if PyTorch cannot use it."""
    try:
        return torch.empty(0, device=torch.device(device)).device
    except Exception as error:  # the error depends on how PyTorch was built
        raise DeviceError(
            f"device {shown(device)} cannot be used: {told(error)}; pass 'cpu' or a device that PyTorch finds"
        ) from error


def load_dtensors(path: Any, dtype: Any, mesh: Any, placements: Any, *, keep_quantized: Any) -> dict[str, Tensor]:
    """The tensors as DTensors of a mesh; see `load_file`."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    if not isinstance(mesh, DeviceMesh):
        raise OptionError(
            f"device_mesh must be a DeviceMesh of one dimension, got {shown(mesh)}; pass the result of init_device_mesh"
        )
    if mesh.ndim != 1:
        raise OptionError(f"the mesh has {mesh.ndim} dimensions, not 1; pass one of them, such as mesh['tp']")
    group = mesh.get_group()
    with Ranks(group).all_or_none("use its arguments"):
        if not isinstance(placements, Mapping):
            raise OptionError(f"placements must be a mapping, glob -> Shard or Replicate, got {shown(placements)}")
        rules = checked_rules((pattern, _placement(pattern, given)) for pattern, given in placements.items())

    def equal_parts(model: Model) -> Plan:
        found = plan(model.tensors.values(), mesh.size(), rules)
        if found.notes:  # they say which tensors have unequal parts
            raise ShapeError(f"{found.notes[0]}, but a DTensor needs equal parts; pass plan instead of device_mesh")
        return found

    found = load_sharded(path, mesh.device_type, dtype, equal_parts, group, keep_quantized=keep_quantized)

    def wrapped(name: str, local: Tensor) -> Tensor:
        placement = next((each for pattern, each in rules if fnmatchcase(name, pattern)), Replicate())
        dim = None if isinstance(placement, Replicate) else placement.dim % local.ndim
        of_pytorch = dist.tensor.Replicate() if dim is None else dist.tensor.Shard(dim)
        result: Tensor = DTensor.from_local(local, mesh, [of_pytorch], run_check=False)
        return result

    return {name: wrapped(name, local) for name, local in found.items()}


def _placement(pattern: str, given: Any) -> Placement:
    """Our placement for PyTorch's placement, which may be the only item of a list."""
    one = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
    if isinstance(one, dist.tensor.Replicate):
        return Replicate()
    if isinstance(one, dist.tensor.Shard):
        return Shard(one.dim)
    raise OptionError(
        f"the placement of {pattern!r} is {shown(given)}; pass a Shard or a Replicate of torch.distributed.tensor for "
        "each pattern"
    )


def _agree(ranks: Ranks, path: Any, planner: Planner) -> tuple[Model | None, list[list[Share]], list[str | None]]:
    """The model (None if this rank does not have the file), what each rank holds, and where each rank has the file.

    The last is the host of each rank; None for ranks that do not have the file.

    Raises:
        NumbaDequantError: the file is damaged here, or no rank has it.
        DeviceError: another rank could not open the file or use its plan.
        ReadError: the files of two ranks differ.
        OptionError: the plan is for another number of ranks or another model, or the plans of two ranks differ.
    """
    model, digest, shares, missing, where = None, None, None, None, "the model"
    with ranks.all_or_none("open the file or use its plan"):
        try:
            model = open_model(path)
        except FileNotFoundError as error:
            missing = error
        if model is not None:
            digest = _digest(model)
            shares = _shares(planner if isinstance(planner, Plan) else planner(model), model, ranks.count)
            where = next((tensor.path for tensor in model.tensors.values()), where)
    of_shares = None if shares is None else hashlib.blake2b(repr(shares).encode()).digest()
    said = ranks.gather((digest, of_shares, _host()))
    holders = [rank for rank, (digest, _, _) in enumerate(said) if digest is not None]
    if not holders:
        assert missing is not None
        raise missing
    first = said[holders[0]]
    for rank in holders[1:]:
        if said[rank][0] != first[0]:
            raise ReadError(
                where, None, None, f"the files of rank {holders[0]} and rank {rank} differ; use the same file on both"
            )
        if said[rank][1] != first[1]:
            raise OptionError(f"the plans of rank {holders[0]} and rank {rank} differ; make the same plan on all ranks")
    if len(holders) < ranks.count:
        shares = ranks.broadcast(shares, holders[0])
    assert shares is not None
    return model, shares, [None if digest is None else host for digest, _, host in said]


def _host() -> str:
    """Text that is the same for processes that see the same disks: the name of the host, and when it was started."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{platform.node()} {boot}"


def _digest(model: Model) -> str:
    """A digest of the headers: all bytes before the first tensor of each shard, and the table of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    starts: dict[str, Any] = {}
    for tensor in model.tensors.values():
        digest.update(repr((tensor.name, tensor.format.name, tensor.shape, tensor.offset)).encode())
        known = starts.get(tensor.path)
        if known is None or tensor.offset < known.offset:
            starts[tensor.path] = tensor
    with OpenFiles() as files:
        for path in sorted(starts):
            tensor = starts[path]
            header = tensor._replace(offset=0, n_bytes=tensor.offset, format=FORMATS["I8"], byte_order="little")
            digest.update(_read_range(files, header, 0, tensor.offset).data)
    return digest.hexdigest()


def _shares(given: Any, model: Model, count: int) -> list[list[Share]]:
    if not isinstance(given, Plan):
        raise OptionError(f"the function that was passed as plan returned {shown(given)}, but must return a Plan")
    if len(given.ranks) != count:
        raise OptionError(f"the plan is for {len(given.ranks)} ranks, but the group has {count}; pass {count} as world")
    for part in (part for rank in given.ranks for part in rank.parts.values()):
        planned, own = part.tensor, model.tensors.get(part.tensor.name)
        if own is None or (own.format, own.shape) != (planned.format, planned.shape):
            raise OptionError(
                f"the plan is for another model: it has {planned.name} as {planned.format.name} of shape "
                f"{planned.shape}; make it with the tensors of this model"
            )
    # All ranks exchange tensors in the order of the file, whatever order a plan has.
    place = {name: number for number, name in enumerate(model.tensors)}
    return [
        [
            Share(name, part.tensor.format.name, part.shape, part.dim, part.start, part.stop)
            for name, part in sorted(rank.parts.items(), key=lambda named: place[named[1].tensor.name])
        ]
        for rank in given.ranks
    ]


def _read(model: Model, rank: int, routes: Routes) -> dict[tuple[int, str], NDArray[np.uint8]]:
    """The bytes that this rank reads: (the rank that needs them, name of the tensor) -> bytes."""
    found = {}
    with OpenFiles() as files:
        for reader, share in routes.read_by(rank):
            tensor = model.tensors[share.name]
            check_complete(tensor)
            if reader == rank and routes.is_divided(rank, share):
                data = _read_columns(files, tensor, routes.rows(rank, share), routes.columns(rank, share))
            elif share.dim is not None:
                part = Part(tensor, share.dim, share.start, share.stop)
                data = _read_part(files, part)
            else:
                first, size = routes.piece(reader, share)
                is_big = tensor.byte_order == "big"  # a piece of a block cannot be swapped
                start, count = (0, tensor.n_bytes) if is_big else (first, size)
                data = _read_range(files, tensor, tensor.offset + start, count)[first - start :][:size]
            found[reader, share.name] = data
    return found


def _read_range(files: OpenFiles, tensor: Any, offset: int, size: int) -> NDArray[np.uint8]:
    buffer = np.empty(size, np.uint8)
    if not size:
        return buffer
    piece = tensor._replace(offset=offset, n_bytes=size)
    return files.read(Chunk(tensor.path, offset, size, [TensorSlice(0, 0, 0, size)]), [piece], buffer)


def _read_part(files: OpenFiles, part: Part) -> NDArray[np.uint8]:
    """The bytes of a part. For columns, it reads whole rows, a few megabytes at a time."""
    tensor, dim = part.tensor, part.dim
    assert dim is not None
    if not part.n_bytes:
        return np.empty(0, np.uint8)
    if dim == 0:
        ((offset, size),) = part.byte_ranges()
        return _read_range(files, tensor, offset, size)
    return _read_columns(files, tensor, range(prod(tensor.shape[:dim])), [(dim, part.start, part.stop)])


def _read_columns(
    files: OpenFiles, tensor: TensorInfo, rows: range, columns: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """The bytes of each of some columns (dimension, start, stop) of some rows, one after the other.

    It reads whole rows, a few megabytes at a time.
    """
    dim = columns[0][0]
    step = tensor.n_bytes // prod(tensor.shape[:dim])
    edges = [(step * start // tensor.shape[dim], step * stop // tensor.shape[dim]) for _, start, stop in columns]
    found = [np.empty((len(rows), stop - start), np.uint8) for start, stop in edges]
    n_rows = max(SLAB // step, 1)
    for first in range(0, len(rows), n_rows):
        count = min(n_rows, len(rows) - first)
        slab = _read_range(files, tensor, tensor.offset + rows[first] * step, count * step).reshape(count, step)
        for target, (start, stop) in zip(found, edges, strict=True):
            target[first : first + count] = slab[:, start:stop]
    return np.concatenate([each.reshape(-1) for each in found])


def _values(
    share: Share, raw: Tensor, device: torch.device, type_of: Callable[[str], Any], *, keep_quantized: bool
) -> Tensor:
    fmt = format_named(share.format)
    row_bytes = fmt.n_bytes(share.shape[-1:])
    blocks = raw.view(*share.shape[:-1], row_bytes).to(device)
    if keep_quantized and fmt.block_size > 1:
        return blocks
    output = resolved(fmt, type_of(share.name) or torch.get_default_dtype())[1]
    return dequantize(blocks, fmt, output, share.shape)
