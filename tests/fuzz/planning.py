"""A target for plans: which rank holds what, and loads by a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import structured
from choices import Choices
from common import check_said
from computing import Scope, on_host
from loading import ids_of

import numba_dequant as nd
from numba_dequant.parallel import Plan, Replicate, Shard, plan

GLOBS = ["*", "blk.*", "*.weight", "token*", "ids", "[a-z]", "t", "*attn*", "output.weight", "*9*", ""]


def rules_of(choices: Choices) -> list[tuple[str, Any]]:
    """Rules, some of which fit no tensor."""
    rules: list[tuple[str, Any]] = []
    for _ in range(choices.below(4)):
        group = choices.pick([None, None, "a", "b"])
        overlaps = group is not None and choices.one_in(4)
        shard = Shard(choices.pick([0, 0, 0, -1, 1, 2, -2]), choices.pick([1, 1, 2, 32, 7]), group, overlaps)
        rules.append((choices.pick(GLOBS), Replicate() if choices.one_in(6) else shard))
    return rules


def described(choices: Choices) -> structured.File:
    """A file in whose layers are tensors of the same shape."""
    file = structured.valid(choices, ids_of(Scope.formats))
    for layer in choices.pick([[], [0, 1], [0, 1, 2, 10], ["9" * 5000], ["9" * 9, "01", 1]]):
        tensor = structured.tensor(choices, f"blk.{layer}.x", ids_of(Scope.formats))
        file.tensors += [tensor, structured.Tensor(tensor.name + b"y", tensor.kind, tensor.shape, tensor.data)]
    return file


def bytes_of(content: bytes, part: Any) -> bytes:
    """The bytes of a part, piece by piece."""
    found = b""
    for position, count in part.byte_ranges():
        assert part.tensor.offset <= position <= position + count <= part.tensor.offset + part.tensor.n_bytes
        found += content[position : position + count]
    return found


def check_parts(found: Plan, rules: list[tuple[str, Any]], tensors: dict[str, Any]) -> None:
    """Each tensor is held as a whole: by each rank of a stage, or in parts that follow one another."""
    overlaps = any(isinstance(placement, Shard) and placement.overlaps for _, placement in rules)
    held: dict[str, list[Any]] = {}
    for rank in found.ranks:
        for name, part in rank.parts.items():
            held.setdefault(name, []).append(part)
    assert held.keys() == tensors.keys()
    for name, parts in held.items():
        if parts[0].dim is None:
            assert all(part.shape == tensors[name].shape for part in parts)
        elif not overlaps and name != "token_embd.weight":  # the last stage may have the embedding again
            ends = sorted((part.start, part.stop) for part in parts if part.start < part.stop)
            assert [start for start, _ in ends[1:]] == [stop for _, stop in ends[:-1]], ends
            assert sum(stop - start for start, stop in ends) == tensors[name].shape[parts[0].dim], (name, ends)


def plans(data: bytes) -> str:
    """A plan divides all, and each device gets the bytes of its part."""
    choices = Choices(data)
    content = described(choices).content()
    model = nd.open(bytearray(content))
    rules, world = rules_of(choices), choices.pick([1, 2, 3, 4, 7])
    stages, uneven = choices.pick([1, 1, 2, world]), choices.pick(["allow", "allow", "refuse"])
    try:
        found = plan(model.tensors.values(), world, rules, stages=stages, uneven=uneven)
    except (nd.ShapeError, nd.OptionError) as error:
        check_said(error)
        return "refused"
    check_parts(found, rules, dict(model.tensors))
    assert found.imbalance >= 0
    str(found)
    if any(tensor.byte_order == "big" for tensor in model.tensors.values()) or choices.one_in(2):
        return "planned"
    results = model.load_all(device=[choices.pick(Scope.devices[:1])] * world, plan=found, keep_quantized=True)
    for rank, parts in zip(found.ranks, results, strict=True):
        assert list(parts) == [name for name in model.tensors if name in rank.parts]
        for name, result in parts.items():
            raw = bytes_of(content, rank.parts[name])
            assert tuple(result.shape) == rank.parts[name].shape, name
            blocks = on_host(getattr(result, "data", result) if isinstance(result, nd.QuantizedTensor) else result)
            kept = isinstance(result, nd.QuantizedTensor)
            assert not kept or np.ascontiguousarray(blocks).view(np.uint8).tobytes() == raw, name
    return "loaded"
