"""Which rank of a process group reads which bytes of a file, and sends them to which rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from numba_dequant.errors import DeviceError, OptionError, shown
from numba_dequant.formats import format_named


@dataclass(frozen=True)
class Share:
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
        """Its bytes."""
        return format_named(self.format).n_bytes(self.shape)

    @property
    def has_columns(self) -> bool:
        """Whether its bytes are not contiguous in the file."""
        return self.dim is not None and self.dim > 0

    @property
    def n_rows(self) -> int:
        """The number of its pieces that are contiguous in the file, if it has columns."""
        return prod(self.shape[: self.dim])


class Ranks:
    """The ranks of a process group: communication, and errors that all of them raise."""

    def __init__(self, group: Any) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):  # new_group returns a number to other ranks
            raise OptionError(
                f"group must be a process group to which this rank belongs, got {shown(group)}; call load_file only on "
                "the ranks of the group"
            )
        self.group: dist.ProcessGroup | None = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        device_of(group, torch.device("cpu"))  # without such a device, no rank can tell the others anything

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
                f"rank {self.rank} of {self.count} cannot communicate with the other ranks: {told(error)}; look for "
                "the first error that another rank printed"
            ) from error

    def swap(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Send tensors to some ranks, and receive tensors from some ranks, at the same time."""
        pairs = [(dist.isend, sent), (dist.irecv, received)]
        transfers = [
            dist.P2POp(function, tensor, self.global_rank(rank), self.group)
            for function, tensors in pairs
            for rank, tensor in tensors.items()
            if tensor.numel()
        ]
        if transfers:
            for work in self.call(dist.batch_isend_irecv, transfers):
                self.call(work.wait)

    def global_rank(self, rank: int) -> int:
        """The number of a rank of this group in the whole program."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """A context. If it raises an error on one rank, all other ranks raise a DeviceError that quotes it."""
        try:
            yield
        except Exception as error:
            with suppress(DeviceError):  # if the others cannot be told, this rank still raises its own error
                self.gather(told(error))
            raise
        for rank, sentence in enumerate(self.gather(None)):
            if sentence is not None:
                raise DeviceError(f"rank {rank} could not {what}: {sentence}")


def told(error: Exception) -> str:
    """An error for other ranks: its type and the first line of its message, if it has one."""
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__


def device_of(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
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


class Routes:
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

    def __init__(self, ranks: Ranks, shares: list[list[Share]], hosts: list[str | None], device: torch.device) -> None:
        self._ranks, self._shares, self._hosts = ranks, shares, hosts
        self._device = device_of(ranks.group, device)
        self._sources = [rank for rank, host in enumerate(hosts) if host is not None]
        self._holders: dict[tuple[str, str | None], dict[int, Share]] = defaultdict(dict)
        for rank in self._sources:
            for share in shares[rank]:
                if share.n_bytes and (share.dim is None or share.has_columns):
                    self._holders[self._key(rank, share)][rank] = share

    def _key(self, rank: int, share: Share) -> tuple[str, str | None]:
        """Whole tensors are gathered by the ranks of all hosts; columns are divided among those of one host."""
        return share.name, self._hosts[rank] if share.has_columns else None

    def holders(self, rank: int, share: Share) -> tuple[int, ...]:
        """The ranks that read a share together with a rank."""
        return tuple(self._holders.get(self._key(rank, share), ()))

    def is_divided(self, rank: int, share: Share) -> bool:
        """Whether several ranks of a host read the rows of the columns that they hold."""
        return share.has_columns and share.n_bytes > 0 and len(self.holders(rank, share)) > 1

    def rows(self, rank: int, share: Share) -> range:
        """The rows that a rank reads of columns that are divided."""
        holders = self.holders(rank, share)
        index = holders.index(rank)
        return range(*(share.n_rows * edge // len(holders) for edge in (index, index + 1)))

    def columns(self, rank: int, share: Share) -> list[tuple[int, int, int]]:
        """The columns (dimension, start, stop) of each rank that reads them together with a rank."""
        found = self._holders[self._key(rank, share)].values()
        return [(each.dim or 0, each.start, each.stop) for each in found]

    def _row_bytes(self, rank: int, share: Share) -> list[int]:
        """The bytes of the columns in a row, for each rank that reads them together with a rank."""
        return [each.n_bytes // share.n_rows for each in self._holders[self._key(rank, share)].values()]

    def source_of(self, rank: int) -> int:
        """The rank that reads the parts of a rank."""
        return rank if self._hosts[rank] is not None else self._sources[rank % len(self._sources)]

    def read_by(self, rank: int) -> Iterator[tuple[int, Share]]:
        """The shares that a rank reads, each with the rank that needs it."""
        for other, of_rank in enumerate(self._shares):
            if self.source_of(other) == rank:
                yield from ((other, share) for share in of_rank)

    def _exchanged_by(self, rank: int) -> Iterator[tuple[int, Share]]:
        """The shares that a rank needs or reads, each with the rank that needs it, in an order that all ranks keep."""
        for other, of_rank in enumerate(self._shares):
            if rank in (other, self.source_of(other)):
                yield from ((other, share) for share in of_rank)

    def piece(self, rank: int, share: Share) -> tuple[int, int]:
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
                    self._divide(found[share.name], piece[: data.size], share)
                else:
                    self._gather(found[share.name], piece, share)
                    found[share.name] = found[share.name][: share.n_bytes]
            elif rank == other != source:
                ranks.call(dist.recv, found[share.name], ranks.global_rank(source), group=ranks.group)
        return found

    def _divide(self, found: Tensor, data: Tensor, share: Share) -> None:
        """Send the columns of others that this rank has read, and receive its own, which come in the order of rows."""
        rank = self._ranks.rank
        holders, of_row = self.holders(rank, share), self._row_bytes(rank, share)
        mine, n_rows = of_row[holders.index(rank)], len(self.rows(rank, share))
        sent = dict(zip(holders, data.split([n_rows * each for each in of_row]), strict=True))
        parts = found.split([len(self.rows(other, share)) * mine for other in holders])
        received = dict(zip(holders, parts, strict=True))
        received.pop(rank).copy_(sent.pop(rank))
        self._ranks.swap(sent, received)

    def _gather(self, found: Tensor, piece: Tensor, share: Share) -> None:
        """Gather the pieces of a whole tensor.

        A process group for some ranks of a group would need all ranks of the program, or that these ranks have made the
        same number of groups before. So the pieces go around in a ring, unless all ranks of the group hold the tensor.
        """
        ranks, rank = self._ranks, self._ranks.rank
        holders, length = self.holders(rank, share), self._length(rank, share)
        if len(holders) == ranks.count:
            ranks.call(dist.all_gather_into_tensor, found, piece[:length], group=ranks.group)
            return
        count, index, pieces = len(holders), holders.index(rank), found.split(length)
        pieces[index].copy_(piece[:length])
        for step in range(count - 1):
            sent, received = pieces[(index - step) % count], pieces[(index - step - 1) % count]
            ranks.swap({holders[(index + 1) % count]: sent}, {holders[index - 1]: received})

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _is_gathered(self, rank: int, share: Share) -> bool:
        """Whether the ranks that have the file and hold a whole tensor read a piece each."""
        return share.dim is None and len(self.holders(rank, share)) > 1 and share.n_bytes > 0

    def _length(self, rank: int, share: Share) -> int:
        """The length of the longest piece of a whole tensor."""
        return -(-share.n_bytes // len(self.holders(rank, share)))
