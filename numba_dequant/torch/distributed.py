"""Load GGUF files on several ranks of `torch.distributed`. Each rank reads its part, and shared tensors are read once.

No rank reads a tensor before all ranks have agreed on the file and the plan. No rank sends before all have read and
have memory for their parts, and no rank returns before all have dequantized. So an error on one rank becomes an error
on all ranks, and no rank waits for another one that has failed.
"""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

Planner = Plan | Callable[[Model], Plan]

SLAB = 4 << 20
"""Bytes that a rank reads at a time if it needs only some columns."""


@dataclass(frozen=True)
class _Share:
    """What one rank holds of a tensor. Unlike a `Part`, it can be sent to a rank that does not have the file.

    Attributes:
        name: the name of the tensor.
        format: the name of its format.
        shape: the shape of the share.
        dim: the dimension along which the tensor is cut, or None.
        start: the first index along it.
        stop: the index after the last one.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return format_named(self.format).n_bytes(self.shape)

    @property
    def has_columns(self) -> bool:
        """Whether its bytes are not contiguous in the file."""
        return self.dim is not None and self.dim > 0

    @property
    def n_rows(self) -> int:
        """The number of its pieces that are contiguous in the file, if it has columns."""
        return prod(self.shape[: self.dim])


def load_sharded(
    path: Any, device: Any, dtype: Any, planner: Any, group: Any, *, select: Any = None, keep_quantized: Any
) -> dict[str, Tensor]:
    """The tensors of this rank by the plan; see `load_file`. A wrong argument of one rank is an error on all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError("a plan needs a process group; call torch.distributed.init_process_group first")
    ranks = _Ranks(group)
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
    routes = _Routes(ranks, shares, hosts, device)
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
            f"device {shown(device)} cannot be used: {_told(error)}; pass 'cpu' or a device that PyTorch finds"
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
    with _Ranks(group).all_or_none("use its arguments"):
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


class _Ranks:
    """The ranks of a process group: communication, and errors that all of them raise."""

    def __init__(self, group: Any) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):  # new_group returns a number to other ranks
            raise OptionError(
                f"group must be a process group to which this rank belongs, got {shown(group)}; call load_file only on "
                "the ranks of the group"
            )
        self.group: dist.ProcessGroup | None = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        _device_of(group, torch.device("cpu"))  # without such a device, no rank can tell the others anything

    def gather(self, thing: Any) -> list[Any]:
        """The objects that all ranks pass, by rank."""
        found: list[Any] = [None] * self.count
        self.call(dist.all_gather_object, found, thing, group=self.group)
        return found

    def broadcast(self, thing: Any, source: int) -> Any:
        """The object that the rank `source` passes."""
        found = [thing]
        self.call(dist.broadcast_object_list, found, self.global_rank(source), group=self.group)
        return found[0]

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of `torch.distributed`.

        Raises:
            DeviceError: the call fails, usually because another rank has ended or does not answer within the timeout.
        """
        try:
            return function(*arguments, **options)
        except RuntimeError as error:  # of PyTorch's: DistError and what the backends raise
            raise DeviceError(
                f"rank {self.rank} of {self.count} cannot communicate with the other ranks: {_told(error)}; look for "
                "the first error that another rank printed"
            ) from error

    def global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """A context. If it raises an error on one rank, all other ranks raise a DeviceError that quotes it."""
        try:
            yield
        except Exception as error:
            with suppress(DeviceError):  # if the others cannot be told, this rank still raises its own error
                self.gather(_told(error))
            raise
        for rank, sentence in enumerate(self.gather(None)):
            if sentence is not None:
                raise DeviceError(f"rank {rank} could not {what}: {sentence}")


def _told(error: Exception) -> str:
    """An error for other ranks: its type and the first line of its message, if it has one."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


def _agree(ranks: _Ranks, path: Any, planner: Planner) -> tuple[Model | None, list[list[_Share]], list[str | None]]:
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


def _shares(given: Any, model: Model, count: int) -> list[list[_Share]]:
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
    return [
        [
            _Share(name, part.tensor.format.name, part.shape, part.dim, part.start, part.stop)
            for name, part in rank.parts.items()
        ]
        for rank in given.ranks
    ]


def _read(model: Model, rank: int, routes: _Routes) -> dict[tuple[int, str], NDArray[np.uint8]]:
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


def _device_of(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """The device from which a group sends the bytes of tensors on `device`, by the backends of the group.

    NCCL sends from GPU to GPU, so each piece crosses the bus between host and GPU only once. Without NCCL, and for
    tensors on the host, the ranks send from the host, unless their backends send only from GPUs.

    Raises:
        DeviceError: the backends send only from GPUs, but this rank can use none.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    is_direct = device.type == "cuda" and backends.get("cuda") == "nccl"
    if "cpu" in backends and not is_direct:
        return torch.device("cpu")
    kind = "cuda" if "cuda" in backends else next(iter(backends))
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"rank {dist.get_rank(group)} can use no GPU, but the backend {backends[kind]} needs one; make a GPU "
            "visible to each rank, or pass 'gloo' to init_process_group"
        )
    return torch.device(kind)


class _Routes:
    """Which rank reads which bytes, and sends them to which rank.

    A rank that has the file reads its own parts. If several such ranks hold a whole tensor, each reads a piece of equal
    size, and the pieces are then gathered. If several such ranks of a host hold columns of a tensor, each reads some
    rows, and sends to each of the others its columns of them. If a rank does not have the file, another rank reads its
    parts and sends them.

    Args:
        ranks: the ranks.
        shares: what each rank holds.
        hosts: the host of each rank that has the file; None for the others.
        device: the device of this rank.
    """

    def __init__(
        self, ranks: _Ranks, shares: list[list[_Share]], hosts: list[str | None], device: torch.device
    ) -> None:
        self._ranks, self._shares, self._hosts = ranks, shares, hosts
        self._device = _device_of(ranks.group, device)
        self._sources = [rank for rank, host in enumerate(hosts) if host is not None]
        self._holders: dict[tuple[str, str | None], dict[int, _Share]] = defaultdict(dict)
        for rank in self._sources:
            for share in shares[rank]:
                if share.n_bytes and (share.dim is None or share.has_columns):
                    self._holders[self._key(rank, share)][rank] = share

    def _key(self, rank: int, share: _Share) -> tuple[str, str | None]:
        """Whole tensors are gathered by the ranks of all hosts; columns are divided among those of one host."""
        return share.name, self._hosts[rank] if share.has_columns else None

    def holders(self, rank: int, share: _Share) -> tuple[int, ...]:
        """The ranks that read a share together with a rank."""
        return tuple(self._holders.get(self._key(rank, share), ()))

    def is_divided(self, rank: int, share: _Share) -> bool:
        """Whether several ranks of a host read the rows of the columns that they hold."""
        return share.has_columns and share.n_bytes > 0 and len(self.holders(rank, share)) > 1

    def rows(self, rank: int, share: _Share) -> range:
        """The rows that a rank reads of columns that are divided."""
        holders = self.holders(rank, share)
        index = holders.index(rank)
        return range(*(share.n_rows * edge // len(holders) for edge in (index, index + 1)))

    def columns(self, rank: int, share: _Share) -> list[tuple[int, int, int]]:
        """The columns (dimension, start, stop) of each rank that reads them together with a rank."""
        found = self._holders[self._key(rank, share)].values()
        return [(each.dim or 0, each.start, each.stop) for each in found]

    def _row_bytes(self, rank: int, share: _Share) -> list[int]:
        """The bytes of the columns in a row, for each rank that reads them together with a rank."""
        return [each.n_bytes // share.n_rows for each in self._holders[self._key(rank, share)].values()]

    def source_of(self, rank: int) -> int:
        """The rank that reads the parts of a rank."""
        return rank if self._hosts[rank] is not None else self._sources[rank % len(self._sources)]

    def read_by(self, rank: int) -> Iterator[tuple[int, _Share]]:
        """The shares that a rank reads, each with the rank that needs it."""
        for other, of_rank in enumerate(self._shares):
            if self.source_of(other) == rank:
                yield from ((other, share) for share in of_rank)

    def _exchanged_by(self, rank: int) -> Iterator[tuple[int, _Share]]:
        """The shares that a rank needs or reads, each with the rank that needs it, in an order that all ranks keep."""
        for other, of_rank in enumerate(self._shares):
            if rank in (other, self.source_of(other)):
                yield from ((other, share) for share in of_rank)

    def piece(self, rank: int, share: _Share) -> tuple[int, int]:
        """The piece of a whole tensor that is read for a rank: its first byte and its size."""
        if self._hosts[rank] is None or not share.n_bytes:
            return 0, share.n_bytes
        each = self._length(rank, share)
        first = min(self.holders(rank, share).index(rank) * each, share.n_bytes)
        return first, min(each, share.n_bytes - first)

    def exchange(self, raw: dict[tuple[int, str], NDArray[np.uint8]]) -> dict[str, Tensor]:
        """The bytes of all shares of this rank."""
        ranks, rank, found = self._ranks, self._ranks.rank, {}
        # All memory is allocated before a rank sends, because no rank may fail while others wait for it.
        with ranks.all_or_none("get memory for its part"):
            for share in self._shares[rank]:
                if self.source_of(rank) != rank or self.is_divided(rank, share):
                    found[share.name] = self._empty(share.n_bytes)
                elif self._is_gathered(rank, share):
                    found[share.name] = self._empty(self._length(rank, share) * len(self.holders(rank, share)))
                else:
                    found[share.name] = torch.from_numpy(raw.pop((rank, share.name)))
            sizes = [data.size for data in raw.values()]
            sizes += [self._length(rank, share) for share in self._shares[rank] if self._is_gathered(rank, share)]
            piece = self._empty(max(sizes, default=0))
        groups = self._groups()
        for other, share in self._exchanged_by(rank):
            source = self.source_of(other)
            if not share.n_bytes:
                continue
            if rank == source and (other, share.name) in raw:
                data = raw.pop((other, share.name))
                piece[: data.size].copy_(torch.from_numpy(data))
                if rank != other:
                    ranks.call(dist.send, piece[: data.size], ranks.global_rank(other), group=ranks.group)
                elif share.has_columns:
                    self._divide(found[share.name], piece[: data.size], share, groups[self.holders(rank, share)])
                else:
                    group, length = groups[self.holders(rank, share)], self._length(rank, share)
                    ranks.call(dist.all_gather_into_tensor, found[share.name], piece[:length], group=group)
                    found[share.name] = found[share.name][: share.n_bytes]
            elif rank == other != source:
                ranks.call(dist.recv, found[share.name], ranks.global_rank(source), group=ranks.group)
        return found

    def _divide(self, found: Tensor, data: Tensor, share: _Share, group: dist.ProcessGroup | None) -> None:
        """Send the columns of others that this rank has read, and receive its own, which come in the order of rows."""
        rank, n_rows = self._ranks.rank, len(self.rows(self._ranks.rank, share))
        holders, of_row = self.holders(rank, share), self._row_bytes(rank, share)
        mine = of_row[holders.index(rank)]
        received = [len(self.rows(other, share)) * mine for other in holders]
        self._ranks.call(dist.all_to_all_single, found, data, received, [n_rows * each for each in of_row], group=group)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _is_gathered(self, rank: int, share: _Share) -> bool:
        """Whether the ranks that have the file and hold a whole tensor read a piece each."""
        return share.dim is None and len(self.holders(rank, share)) > 1 and share.n_bytes > 0

    def _length(self, rank: int, share: _Share) -> int:
        """The length of the longest piece of a whole tensor."""
        return -(-share.n_bytes // len(self.holders(rank, share)))

    def _groups(self) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
        """A process group for each set of ranks that read a tensor together and that contains this rank."""
        ranks, found = self._ranks, {}
        for holders in sorted({tuple(each) for each in self._holders.values()}):
            if len(holders) == ranks.count:
                found[holders] = ranks.group
            elif len(holders) > 1 and ranks.rank in holders:
                members = [ranks.global_rank(rank) for rank in holders]
                # The other ranks of the program may be busy with another group, so they must not have to take part.
                found[holders] = ranks.call(dist.new_group, members, use_local_synchronization=True)
        return found


def _values(
    share: _Share, raw: Tensor, device: torch.device, type_of: Callable[[str], Any], *, keep_quantized: bool
) -> Tensor:
    fmt = format_named(share.format)
    row_bytes = fmt.n_bytes(share.shape[-1:])
    blocks = raw.view(*share.shape[:-1], row_bytes).to(device)
    if keep_quantized and fmt.block_size > 1:
        return blocks
    output = resolved(fmt, type_of(share.name) or torch.get_default_dtype())[1]
    return dequantize(blocks, fmt, output, share.shape)
