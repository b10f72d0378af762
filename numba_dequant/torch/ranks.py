"""The ranks of a process group: what they tell each other, and how they exchange the bytes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from numba_dequant.errors import DeviceError, OptionError, shown
from numba_dequant.parallel.routes import Read, Routes, Share, Transfer, read_of_span
from numba_dequant.parallel.spans import Span

# PyTorch 2.13 has renamed it.
ALL_GATHER: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


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
        # Without such a device, no rank can tell the others anything.
        self._device = device_of(group, torch.device("cpu"))

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

    def swap(self, sent: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]]) -> None:
        """Send tensors to some ranks, and receive tensors from some ranks, at the same time.

        Two ranks must have the tensors that one of them sends to the other in the same order.
        """
        pairs = [(dist.isend, sent), (dist.irecv, received)]
        transfers = [
            dist.P2POp(function, tensor, self.global_rank(rank), self.group)
            for function, tensors in pairs
            for rank, tensor in tensors
            if tensor.numel()
        ]
        if transfers:
            for work in self.call(dist.batch_isend_irecv, transfers):
                self.call(work.wait)

    def global_rank(self, rank: int) -> int:
        """The number of a rank of this group in the whole program."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[Agreement]:
        """A context. If it raises an error on one rank, all other ranks raise a DeviceError that quotes it.

        The block may set `Agreement.mine`. After it, `Agreement.of_all` has what all ranks have set, by rank.
        """
        agreement = Agreement()
        try:
            yield agreement
        except BaseException as error:
            with suppress(DeviceError):  # if the others cannot be told, this rank still raises its own error
                self.gather((told(error), None))
            raise
        said = self.gather((None, agreement.mine))
        self._raise(what, [sentence for sentence, _ in said])
        agreement.of_all = [thing for _, thing in said]

    @contextmanager
    def all_succeed(self, what: str) -> Iterator[None]:
        """As `all_or_none`, but ranks tell each other nothing else. It is faster: one collective of a number."""
        try:
            yield
        except BaseException as error:
            with suppress(DeviceError):
                self._count_failed(1)
                self.gather(told(error))
            raise
        if self._count_failed(0):
            self._raise(what, self.gather(None))

    def _count_failed(self, mine: int) -> int:
        count = torch.tensor(mine, device=self._device)
        self.call(dist.all_reduce, count, group=self.group)
        return int(count)

    def _raise(self, what: str, sentences: list[str | None]) -> None:
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise DeviceError(f"rank {rank} could not {what}: {sentence}")


@dataclass
class Agreement:
    """What a rank tells all others, and what they all tell it."""

    mine: Any = None
    of_all: list[Any] = field(default_factory=list)


def told(error: BaseException) -> str:
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


@dataclass
class ExchangeMemory:
    """Memory for what a rank receives in a batch.

    Attributes:
        shares: the bytes of each share that it needs from others, by name.
        spans: for each span of the batch, a row for the piece of each rank.
    """

    shares: dict[str, Tensor]
    spans: list[Tensor]


class Exchange:
    """The exchange of compressed bytes, by the routes, in batches of tensors.

    Args:
        ranks: the ranks.
        routes: who reads which bytes, and who needs them.
        device: where the bytes are while they are exchanged.
    """

    def __init__(self, ranks: Ranks, routes: Routes, device: torch.device) -> None:
        self._ranks, self._routes, self._device = ranks, routes, device
        self._shares = {share.number: share for share in routes.shares[ranks.rank]}
        self._batches: list[list[Transfer]] = [[] for _ in range(routes.n_batches)]
        for transfer in routes.exchanged(ranks.rank):
            self._batches[routes.batch_of[transfer.share.number]].append(transfer)
        # NCCL connects a whole group in its first collective, but in an exchange only some ranks may take part.
        ranks.call(dist.all_reduce, torch.zeros(1, device=device), group=ranks.group)

    def memory(self, batch: int) -> ExchangeMemory:
        """Memory for what this rank receives in a batch. Get it before the exchange, because no rank may fail then."""
        parts = [transfer.share for transfer in self._batches[batch] if transfer.rank == self._ranks.rank]
        shares = {part.name: torch.empty(part.n_bytes, dtype=torch.uint8, device=self._device) for part in parts}
        sizes = [(self._ranks.count, span.piece) for span in self._routes.spans[batch]]
        return ExchangeMemory(shares, [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes])

    def run(self, batch: int, pieces: dict[Read, Tensor], memory: ExchangeMemory) -> dict[str, Tensor]:
        """Exchange what was read for a batch. It returns the bytes of all shares that this rank needed from others.

        Those of a span share their memory, and columns of its tensors are a matrix that is not contiguous.

        Raises:
            DeviceError: another rank has ended or does not answer.
        """
        rank, found = self._ranks.rank, memory.shares
        sent: list[tuple[int, Tensor]] = []
        received: list[tuple[int, Tensor]] = []
        in_rings: list[tuple[Transfer, Tensor]] = []
        for transfer in self._batches[batch]:
            share = transfer.share
            if rank != transfer.source:
                received.append((transfer.source, found[share.name]))
                continue
            piece = pieces[transfer.read]
            if rank != transfer.rank:
                sent.append((transfer.rank, _columns(piece, share) if share.has_columns else piece))
            elif share.has_columns:
                self._divide(share, piece, found[share.name], sent, received)
            else:
                in_rings.append((transfer, piece))
        self._ranks.swap(sent, received)
        self._pass_around(in_rings, found)
        for span, gathered in zip(self._routes.spans[batch], memory.spans, strict=True):
            found |= self._gather(span, gathered, pieces)
        return found

    def _divide(
        self,
        share: Share,
        rows: Tensor,
        found: Tensor,
        sent: list[tuple[int, Tensor]],
        received: list[tuple[int, Tensor]],
    ) -> None:
        """What this rank sends of the rows that it has read, and what it receives of the rows that others have read."""
        rank, routes = self._ranks.rank, self._routes
        holders = routes.holders(rank, share)
        _, first, last = share.columns
        parts = found.split([len(routes.rows(other, share)) * (last - first) for other in holders])
        for (other, theirs), part in zip(holders.items(), parts, strict=True):
            if other == rank:
                part.view(-1, last - first).copy_(_in_rows(rows, share))
            else:
                sent.append((other, _columns(rows, theirs)))
                received.append((other, part))

    def _pass_around(self, tensors: list[tuple[Transfer, Tensor]], found: dict[str, Tensor]) -> None:
        """Gather the pieces of whole tensors that only some ranks hold: in rings, in which all tensors go at once.

        A process group of these ranks could gather them. But to make one, all ranks of the program must take part, or
        these ranks must have made the same number of groups before.
        """
        rank, routes = self._ranks.rank, self._routes
        rings: list[tuple[list[int], int, tuple[Tensor, ...]]] = []
        for transfer, piece in tensors:
            holders = list(routes.holders(rank, transfer.share))
            index = holders.index(rank)
            parts = found[transfer.share.name].split(transfer.longest)
            parts += (parts[0][:0],) * (len(holders) - len(parts))  # there may be fewer blocks than ranks
            parts[index].copy_(piece)
            rings.append((holders, index, parts))
        for step in range(max((len(holders) for holders, _, _ in rings), default=1) - 1):
            sent, received = [], []
            for holders, index, parts in rings:
                count = len(holders)
                if step < count - 1:
                    sent.append((holders[(index + 1) % count], parts[(index - step) % count]))
                    received.append((holders[index - 1], parts[(index - step - 1) % count]))
            self._ranks.swap(sent, received)

    def _gather(self, span: Span, gathered: Tensor, pieces: dict[Read, Tensor]) -> dict[str, Tensor]:
        """Gather the pieces of a span, each of which one rank has read. It returns the bytes of its tensors."""
        ranks, of_all = self._ranks, gathered.view(-1)
        read = read_of_span(span, self._shares[span.numbers[0]].name, ranks.rank)
        if read.n_bytes:
            gathered[ranks.rank][: read.n_bytes].copy_(pieces[read])
        ranks.call(ALL_GATHER, of_all, gathered[ranks.rank], group=ranks.group)
        shares = [self._shares[number] for number in span.numbers]
        return {share.name: _held(of_all[start:], share) for share, start in zip(shares, span.starts, strict=True)}


def _held(data: Tensor, share: Share) -> Tensor:
    """What a rank holds of a tensor whose bytes begin where `data` does."""
    if share.has_columns:
        return _in_rows(data[: share.whole_bytes], share)
    return data[share.first_byte : share.first_byte + share.n_bytes]


def _in_rows(rows: Tensor, share: Share) -> Tensor:
    """The columns of a share, of some whole rows."""
    step, first, last = share.columns
    return rows.view(-1, step)[:, first:last]


def _columns(rows: Tensor, share: Share) -> Tensor:
    """The bytes of the columns of a share, of some whole rows."""
    return _in_rows(rows, share).contiguous().view(-1)
