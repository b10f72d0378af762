"""Which rank reads which bytes of a file, and which rank needs them. Nothing is read or sent here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import OptionError, shown
from numba_dequant.format import Format
from numba_dequant.formats import format_named
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel.plan import Part, Plan
from numba_dequant.parallel.spans import Place, Span, runs, span_of

LEAST_DIVIDED = 1 << 20
"""Whole tensors of fewer bytes are read by each rank that holds them: exchanging them would take longer."""

BATCH_BYTES = 1 << 30
"""The default limit of the memory in bytes that a rank needs to exchange a batch."""


LAST_BYTES = 128 << 20
"""The memory of the last batch, if there are several. It is small because nothing is read while it is exchanged."""


class Share(NamedTuple):
    """What one rank holds of a tensor. Unlike a `Part`, it can be sent to a rank that does not have the file.

    Attributes:
        number: the place of the tensor in the file.
        name: the name of the tensor.
        format: the name of its format.
        whole: the shape of the whole tensor.
        dim: the dimension along which the tensor is cut, or None.
        start: the first index along it.
        stop: the index after the last one.
        n_bytes: the bytes of the share.
        whole_bytes: the bytes of the whole tensor.
    """

    number: int
    name: str
    format: str
    whole: tuple[int, ...]
    dim: int | None
    start: int
    stop: int
    n_bytes: int
    whole_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the share."""
        if self.dim is None:
            return self.whole
        return (*self.whole[: self.dim], self.stop - self.start, *self.whole[self.dim + 1 :])

    @property
    def has_columns(self) -> bool:
        """Whether its bytes are not contiguous in the file."""
        return self.dim is not None and self.dim > 0

    @property
    def n_rows(self) -> int:
        """The number of its pieces that are contiguous in the file, if it has columns."""
        return prod(self.whole[: self.dim])

    @property
    def first_byte(self) -> int:
        """Where its bytes begin in the tensor, if they are contiguous."""
        return self.whole_bytes * self.start // self.whole[0] if self.dim == 0 else 0

    @property
    def columns(self) -> tuple[int, int, int]:
        """The bytes of a whole row, and where its columns begin and end in it."""
        assert self.dim is not None
        step = self.whole_bytes // self.n_rows
        extent = self.whole[self.dim]
        return step, step * self.start // extent, step * self.stop // extent


class Read(NamedTuple):
    """A range of the bytes of a tensor: whole blocks."""

    number: int
    name: str
    first: int
    n_bytes: int


class Transfer(NamedTuple):
    """A share that a rank does not simply read itself.

    Attributes:
        rank: the rank that needs the share.
        share: the share.
        source: the rank that reads for it; the same rank if it has the file.
        read: what the source reads: the share, or only a piece of it, whose other pieces other ranks read.
        longest: the bytes of the longest piece, if several ranks read a piece of a whole tensor each; otherwise 0.
    """

    rank: int
    share: Share
    source: int
    read: Read
    longest: int


def shares_of(plan: Plan, tensors: Mapping[str, TensorInfo]) -> list[list[Share]]:
    """What each rank holds of the tensors of a model, in the order of the file.

    Raises:
        OptionError: the plan is for another model, or a part made by hand is not a part of its tensor.
    """
    known = {tensor.name: (number, tensor) for number, tensor in enumerate(tensors.values())}
    # What layers have in common: the shape and the format of a tensor, and its part -> the bytes of the part.
    checked: dict[tuple[Any, ...], int] = {}
    made: dict[int, Share] = {}  # several ranks may have the same part

    def share_of(name: str, part: Part) -> Share:
        share = made.get(id(part))
        if share is not None and share.name == name:
            return share
        if not isinstance(part, Part) or part.tensor.name != name:
            raise OptionError(f"the plan has {shown(part)} as the part of {shown(name)}; pass a Part of that tensor")
        planned = part.tensor
        number, own = known.get(planned.name, (0, None))
        if own is None or (own is not planned and (own.format, own.shape) != (planned.format, planned.shape)):
            raise OptionError(
                f"the plan is for another model: it has {shown(planned.name)} as {planned.format.name} of shape "
                f"{planned.shape}; make it with the tensors of this model"
            )
        dim, start, stop = part.dim, part.start, part.stop
        key = own.shape, id(own.format), dim, start, stop, type(dim)
        n_bytes = checked.get(key)
        if n_bytes is None:
            _check_part(own, part)
            n_bytes = checked[key] = part.n_bytes
        share = Share(number, name, own.format.name, own.shape, dim, start, stop, n_bytes, own.n_bytes)
        made[id(part)] = share
        return share

    shares = ([share_of(name, part) for name, part in rank.parts.items()] for rank in plan.ranks)
    return [sorted(of_rank, key=lambda share: share.number) for of_rank in shares]


def _check_part(own: TensorInfo, part: Part) -> None:
    if part.dim is not None and not (
        type(part.dim) is int and 0 <= part.dim < len(own.shape) and 0 <= part.start <= part.stop <= own.shape[part.dim]
    ):
        raise OptionError(
            f"{shown(own.name)} of shape {own.shape} has no part of dimension {part.dim} from {part.start} to "
            f"{part.stop}; count dimensions from 0, and pass a start and a stop within the tensor"
        )
    if not _has_whole_blocks(own, part):
        raise OptionError(
            f"the part of {shown(own.name)} of shape {own.shape} from {part.start} to {part.stop} of dimension "
            f"{part.dim} is not whole blocks of {own.format.name}; pass other limits"
        )


def _has_whole_blocks(tensor: TensorInfo, part: Part) -> bool:
    """Whether a part consists of ranges of whole blocks."""
    block_size, dim = tensor.format.block_size, part.dim
    if block_size == 1 or dim is None or part.start == part.stop:
        return True
    inner = prod(tensor.shape[dim + 1 :])
    ends = [part.start, part.stop] + ([tensor.shape[dim]] if dim else [])
    return all(end * inner % block_size == 0 for end in ends)


def read_of_span(span: Span, name: str, rank: int) -> Read:
    """What a rank reads of a span, counted from its first tensor, which has this name."""
    return Read(span.numbers[0], name, *span.range_of(rank))


def piece_bytes(n_bytes: int, fmt: Format, count: int) -> int:
    """The bytes of the longest piece if a tensor is divided into `count` pieces of whole blocks."""
    return -(-n_bytes // fmt.type_size // count) * fmt.type_size


def batches(needed: NDArray[np.int64], batch_bytes: int) -> list[int]:
    """The number of the batch of each tensor, in the order of the file.

    What fits in one batch at the end is halved, as long as it needs more than `LAST_BYTES`.

    Args:
        needed: the bytes that each rank needs memory for (dimension 1) to exchange each tensor (dimension 0).
        batch_bytes: the most of these bytes that a batch has, unless it has only one tensor.
    """
    found = np.zeros(len(needed), np.int64)
    places = np.flatnonzero(needed.any(1))
    sums = np.ascontiguousarray(needed[places].cumsum(0).T)  # by rank, so that each row is sorted
    first = 0
    while first < len(places):
        before = sums[:, first - 1] if first else np.zeros(len(sums), np.int64)
        left = int((sums[:, -1] - before).max())
        limit = batch_bytes if left > batch_bytes else max(left // 2, LAST_BYTES)
        fitting = min(
            int(np.searchsorted(of_rank, start + limit, "right")) for of_rank, start in zip(sums, before, strict=True)
        )
        first = max(fitting, first + 1)
        if first < len(places):
            found[places[first] :] += 1
    numbers: list[int] = found.tolist()
    return numbers


class Routes:
    """Which rank reads which bytes, and which rank needs them.

    A rank that has the file reads its own parts. If all ranks have the file and hold consecutive tensors, each reads a
    piece of their bytes, and the pieces are then gathered; with `gathers_parts` also if they hold only parts of them.
    If only some ranks that have the file hold a large whole tensor, they do the same with this tensor. If several such
    ranks of a host hold columns of a tensor, each reads some rows, and sends to each of the others its columns of them.
    If a rank does not have the file, another rank reads its parts and sends them. Tensors are exchanged in batches, so
    that an exchange needs little memory.

    Args:
        shares: what each rank holds, in the order of the file.
        hosts: the host of each rank that has the file; None for the others.
        batch_bytes: the most bytes of memory that a rank needs to read and exchange a batch of more than one tensor.
            If you omit it, all tensors are kept, so only the memory for the exchange counts, up to `BATCH_BYTES`.
        places: where the tensors are. If you omit it, consecutive tensors are not read together.
        gathers_parts: whether ranks also gather tensors of which they hold only parts, and drop the rest. They send
            more bytes, but read the file in long ranges, so their links must be much faster than the bus.
    """

    def __init__(
        self,
        shares: Sequence[Sequence[Share]],
        hosts: Sequence[str | None],
        batch_bytes: int | None = None,
        places: Sequence[Place | None] = (),
        *,
        gathers_parts: bool = False,
    ) -> None:
        self.shares, self.hosts, self._batch_bytes, self._places = shares, hosts, batch_bytes, places
        self._runs = self._runs_of_all(gathers_parts) if places else []
        self._in_spans = {number for run in self._runs for number in run}
        self._sources = [rank for rank, host in enumerate(hosts) if host is not None]
        self._holders: dict[tuple[Any, ...], dict[int, Share]] = defaultdict(dict)
        self._order: dict[tuple[Any, ...], dict[int, int]] = defaultdict(dict)
        for rank in self._sources:
            for share in shares[rank]:
                is_divided = share.has_columns or (share.dim is None and share.n_bytes >= LEAST_DIVIDED)
                if share.n_bytes and is_divided and share.number not in self._in_spans:
                    key = self._key(rank, share)
                    self._order[key][rank] = len(self._holders[key])
                    self._holders[key][rank] = share

    def _runs_of_all(self, gathers_parts: bool) -> list[list[int]]:
        """The numbers of the tensors that all ranks gather, in runs of consecutive ones; none for a single rank."""
        if len(self.shares) == 1 or None in self.hosts:
            return []
        counts = Counter(
            share.number
            for of_rank in self.shares
            for share in of_rank
            if share.n_bytes and (gathers_parts or share.dim is None)
        )
        held = sorted(number for number, count in counts.items() if count == len(self.shares))
        return runs(self._places, held, LEAST_DIVIDED)

    def _key(self, rank: int, share: Share) -> tuple[Any, ...]:
        """Whole tensors are gathered by the ranks of all hosts; columns are divided among those of one host.

        Ranks that cut a tensor along different dimensions do not read it together.
        """
        return (share.name, self.hosts[rank], share.dim) if share.has_columns else (share.name,)

    def holders(self, rank: int, share: Share) -> dict[int, Share]:
        """The ranks that read a share together with a rank, and what they hold. Only ranks with the file read."""
        return {} if self.hosts[rank] is None else self._holders.get(self._key(rank, share), {})

    def source_of(self, rank: int) -> int:
        """The rank that reads the parts of a rank."""
        return rank if self.hosts[rank] is not None else self._sources[rank % len(self._sources)]

    def read(self, rank: int, share: Share) -> Read:
        """The bytes that are read for a share by the rank itself, or by the rank that reads for it."""
        return self._read(rank, share, self._longest(rank, share))

    def _read(self, rank: int, share: Share, longest: int) -> Read:
        first, size = 0, share.whole_bytes
        if share.dim == 0:
            first, size = share.first_byte, share.n_bytes
        elif longest:
            first = min(self._order[self._key(rank, share)][rank] * longest, size)
            size = min(longest, size - first)
        elif share.has_columns and self.holders(rank, share):
            rows, step = self.rows(rank, share), share.columns[0]
            first, size = rows.start * step, len(rows) * step
        return Read(share.number, share.name, first, size)

    def rows(self, rank: int, share: Share) -> range:
        """The rows that a rank reads of columns."""
        order = self._order[self._key(rank, share)]
        n_rows, index, count = share.n_rows, order[rank], len(order)
        return range(n_rows * index // count, n_rows * (index + 1) // count)

    def _longest(self, rank: int, share: Share) -> int:
        """The bytes of the longest piece, if several ranks read a piece of a whole tensor each; otherwise 0."""
        if share.dim is not None or share.n_bytes < LEAST_DIVIDED:
            return 0
        count = len(self.holders(rank, share))
        return piece_bytes(share.n_bytes, format_named(share.format), count) if count > 1 else 0

    @cached_property
    def transfers(self) -> list[list[Transfer]]:
        """For each rank the shares that it does not simply read itself, in the order of the file."""
        found: list[list[Transfer]] = [[] for _ in self.shares]
        for rank, (of_rank, host) in enumerate(zip(self.shares, self.hosts, strict=True)):
            source = self.source_of(rank)
            for share in of_rank:
                if share.number in self._in_spans:
                    continue
                longest = self._longest(rank, share)
                if share.n_bytes and (host is None or share.has_columns or longest):
                    found[rank].append(Transfer(rank, share, source, self._read(rank, share, longest), longest))
        return found

    def direct(self, rank: int) -> Iterator[Share]:
        """The shares whose bytes a rank reads itself, all of them and no others. They need no exchange."""
        exchanged = self._in_spans | {transfer.share.number for transfer in self.transfers[rank]}
        for share in self.shares[rank]:
            if share.n_bytes and share.number not in exchanged:
                yield share

    @cached_property
    def _needed(self) -> list[list[int]]:
        """For each tensor of the file, the bytes that each rank needs memory for to exchange it."""
        n_tensors = 1 + max((share.number for of_rank in self.shares for share in of_rank), default=-1)
        needed = [[0] * len(self.shares) for _ in range(n_tensors)]
        for rank, of_rank in enumerate(self.transfers):
            for share in self.shares[rank]:
                if share.number in self._in_spans:  # gathered, and then made into a tensor of its own
                    needed[share.number][rank] = share.whole_bytes + share.n_bytes
            for transfer in of_rank:
                of_tensor = needed[transfer.share.number]
                of_tensor[transfer.source] += transfer.read.n_bytes
                of_tensor[rank] += transfer.share.n_bytes
            if self._batch_bytes is not None:
                for share in self.direct(rank):
                    needed[share.number][rank] += share.n_bytes
        return needed

    @cached_property
    def batch_of(self) -> list[int]:
        """The number of the batch of each tensor of the file.

        Unless `batch_bytes` is passed, tensors that no rank exchanges come after the last batch, as number `n_batches`:
        the ranks exchange the others while they read these.
        """
        needed = np.array(self._needed, np.int64).reshape(-1, len(self.shares))
        found = batches(needed, self._batch_bytes or BATCH_BYTES)
        if self._batch_bytes is None:
            last = 1 + max(found, default=0)
            found = [batch if any(of_ranks) else last for batch, of_ranks in zip(found, self._needed, strict=True)]
        return found

    @cached_property
    def n_batches(self) -> int:
        """The number of batches, at least 1."""
        of_tensors = zip(self.batch_of, self._needed, strict=True)
        return 1 + max((batch for batch, of_ranks in of_tensors if any(of_ranks)), default=0)

    @cached_property
    def spans(self) -> list[list[Span]]:
        """For each batch the consecutive tensors that all ranks gather."""
        found: list[list[Span]] = [[] for _ in range(self.n_batches)]
        for run in self._runs:
            for batch, numbers in groupby(run, self.batch_of.__getitem__):
                found[batch].append(span_of(self._places, list(numbers), len(self.shares)))
        return found

    def exchanged(self, rank: int) -> list[Transfer]:
        """The transfers to a rank and from it. All ranks have them in the order of the file."""
        found = list(self.transfers[rank])
        for other in range(len(self.shares)):
            if other != rank and self.source_of(other) == rank:
                found += self.transfers[other]
        return sorted(found, key=lambda transfer: (transfer.share.number, transfer.rank))
