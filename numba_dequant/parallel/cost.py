"""A cost model: how long the ranks of a plan take to load a file, on paper. It needs no GPU and reads no file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from numba_dequant.errors import OptionError, shown
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel import routes
from numba_dequant.parallel.machine import Machine
from numba_dequant.parallel.plan import Part, Plan
from numba_dequant.parallel.routes import LEAST_DIVIDED, batches, piece_bytes
from numba_dequant.parallel.spans import places_of, runs, span_of

AGREEMENTS = 6
"""Collectives of every load. Ranks exchange objects twice at its start. Each of these exchanges is two collectives:
first the sizes, then the bytes. Another collective makes the first connection, and in the last one, all ranks say that
they have loaded their parts."""
OF_BATCH = 1
"""Collectives of each batch, in which all ranks say that they have read it."""
BROADCAST = 2
"""Collectives for the plan, which one rank sends to all others if any of them lacks the file: its size, its bytes."""


@dataclass(frozen=True)
class Stage:
    """One stage of a load: its name, its seconds, and the link that bounds it."""

    name: str
    seconds: float
    bottleneck: str


@dataclass(frozen=True)
class RankCost:
    """The prediction for one rank.

    Attributes:
        rank, host: the numbers of the rank and of its host.
        moved: link -> bytes. The links are ``"file"``, ``"bus"``, ``"NVLink in"``, ``"NVLink out"``, ``"network in"``,
            ``"network out"`` and ``"memory"``, which is what dequantizing reads and writes. A missing link has 0 bytes.
        stages: the stages in order: read, copy, exchange, dequantize, wait.
    """

    rank: int
    host: int
    moved: Counter[str]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Prediction:
    """The prediction for a plan.

    Attributes:
        ranks: the predictions for all ranks, in order.
        distinct_bytes: how many different bytes of the file each host reads, by host.
    """

    ranks: tuple[RankCost, ...]
    distinct_bytes: tuple[int, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """For each stage, that of the rank that takes longest for it."""
        by_stage = zip(*(rank.stages for rank in self.ranks), strict=True)
        return tuple(max(of_ranks, key=lambda stage: stage.seconds) for of_ranks in by_stage)

    @property
    def seconds(self) -> float:
        """Seconds if reading and copying overlap, and ranks exchange only when all have finished both.

        `load_file` may be faster, because it reads the next batch while it exchanges one.
        """
        loaded = max(stage.seconds for stage in self.stages[:2])
        return loaded + max(sum(stage.seconds for stage in rank.stages[2:]) for rank in self.ranks)

    @property
    def overlapped_seconds(self) -> float:
        """Seconds if all stages overlap, as in `nd.load` to one GPU: those of the longest stage, plus the latency."""
        *busy, latency = self.stages
        return max(stage.seconds for stage in busy) + latency.seconds

    @property
    def bottleneck(self) -> str:
        """The link that bounds the longest stage."""
        return max(self.stages, key=lambda stage: stage.seconds).bottleneck


def predict(
    plan: Plan, machine: Machine, *, files: Literal["every host", "one host"] = "every host", value_bytes: int = 2
) -> Prediction:
    """Predict the time of ``load_file(plan=...)`` with one GPU per rank and the backend ``"nccl"``.

    The model knows rates and bytes alone. It leaves out: opening the file; making the plan and its digest; the bytes of
    these digests, and of the plan that a rank without the file receives; the first connection between two ranks; the
    allocation of memory; launches of kernels; rates that are lower for small pieces, or while other links are busy;
    latencies that grow with the number of ranks; a rank that waits while the rank that reads for it sends to others.
    A collective is a ring in the order of the ranks. So most loads take longer than predicted.

    Args:
        plan: the plan.
        machine: the rates.
        files: which hosts have the file. ``"one host"`` means that the first host reads for all others, and sends.
        value_bytes: the bytes of a dequantized value. 0 means that tensors stay compressed.

    Raises:
        OptionError: an argument has a wrong type or value, or the plan has no ranks.
    """
    if not isinstance(plan, Plan) or not plan.ranks:
        raise OptionError(f"plan is {shown(plan)}, but must be a Plan with one rank or more")
    if not isinstance(machine, Machine):
        raise OptionError(f"machine is {shown(machine)}, but must be a Machine")
    if files not in ("every host", "one host"):
        raise OptionError(f"files is {shown(files)}; pass 'every host' or 'one host'")
    if not isinstance(value_bytes, int) or value_bytes < 0:
        raise OptionError(f"value_bytes is {shown(value_bytes)}, but must be a whole number, 0 or more")
    hosts = [rank // machine.gpus_per_host for rank in range(len(plan.ranks))]
    n_readers = len(hosts) if files == "every host" else hosts.count(0)
    traffic = _traffic(plan, hosts, n_readers, value_bytes)
    distinct = traffic.distinct
    return Prediction(_costs(traffic.moved, distinct, hosts, machine), tuple(distinct))


class _Traffic:
    """What the ranks of a plan move, counted. It follows `Routes` and `numba_dequant.torch.ranks`.

    Args:
        plan: the plan.
        hosts: the host of each rank.

    Attributes:
        moved: for each rank the bytes over each link, as in `RankCost`, and the number of its ``"calls"``.
    """

    def __init__(self, plan: Plan, hosts: list[int]) -> None:
        self._hosts = hosts
        self.moved: list[Counter[str]] = [Counter() for _ in hosts]
        tensors = {name: part.tensor for rank in plan.ranks for name, part in rank.parts.items()}
        in_file = sorted(tensors.values(), key=lambda tensor: (tensor.path, tensor.offset))
        self._in_file, self._places = in_file, places_of(in_file)
        self._place = {tensor.name: number for number, tensor in enumerate(in_file)}
        # By tensor and rank: bytes of memory for the exchange, and whether it is an exchange between two ranks.
        self._needed = np.zeros((len(in_file), len(hosts)), np.int64)
        self._swapped = np.zeros((len(in_file), len(hosts)), bool)
        self._runs: list[list[int]] = []
        # Tensors that some ranks gather: the tensor, its ranks, and how many of them read a piece of it.
        self._rings: list[tuple[int, tuple[int, ...], int]] = []
        self._reads: set[tuple[int, str, int, int]] = set()
        self._spans: dict[tuple[int, str], set[tuple[int, int]]] = defaultdict(set)

    @property
    def distinct(self) -> list[int]:
        """How many different bytes of the file each host reads."""
        found = [0] * (self._hosts[-1] + 1)
        for (host, _), spans in self._spans.items():
            found[host] += _union(spans)
        return found

    def gather_runs(self, names: Iterable[str], of_ranks: Sequence[Mapping[str, Part]]) -> set[str]:
        """All ranks hold these tensors or parts of them. Returns those which they gather, in runs of consecutive ones.

        Args:
            names: the tensors.
            of_ranks: the parts of each rank.
        """
        self._runs = runs(self._places, sorted(self._place[name] for name in names), LEAST_DIVIDED)
        found = set()
        for number in chain.from_iterable(self._runs):
            tensor = self._in_file[number]
            self._needed[number] += [tensor.n_bytes + parts[tensor.name].n_bytes for parts in of_ranks]
            found.add(tensor.name)
        return found

    def count_batches(self, n_agreements: int) -> None:
        """Count what depends on the batches, after everything else: consecutive tensors of all ranks, and calls."""
        batch_of = np.array(batches(self._needed, routes.BATCH_BYTES), np.int64)
        n_batches = 1 + int(batch_of.max(initial=0))
        swaps = np.zeros(len(self._hosts), np.int64)
        for number in range(n_batches):
            swaps += self._swapped[batch_of == number].any(0)
        for run in self._runs:
            for _, numbers in groupby(run, batch_of.__getitem__):
                self._gather_span(list(numbers))
                swaps += 1
        for of_rank in _steps(self._rings, batch_of):
            for rank, steps in of_rank.items():
                swaps[rank] += len(steps)
        for rank, n_swaps in enumerate(swaps.tolist()):
            self.moved[rank]["calls"] += n_agreements + n_batches * OF_BATCH + n_swaps

    def _gather_span(self, numbers: list[int]) -> None:
        """All ranks read pieces of consecutive tensors, and gather the whole."""
        count, name = len(self._hosts), self._in_file[numbers[0]].name
        span = span_of(self._places, numbers, count)
        for rank in range(count):
            first, n_bytes = span.range_of(rank)
            if n_bytes:
                self.moved[rank]["file"] += n_bytes
                self.moved[rank]["bus"] += n_bytes
                self._spans[self._hosts[rank], name].add((first, first + n_bytes))
            self.send(rank, (rank + 1) % count, (count - 1) * span.piece)

    def read(self, rank: int, tensor: TensorInfo, first: int, n_bytes: int, *, is_direct: bool = False) -> None:
        """A rank reads a range of a tensor; once, if it is for an exchange."""
        if is_direct or (rank, tensor.name, first, n_bytes) not in self._reads:
            if not is_direct:
                self._reads.add((rank, tensor.name, first, n_bytes))
            self._spans[self._hosts[rank], tensor.name].add((first, first + n_bytes))
            self.moved[rank]["file"] += n_bytes
            self.moved[rank]["bus"] += n_bytes

    def send(self, source: int, target: int, n_bytes: int) -> None:
        """One rank sends bytes to another one."""
        link = "NVLink" if self._hosts[source] == self._hosts[target] else "network"
        self.moved[source][f"{link} out"] += n_bytes
        self.moved[target][f"{link} in"] += n_bytes

    def part(self, source: int, rank: int, part: Part, n_bytes: int) -> None:
        """A rank reads what it holds of a tensor, or another rank reads it and sends it."""
        tensor, first, size = part.tensor, 0, part.tensor.n_bytes
        if part.dim == 0:  # the bytes of columns are not contiguous, so whole rows are read
            first, size = size * part.start // tensor.shape[0], n_bytes
        self.read(source, tensor, first, size, is_direct=source == rank)
        if source != rank:
            self.send(source, rank, n_bytes)
            place = self._place[tensor.name]
            self._needed[place, source] += size
            self._needed[place, rank] += n_bytes
            self._swapped[place, [source, rank]] = True

    def divide(self, parts: dict[int, Part]) -> None:
        """Ranks of a host that hold columns of a tensor read some rows each, and send the others their columns."""
        tensor, dim = next((part.tensor, part.dim) for part in parts.values())
        place, n_rows = self._place[tensor.name], prod(tensor.shape[:dim])
        of_row = {rank: part.n_bytes // n_rows for rank, part in parts.items()}
        for index, rank in enumerate(parts):
            begin, end = (n_rows * edge // len(parts) for edge in (index, index + 1))
            step = tensor.n_bytes // n_rows
            self.read(rank, tensor, begin * step, (end - begin) * step)
            self._needed[place, rank] += (end - begin) * step + n_rows * of_row[rank]
            self._swapped[place, rank] |= len(parts) > 1
            for other, n_bytes in of_row.items():
                if other != rank:
                    self.send(rank, other, (end - begin) * n_bytes)

    def gather(self, ranks: tuple[int, ...], tensors: list[TensorInfo]) -> None:
        """Ranks that hold the same whole tensors read pieces of equal size, and gather them in a ring."""
        count = len(ranks)
        if count == 1:
            for tensor in tensors:
                self.read(ranks[0], tensor, 0, tensor.n_bytes, is_direct=True)
            return
        sizes = np.array([tensor.n_bytes for tensor in tensors], np.int64)
        longest = np.array([piece_bytes(tensor.n_bytes, tensor.format, count) for tensor in tensors], np.int64)
        edges = np.minimum(np.arange(count + 1)[:, np.newaxis] * longest, sizes)
        pieces = np.diff(edges, axis=0)
        places = [self._place[tensor.name] for tensor in tensors]
        self._needed[np.ix_(places, ranks)] += (pieces + sizes).T
        of_ranks = pieces.sum(1).tolist()
        for index, (rank, n_bytes) in enumerate(zip(ranks, of_ranks, strict=True)):
            self.moved[rank]["file"] += n_bytes
            self.moved[rank]["bus"] += n_bytes
            following = (index + 1) % count
            self.send(rank, ranks[following], int(sizes.sum()) - of_ranks[following])
        self._rings += zip(places, [ranks] * len(places), (pieces > 0).sum(0).tolist(), strict=True)
        for tensor, n_bytes in zip(tensors, pieces[0].tolist(), strict=True):
            # The first rank may have read the only block of a tensor for a rank without the file.
            if (ranks[0], tensor.name, 0, n_bytes) in self._reads:
                self.moved[ranks[0]]["file"] -= n_bytes
                self.moved[ranks[0]]["bus"] -= n_bytes
        # The ranks of a host are neighbours in the ring, so their pieces are one span.
        of_hosts = Counter(self._hosts[rank] for rank in ranks)
        begin = 0
        for host, n_ranks in of_hosts.items():
            firsts = edges[begin]
            begin += n_ranks
            for tensor, first, end in zip(tensors, firsts.tolist(), edges[begin].tolist(), strict=True):
                self._spans[host, tensor.name].add((first, end))


def _traffic(plan: Plan, hosts: list[int], n_readers: int, value_bytes: int) -> _Traffic:
    """What the ranks move. The first `n_readers` ranks have the file."""
    found = _Traffic(plan, hosts)
    holders: dict[str, list[int]] = defaultdict(list)
    columns: dict[tuple[str, int, int], dict[int, Part]] = defaultdict(dict)
    in_spans: set[str] = set()
    if 1 < len(hosts) == n_readers:
        of_ranks = [of_rank.parts for of_rank in plan.ranks]
        held = (part for parts in of_ranks for part in parts.values() if part.n_bytes)
        # Within a host, NVLink is fast enough to gather whole tensors where ranks hold parts.
        gathered = Counter(part.tensor.name for part in held if part.dim is None or hosts[-1] == 0)
        in_spans = found.gather_runs((name for name, count in gathered.items() if count == len(hosts)), of_ranks)
    for rank, of_rank in enumerate(plan.ranks):
        source = rank % n_readers  # a rank that has the file reads for itself
        memory = 0
        for name, part in of_rank.parts.items():
            n_bytes = part.n_bytes
            if not n_bytes:
                continue
            if value_bytes:
                memory += n_bytes + value_bytes * (part.tensor.n_elements * n_bytes // part.tensor.n_bytes)
            if name in in_spans:
                continue
            if source == rank and part.dim is None and n_bytes >= LEAST_DIVIDED:
                holders[name].append(rank)
            elif source == rank and part.dim:
                columns[name, hosts[rank], part.dim][rank] = part
            else:
                found.part(source, rank, part, n_bytes)
        found.moved[rank]["memory"] = memory
    for parts in columns.values():
        found.divide(parts)
    together: dict[tuple[int, ...], list[TensorInfo]] = defaultdict(list)
    for name, ranks in holders.items():
        together[tuple(ranks)].append(plan.ranks[ranks[0]].parts[name].tensor)
    for of_tensors, tensors in together.items():
        found.gather(of_tensors, tensors)
    found.count_batches(AGREEMENTS + (n_readers < len(hosts)) * BROADCAST)
    return found


def _steps(rings: list[tuple[int, tuple[int, ...], int]], batch_of: NDArray[np.int64]) -> Iterable[dict[int, set[int]]]:
    """For each batch, the steps of its rings in which a rank sends or receives anything."""
    found: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for batch, ranks, n_pieces in {(int(batch_of[place]), ranks, n_pieces) for place, ranks, n_pieces in rings}:
        count = len(ranks)
        for index, rank in enumerate(ranks):
            of_rank = found[batch][rank]
            if n_pieces == count:
                of_rank.update(range(count - 1))
            else:
                has_piece = [(index - step) % count < n_pieces for step in range(count)]
                of_rank.update(step for step in range(count - 1) if has_piece[step] or has_piece[step + 1])
    return found.values()


def _union(spans: set[tuple[int, int]]) -> int:
    """The number of bytes in the union of spans (first byte, end)."""
    total = reached = 0
    for first, end in sorted(spans):
        if end > reached:
            total += end - max(first, reached)
            reached = end
    return total


def _costs(moved: list[Counter[str]], distinct: list[int], hosts: list[int], machine: Machine) -> tuple[RankCost, ...]:
    """The stages of each rank. What the ranks of a host share is busy until the last of them has its bytes."""
    of_host: list[Counter[str]] = [Counter() for _ in distinct]
    for host, one in zip(hosts, moved, strict=True):
        of_host[host].update(one)
    found = []
    for rank, (host, one) in enumerate(zip(hosts, moved, strict=True)):
        shared = of_host[host]
        links = {
            "read": {
                "page cache": shared["file"] / machine.page_cache,
                "reader": one["file"] / machine.reader,
                "disk": distinct[host] / machine.disk,
            },
            "copy": {"bus": one["bus"] / machine.bus, "bus of the host": shared["bus"] / machine.host_bus},
            "exchange": {
                "NVLink": max(one["NVLink in"], one["NVLink out"]) / machine.nvlink,
                "network": max(shared["network in"], shared["network out"]) / machine.network,
            },
            "dequantize": {"device memory": one["memory"] / machine.memory},
            "wait": {"latency": one.pop("calls") * machine.latency},
        }
        bounds = {stage: max(of_stage, key=lambda link: of_stage[link]) for stage, of_stage in links.items()}
        stages = tuple(Stage(stage, links[stage][link], link) for stage, link in bounds.items())
        found.append(RankCost(rank, host, one, stages))
    return tuple(found)
