"""Which rank holds which rows, columns and bytes of each tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from itertools import accumulate
from math import gcd, lcm, prod
from operator import add
from typing import Any, Literal, NamedTuple

from numba_dequant.arguments import whole_option
from numba_dequant.display import cell
from numba_dequant.errors import OptionError, ShapeError, shown
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel.placements import Placement, Replicate, Rule, Shard, checked_rules

NOTED = 10
"""Maximum names in a note."""

LAYER = re.compile(r"(?:^|\.)blk\.([0-9]{1,9})\.")
"""No model has a layer number of ten digits; Python cannot convert more than 4300 digits."""

MAX_RANKS = 1 << 16
OF_FIRST_STAGE = ("token_embd", "position_embd", "token_types")
OF_EVERY_STAGE = ("rope_",)
TOKENS, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor.

    Attributes:
        tensor: the tensor.
        dim: the dimension along which it is cut, or None if the rank holds the whole tensor.
        start: the first index along this dimension.
        stop: the index after the last one.
    """

    tensor: TensorInfo
    dim: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        shape = self.tensor.shape
        return shape if self.dim is None else (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])

    @property
    def n_bytes(self) -> int:
        """The number of bytes of compressed data.

        Raises:
            ShapeError: the part ends within a block.
        """
        tensor, dim = self.tensor, self.dim
        if dim is None:
            return tensor.n_bytes
        extent, count = tensor.shape[dim], self.stop - self.start
        if extent and (dim < len(tensor.shape) - 1 or count % tensor.format.block_size == 0):
            return tensor.n_bytes * count // extent
        return tensor.format.n_bytes(self.shape)

    def byte_ranges(self) -> Iterator[tuple[int, int]]:
        """The position in the file and the number of bytes of each contiguous piece, in the order of the file.

        A part of rows is one piece. A part of columns has one piece for each row, unless it has all columns.
        """
        tensor = self.tensor
        if not self.n_bytes:
            return
        if self.dim is None:
            yield tensor.offset, tensor.n_bytes
            return
        times = prod(tensor.shape[: self.dim])
        step, size = tensor.n_bytes // times, self.n_bytes // times
        first = tensor.offset + step * self.start // tensor.shape[self.dim]
        if size == step:
            yield first, self.n_bytes
            return
        for number in range(times):
            yield first + number * step, size


@dataclass
class RankPlan:
    """What one rank holds.

    Attributes:
        rank: the number of the rank.
        stage: the number of its pipeline stage.
        parts: name of the tensor -> part. A part may be empty.
    """

    rank: int
    stage: int
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """The number of bytes of compressed data."""
        return sum(part.n_bytes for part in self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What each rank holds.

    Attributes:
        ranks: the plans of all ranks, in order. The ranks of a stage have consecutive numbers.
        notes: sentences that say why shares are not equal.
    """

    ranks: tuple[RankPlan, ...]
    notes: tuple[str, ...]

    @property
    def imbalance(self) -> float:
        """By how much the largest share exceeds the mean share, divided by the mean share; 0 if all are equal."""
        sizes = [rank.n_bytes for rank in self.ranks]
        return max(sizes) * len(sizes) / sum(sizes) - 1 if any(sizes) else 0.0

    def __str__(self) -> str:
        lines = [
            f"rank {rank.rank}, stage {rank.stage}: {len(rank.parts)} tensors, {rank.n_bytes:,} bytes"
            for rank in self.ranks
        ]
        return "\n".join([*lines, f"the largest share exceeds the mean by {self.imbalance:.2%}", *self.notes])


def plan(
    tensors: Iterable[TensorInfo],
    world: int,
    rules: Sequence[Rule],
    *,
    stages: int = 1,
    uneven: Literal["allow", "refuse"] = "allow",
) -> Plan:
    """Divide the tensors of a model among ranks.

    The first rule whose pattern matches the name of a tensor decides about it. If no rule matches, every rank of the
    stage holds the whole tensor.

    Args:
        tensors: the tensors, in the order of the file.
        world: the number of ranks.
        rules: pairs (pattern of names, placement).
        stages: the number of pipeline stages. The layers (``blk.0.``, ``blk.1.``, ...) are divided among the stages in
            order. The ``world // stages`` ranks of a stage divide its tensors. The first stage also has the embeddings
            of tokens, positions and token types, every stage has the ``rope_`` tensors, and the last stage has all
            other tensors outside the layers. If the file has no ``output.weight``, the last stage has the token
            embedding, too.
        uneven: what to do if a tensor cannot be divided into equal parts. ``"allow"`` gives one unit more to the ranks
            that have the fewest bytes so far. ``"refuse"`` raises an error.

    Returns:
        The plan. ``print(plan)`` shows the bytes of each rank.

    Raises:
        OptionError: an argument has a wrong type, `world` or `stages` is less than 1, `world` is more than 65536 or
            not a multiple of `stages`, or `uneven` is wrong.
        ShapeError: a tensor cannot be divided as its rule says, or cannot be divided equally (``"refuse"``).
    """
    if not isinstance(uneven, str) or uneven not in ("allow", "refuse"):
        raise OptionError(f"uneven is {shown(uneven)}; pass 'allow' or 'refuse'")
    world, stages = whole_option("world", world, 1), whole_option("stages", stages, 1)
    if world > MAX_RANKS:
        raise OptionError(f"world is {world}; pass at most {MAX_RANKS} ranks")
    if world % stages:
        raise OptionError(f"{world} ranks cannot be divided into {stages} stages; pass as world a multiple of stages")
    rules = checked_rules(rules)
    every = list(tensors) if isinstance(tensors, Iterable) else [tensors]
    wrong = next((each for each in every if not isinstance(each, TensorInfo)), None)
    if wrong is not None:
        raise OptionError(f"tensors must be those of a model, such as model.tensors.values(), but has {shown(wrong)}")
    width = world // stages
    ranks = tuple(RankPlan(rank, rank // width) for rank in range(world))
    notes: dict[str, None] = {}
    for stage, group in enumerate(_stages(every, stages, notes)):
        _Divider(ranks[stage * width : (stage + 1) * width], rules, notes, refuses=uneven == "refuse").divide(group)
    return Plan(ranks, tuple(notes))


def _stages(tensors: list[TensorInfo], count: int, notes: dict[str, None]) -> list[list[TensorInfo]]:
    """The tensors of each stage."""
    if count == 1:
        return [tensors]
    layers: dict[int, list[TensorInfo]] = defaultdict(list)
    found: list[list[TensorInfo]] = [[] for _ in range(count)]
    first, last = [], []
    for tensor in tensors:
        match = LAYER.search(tensor.name)
        if match:
            layers[int(match[1])].append(tensor)
        elif tensor.name.startswith(OF_EVERY_STAGE):
            for of_stage in found:
                of_stage.append(tensor)
        elif tensor.name.startswith(OF_FIRST_STAGE):
            first.append(tensor)
        else:
            last.append(tensor)
    if all(tensor.name != OUTPUT for tensor in last):
        # The model then uses the token embedding as its output matrix, too.
        last += [tensor for tensor in first if tensor.name == TOKENS]
    pieces = [layers[number] for number in sorted(layers)]
    if len(pieces) < count:
        notes[f"there are {len(pieces)} layers for {count} stages, so some stages have no layer"] = None
    sizes = [sum(tensor.n_bytes for tensor in piece) for piece in pieces]
    before, after = (sum(tensor.n_bytes for tensor in end) for end in (first, last))
    ends = _contiguous(sizes, count, before, after)
    start = 0
    for stage, end in enumerate(ends):
        found[stage] += [tensor for piece in pieces[start:end] for tensor in piece]
        start = end
    found[0] = first + found[0]
    found[-1] += last
    shares = [sum(tensor.n_bytes for tensor in of_stage) for of_stage in found]
    if max(shares) * count > 1.01 * sum(shares):
        notes[f"stages of whole layers have {min(shares):,} to {max(shares):,} bytes"] = None
    return found


def _contiguous(sizes: list[int], count: int, before: int, after: int) -> list[int]:
    """The ends of `count` consecutive runs of `sizes` whose largest sum is as small as possible.

    `before` is added to the sum of the first run, and `after` to that of the last run.
    """

    def ends_within(limit: int) -> list[int] | None:
        ends, total = [], before
        for index, size in enumerate(sizes):
            while total + size > limit:
                ends.append(index)
                total = 0
                if len(ends) == count:
                    return None
            total += size
        if len(ends) == count - 1 and total + after > limit:
            return None
        return ends + [len(sizes)] * (count - len(ends))

    low, high = max([before, after, *sizes]), before + after + sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ends_within(middle) is not None else (middle + 1, high)
    found = ends_within(low)
    assert found is not None
    return found


class _Cut(NamedTuple):
    """Where a tensor is cut: along which dimension, and for each rank the start, the stop and the bytes."""

    dim: int
    bounds: list[tuple[int, int]]
    sizes: list[int]


class _Divider:
    """The division of the tensors of one stage among its ranks."""

    def __init__(
        self, ranks: Sequence[RankPlan], rules: Sequence[Rule], notes: dict[str, None], *, refuses: bool
    ) -> None:
        self._ranks, self._notes, self._refuses = ranks, notes, refuses
        # One expression for all rules, because a model has thousands of names. Each rule is one of its groups.
        patterns = [f"({translate(pattern)})" for pattern, _ in rules]
        self._match = re.compile("|".join(patterns) or "(?!)").match
        n_groups = accumulate((re.compile(pattern).groups for pattern in patterns), initial=1)
        self._placements = dict(zip(n_groups, (placement for _, placement in rules), strict=False))
        self._sizes = [0] * len(ranks)
        # What layers have in common: the shapes, formats and placements of tensors -> their bounds and bytes.
        self._known: dict[tuple[Any, ...], list[_Cut]] = {}

    def divide(self, tensors: list[TensorInfo]) -> None:
        """Give each rank its parts."""
        placements = {tensor.name: self._placement(tensor) for tensor in tensors}
        shards = {name: each for name, each in placements.items() if isinstance(each, Shard)}
        groups: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
        for tensor in tensors:
            placement = placements[tensor.name]
            if isinstance(placement, Shard) and placement.group is not None:
                groups[self._layer(tensor), placement.group].append(tensor)
        parts: dict[str, list[Part]] = {}
        for tensor in tensors:
            placement = placements[tensor.name]
            if tensor.name in parts:
                continue
            if isinstance(placement, Replicate):
                parts[tensor.name] = [Part(tensor)] * len(self._ranks)
            elif placement.group is None:
                parts |= self._cut([tensor], shards)
            else:
                parts |= self._cut(groups[self._layer(tensor), placement.group], shards)
        for rank, plan_of_rank in enumerate(self._ranks):
            plan_of_rank.parts.update({tensor.name: parts[tensor.name][rank] for tensor in tensors})

    def _placement(self, tensor: TensorInfo) -> Placement:
        match = self._match(tensor.name)
        placement = Replicate() if match is None else self._placements[match.lastindex or 0]
        if isinstance(placement, Shard) and not -len(tensor.shape) <= placement.dim < len(tensor.shape):
            raise ShapeError(
                f"{shown(tensor.name)} of shape {tensor.shape} has no dimension {placement.dim}; pass another dim in "
                "the placement for it"
            )
        return placement

    def _layer(self, tensor: TensorInfo) -> str:
        match = LAYER.search(tensor.name)
        return tensor.name[: match.end()] if match else ""

    def _cut(self, tensors: list[TensorInfo], shards: dict[str, Shard]) -> dict[str, list[Part]]:
        """The parts of tensors that are cut at the same places."""
        # Two formats of one's own may have one name, so the objects are compared.
        key = tuple((tensor.shape, id(tensor.format), shards[tensor.name]) for tensor in tensors)
        cuts = self._known.get(key)
        if cuts is None:
            cuts, is_even = self._new_cuts(tensors, [shards[tensor.name] for tensor in tensors])
            if is_even:  # otherwise the cuts depend on what the ranks have so far
                self._known[key] = cuts
        found: dict[str, list[Part]] = {}
        for tensor, (dim, bounds, sizes) in zip(tensors, cuts, strict=True):
            found[tensor.name] = [Part(tensor, dim, start, stop) for start, stop in bounds]
            self._sizes = list(map(add, self._sizes, sizes))
        return found

    def _new_cuts(self, tensors: list[TensorInfo], shards: list[Shard]) -> tuple[list[_Cut], bool]:
        """The cuts of tensors that are cut at the same places, and whether all ranks get equal parts."""
        extents = [tensor.shape[shard.dim] for tensor, shard in zip(tensors, shards, strict=True)]
        units = [self._unit(tensor, shard) for tensor, shard in zip(tensors, shards, strict=True)]
        whole = max(extents)
        unit = 1
        for tensor, shard, extent, own in zip(tensors, shards, extents, units, strict=True):
            if extent and whole % extent == 0 and not shard.overlaps:
                unit = lcm(unit, own * (whole // extent))
            elif extent and whole % extent:
                raise ShapeError(
                    f"{shown(tensor.name)} has {extent} elements along the dimension to cut, but another tensor of its "
                    f"group {shard.group!r} has {whole}, which is not a multiple of that; change the rules"
                )
        places, is_even = self._places(tensors, whole, unit)
        found: list[_Cut] = []
        for tensor, shard, extent, own in zip(tensors, shards, extents, units, strict=True):
            dim, ratio = shard.dim % len(tensor.shape), max(whole // max(extent, 1), 1)
            bounds = [
                (start // ratio // own * own, min(-(-stop // (ratio * own)) * own, extent)) if start < stop else (0, 0)
                for start, stop in places
            ]
            found.append(_Cut(dim, bounds, [Part(tensor, dim, *each).n_bytes for each in bounds]))
        return found, is_even

    def _unit(self, tensor: TensorInfo, shard: Shard) -> int:
        """The elements that stay together, so that cuts are between blocks."""
        dim, block_size = shard.dim % len(tensor.shape), tensor.format.block_size
        inner = prod(tensor.shape[dim + 1 :])
        if dim and tensor.n_elements and tensor.shape[dim] * inner % block_size:
            raise ShapeError(
                f"{shown(tensor.name)} of shape {tensor.shape} cannot be cut along dimension {dim}, because a block of "
                f"{tensor.format.name} has elements of several indices before it; pass dim=0 or Replicate"
            )
        return lcm(shard.unit, block_size // gcd(block_size, inner) if inner else 1)

    def _places(self, tensors: list[TensorInfo], whole: int, unit: int) -> tuple[list[tuple[int, int]], bool]:
        """Where each rank's part starts and ends, in elements of the longest tensor, and whether all are equal."""
        count = len(self._ranks)
        n_units = -(-whole // unit)
        each, more = divmod(n_units, count)
        is_even = not more and not (whole % unit and count > 1)
        if not is_even:
            self._note_uneven(tensors, n_units, unit, count)
        least = set(sorted(range(count), key=lambda rank: (self._sizes[rank], rank))[:more])
        found, start = [], 0
        for rank in range(count):
            stop = start + each + (rank in least)
            found.append((min(start * unit, whole), min(stop * unit, whole)))
            start = stop
        return found, is_even

    def _note_uneven(self, tensors: list[TensorInfo], n_units: int, unit: int, count: int) -> None:
        every = sorted({cell(LAYER.sub("blk.*.", tensor.name)) for tensor in tensors})
        more = [f"{len(every) - NOTED:,} more"] if len(every) > NOTED else []
        names = " and ".join([*every[:NOTED], *more])
        is_block = unit in {tensor.format.block_size for tensor in tensors}
        what = f"units of {unit}{', which is a block,' * is_block}" if unit > 1 else "rows or matrices"
        sentence = f"{names}: {n_units} {what} cannot be divided equally among {count} ranks"
        if self._refuses:
            raise ShapeError(f"{sentence}; pass another number of ranks, or uneven='allow'")
        self._notes[sentence] = None
