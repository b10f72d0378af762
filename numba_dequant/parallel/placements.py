"""How tensors are divided among ranks: placements, in the words of PyTorch's DTensor, and rules that choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from numba_dequant.errors import OptionError, shown


@dataclass(frozen=True)
class Shard:
    """Each rank holds a part of the tensor along one dimension.

    Attributes:
        dim: the dimension: of a matrix, 0 are its rows and -1 its columns; of a stack of matrices, 0 are the matrices.
            Columns are cut between blocks.
        unit: elements along this dimension that stay together, such as those of an attention head.
        group: tensors of a layer with the same group are cut at the same places, in proportion to their size. The rows
            of one matrix can so belong to the columns of the next.
        overlaps: whether two ranks may hold the same unit, where a cut of the group falls inside it.
    """

    dim: int
    unit: int = 1
    group: str | None = None
    overlaps: bool = False

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise OptionError(f"unit is {self.unit}; it must be at least 1")
        if self.overlaps and self.group is None:
            raise OptionError("overlaps needs a group: a tensor without one is cut between its own units")


@dataclass(frozen=True)
class Replicate:
    """Each rank holds the whole tensor."""


Placement: TypeAlias = "Shard | Replicate"
Rule: TypeAlias = "tuple[str, Placement]"
"""A pattern of tensor names, as in a shell, and how such tensors are placed."""


def llama_rules(metadata: Mapping[str, Any]) -> list[Rule]:
    """Rules for models whose tensors have the names of llama.cpp's llama: Llama, Mistral, Mixtral, Qwen, Gemma, ...

    Attention is cut between heads, the layers of the feed-forward network between columns of its inner dimension,
    experts between experts, and the two tables of tokens between tokens. All others are on every rank. Key and value
    heads are shared by several query heads; if there are fewer of them than ranks, some ranks hold the same ones.

    Args:
        metadata: the metadata of the model.

    Raises:
        OptionError: the metadata does not say how long a head is.
    """
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
            f"the metadata of architecture {shown(architecture)} does not say how long an attention head is; pass "
            "rules of your own"
        )
    return length
