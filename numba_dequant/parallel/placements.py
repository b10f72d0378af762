"""How tensors are divided among ranks: placements, named as in PyTorch's DTensor, and rules that choose them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from numba_dequant.arguments import flag_option, whole_option
from numba_dequant.errors import OptionError, shown
from numba_dequant.format import whole_number


@dataclass(frozen=True)
class Shard:
    """Each rank holds a part of the tensor along one dimension.

    Attributes:
        dim: the dimension to cut. In a matrix, 0 means the rows and -1 the columns. In a stack of matrices, 0 means
            the matrices. Columns are cut between blocks.
        unit: number of elements along this dimension that stay together, such as those of an attention head.
        group: a name. Tensors of a layer that have the same group are cut at the same places, in proportion to their
            size. Use it for the rows of one matrix and the columns of the next matrix.
        overlaps: whether two ranks may hold the same unit. If the group is cut inside a unit, both hold that unit.

    Raises:
        OptionError: an argument has a wrong type, `unit` is less than 1, or `overlaps` is True without a `group`.
    """

    dim: int
    unit: int = 1
    group: str | None = None
    overlaps: bool = False

    def __post_init__(self) -> None:
        dim = whole_number(self.dim)
        if dim is None:
            raise OptionError(
                f"dim must be a whole number, such as 0 for rows or -1 for columns, got {shown(self.dim)}"
            )
        if not isinstance(self.group, (str, type(None))):
            raise OptionError(f"group must be a name or None, got {shown(self.group)}")
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "unit", whole_option("unit", self.unit, 1))
        object.__setattr__(self, "overlaps", flag_option("overlaps", self.overlaps))
        if self.overlaps and self.group is None:
            raise OptionError("overlaps is True, but the tensor has no group; pass group, or omit overlaps")


@dataclass(frozen=True)
class Replicate:
    """Each rank holds the whole tensor."""


Placement: TypeAlias = "Shard | Replicate"
Rule: TypeAlias = "tuple[str, Placement]"
"""A glob for tensor names, such as ``"*.ffn_up.weight"``, and the placement of these tensors."""


def checked_rules(rules: Any) -> list[Rule]:
    """The rules as a list.

    Raises:
        OptionError: they are not pairs of a pattern and a placement.
    """
    if not isinstance(rules, Iterable):
        raise OptionError(f"rules must be a list of pairs (pattern, placement), got {shown(rules)}")
    found = list(rules)
    for rule in found:
        is_pair = isinstance(rule, (tuple, list)) and len(rule) == 2
        if not (is_pair and isinstance(rule[0], str) and isinstance(rule[1], (Shard, Replicate))):
            raise OptionError(
                f"a rule is {shown(rule)}, but must be a pair (pattern, placement); pass a glob for names and a Shard "
                "or Replicate of numba_dequant.parallel"
            )
    return found


def llama_rules(metadata: Mapping[str, Any]) -> list[Rule]:
    """Rules for models whose tensors have the names of llama.cpp's llama: Llama, Mistral, Mixtral, Qwen, Gemma, ...

    The rules divide attention by heads, the feed-forward network by its inner dimension, stacks of experts by experts,
    and the token embedding and the output matrix by tokens. Every rank holds all other tensors. Several query heads
    share a key head and a value head. If there are fewer of these than ranks, some ranks hold the same ones.

    Args:
        metadata: the metadata of the model.

    Returns:
        The rules for `plan`.

    Raises:
        OptionError: `metadata` is not a mapping, or does not contain the length of an attention head.
    """
    if not isinstance(metadata, Mapping):
        raise OptionError(f"metadata must be that of a model, such as model.metadata, got {shown(metadata)}")
    head = _head_length(metadata)
    heads, shared_heads = Shard(0, head, "heads"), Shard(0, head, "heads", overlaps=True)
    rules: list[Rule] = []
    for kind in ("weight", "bias"):
        rules.append((f"blk.*.attn_q.{kind}", heads))
        rules += [(f"blk.*.attn_{name}.{kind}", shared_heads) for name in ("k", "v")]
    rules += [
        ("blk.*.attn_output.weight", Shard(-1, head, "heads")),
        ("blk.*.ffn_gate.weight", Shard(0, group="ffn")),
        ("blk.*.ffn_up.weight", Shard(0, group="ffn")),
        ("blk.*.ffn_down.weight", Shard(-1, group="ffn")),
        ("blk.*.ffn_*_exps.weight", Shard(0, group="experts")),
        ("token_embd.weight", Shard(0)),
        ("output.weight", Shard(0)),
    ]
    return rules


def _head_length(metadata: Mapping[str, Any]) -> int:
    architecture = metadata.get("general.architecture")
    length = metadata.get(f"{architecture}.attention.key_length")
    if length is None:
        width, heads = (metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "attention.head_count"))
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0:
            length = width // heads
    if not isinstance(length, int) or length < 1:
        raise OptionError(
            f"the metadata of architecture {shown(architecture)} does not contain the length of an attention head; "
            "write your own rules"
        )
    return length
