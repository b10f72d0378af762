"""A cost model: how long the ranks of a plan take to load a file, on paper. It needs no GPU and reads no file."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from typing import Literal

from numba_dequant.errors import OptionError, shown
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel.machine import Machine
from numba_dequant.parallel.plan import Plan

AGREEMENTS = 12
"""Collectives of every load: ranks exchange objects six times, each time first the sizes and then the bytes."""


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
            ``"network out"`` and ``"memory"``, which is what dequantizing reads and writes. No bytes count as 0.
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
        """Each stage of the rank that takes longest for it."""
        by_stage = zip(*(rank.stages for rank in self.ranks), strict=True)
        return tuple(max(of_ranks, key=lambda stage: stage.seconds) for of_ranks in by_stage)

    @property
    def seconds(self) -> float:
        """The time if stages run one after another, as in `load_file`. No rank goes on before all have read."""
        return self.stages[0].seconds + max(sum(stage.seconds for stage in rank.stages[1:]) for rank in self.ranks)

    @property
    def overlapped_seconds(self) -> float:
        """The time if stages overlap, as in `nd.load` to one GPU: that of the longest stage, and the latency."""
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

    The model knows rates and bytes alone. It leaves out: opening the file and making the plan; the exchange of the plan
    among the ranks, whose bytes grow with the square of their number; the allocation of memory; launches of kernels;
    rates that are lower for small pieces, or while other links are busy; latencies that grow with the number of ranks.
    A collective is a ring in the order of the ranks. So most predictions are a lower limit of the time.

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
    moved, distinct = _moved(plan, hosts, n_readers, value_bytes)
    return Prediction(_costs(moved, distinct, hosts, machine), tuple(distinct))


def _moved(plan: Plan, hosts: list[int], n_readers: int, value_bytes: int) -> tuple[list[Counter[str]], list[int]]:
    """The bytes that each rank moves, and how many different bytes of the file each host reads.

    It follows `numba_dequant.torch.distributed`. The first `n_readers` ranks have the file.
    """
    moved = [Counter(calls=AGREEMENTS) for _ in hosts]
    spans: dict[tuple[int, str], set[tuple[int, int]]] = defaultdict(set)
    holders: dict[str, list[int]] = defaultdict(list)

    def send(source: int, target: int, n_bytes: int) -> None:
        link = "NVLink" if hosts[source] == hosts[target] else "network"
        moved[source][f"{link} out"] += n_bytes
        moved[target][f"{link} in"] += n_bytes

    def read(source: int, tensor: TensorInfo, first: int, size: int) -> None:
        spans[hosts[source], tensor.name].add((first, size))
        moved[source]["file"] += size

    for rank, of_rank in enumerate(plan.ranks):
        source = rank % n_readers  # a rank that has the file reads for itself
        for name, part in of_rank.parts.items():
            tensor, n_bytes = part.tensor, part.n_bytes
            if value_bytes:
                moved[rank]["memory"] += n_bytes + value_bytes * prod(part.shape)
            if source == rank and part.dim is None:
                holders[name].append(rank)
            elif n_bytes:
                first, size = 0, tensor.n_bytes
                if part.dim == 0:  # the bytes of columns are not contiguous, so whole rows are read
                    first, size = size * part.start // tensor.shape[0], n_bytes
                read(source, tensor, first, size)
                moved[source]["bus"] += n_bytes
                if source != rank:
                    send(source, rank, n_bytes)
                    moved[source]["calls"] += 1
                    moved[rank]["calls"] += 1
    for name, of_tensor in holders.items():
        tensor = plan.ranks[of_tensor[0]].parts[name].tensor
        each = -(-tensor.n_bytes // len(of_tensor))
        for index, rank in enumerate(of_tensor):
            first, end = (min(edge * each, tensor.n_bytes) for edge in (index, index + 1))
            read(rank, tensor, first, end - first)
            moved[rank]["bus"] += end - first
            if len(of_tensor) > 1:
                send(rank, of_tensor[(index + 1) % len(of_tensor)], each * (len(of_tensor) - 1))
                moved[rank]["calls"] += 1
    distinct = [0] * (hosts[-1] + 1)
    for (host, _), of_tensor_of_host in spans.items():
        distinct[host] += _union(of_tensor_of_host)
    return moved, distinct


def _union(spans: set[tuple[int, int]]) -> int:
    """The number of bytes in the union of spans (first byte, number of bytes)."""
    total = end = 0
    for first, size in sorted(spans):
        total += max(first + size - max(first, end), 0)
        end = max(end, first + size)
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
