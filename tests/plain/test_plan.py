"""Plans: which rank holds what."""

import random
import re
from dataclasses import replace
from itertools import combinations, islice, pairwise
from math import prod

import numpy as np
import pytest
from blocks import bytes_format

import numba_dequant as nd
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.parallel import Part, Replicate, Shard, llama_rules, plan, routes

LLAMA = {"general.architecture": "llama", "llama.embedding_length": 4096, "llama.attention.head_count": 32}
SMALL_LLAMA = {"general.architecture": "llama", "llama.attention.key_length": 64}


def tensors_of(shapes, start=4096):
    """Tensors one after the other in a file: name -> format and shape."""
    found, offset = [], start
    for name, (name_of_format, shape) in shapes.items():
        fmt = nd.FORMATS[name_of_format]
        n_bytes = fmt.n_bytes(shape)
        found.append(TensorInfo(name, fmt, shape, "model.gguf", offset, n_bytes, prod(shape), "little", None))
        offset += -(-n_bytes // 32) * 32
    return found


def llama(n_layers=32, width=4096, inner=14336, kv=1024, vocabulary=128256, fmt="Q4_K", better="Q6_K", experts=0):
    """The tensors of a model; half of the layers keep two matrices in a better format."""
    shapes = {"token_embd.weight": (fmt, (vocabulary, width))}
    for layer in range(n_layers):
        of_layer = f"blk.{layer}."
        kept = better if layer % 2 else fmt
        shapes |= {
            f"{of_layer}attn_norm.weight": ("F32", (width,)), f"{of_layer}attn_q.weight": (fmt, (width, width)),
            f"{of_layer}attn_k.weight": (fmt, (kv, width)), f"{of_layer}attn_v.weight": (kept, (kv, width)),
            f"{of_layer}attn_output.weight": (fmt, (width, width)), f"{of_layer}ffn_norm.weight": ("F32", (width,)),
        }  # fmt: skip
        if experts:
            shapes |= {
                f"{of_layer}ffn_gate_inp.weight": ("F32", (experts, width)),
                f"{of_layer}ffn_gate_exps.weight": (fmt, (experts, inner, width)),
                f"{of_layer}ffn_up_exps.weight": (fmt, (experts, inner, width)),
                f"{of_layer}ffn_down_exps.weight": (kept, (experts, width, inner)),
            }
        else:
            shapes |= {
                f"{of_layer}ffn_gate.weight": (fmt, (inner, width)), f"{of_layer}ffn_up.weight": (fmt, (inner, width)),
                f"{of_layer}ffn_down.weight": (kept, (width, inner)),
            }  # fmt: skip
    return tensors_of(
        shapes | {"output_norm.weight": ("F32", (width,)), "output.weight": (better, (vocabulary, width))}
    )


def assert_every_element_once(found, tensors, stages=1):
    """Within its stage, every index of a cut dimension is held once, and bytes of different ranks do not meet."""
    width = len(found.ranks) // stages
    for tensor in tensors:
        parts = [rank.parts[tensor.name] for rank in found.ranks if tensor.name in rank.parts]
        assert len(parts) % width == 0
        assert parts
        if parts[0].dim is None:
            assert all(part.dim is None for part in parts)
            continue
        end = 0
        for start, stop in sorted((part.start, part.stop) for part in parts if part.start < part.stop):
            assert start <= end, f"elements from {end} of {tensor.name} are nowhere"
            end = max(end, stop)
        assert end == tensor.shape[parts[0].dim]
        if len(parts) == width and sum(part.n_bytes for part in parts) == tensor.n_bytes:
            pieces = sorted(piece for part in parts for piece in islice(part.byte_ranges(), 1000))
            if sum(size for _, size in pieces) == tensor.n_bytes:
                assert pieces[0][0] == tensor.offset
                assert all(start + size == after for (start, size), (after, _) in pairwise(pieces))


@pytest.mark.parametrize(
    ("world", "stages"), [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1), (64, 8), (2, 2), (4, 2), (8, 8)]
)
@pytest.mark.parametrize("experts", [0, 8], ids=["Llama-3.1-8B", "Mixtral"])
def test_models(experts, world, stages):
    vocabulary = 32000 if experts else 128256
    tensors = llama(experts=experts, vocabulary=vocabulary)
    found = plan(tensors, world, llama_rules(LLAMA), stages=stages)
    assert_every_element_once(found, tensors, stages)
    assert found.imbalance <= 0.01 or found.notes
    assert len(found.ranks) == world
    if stages == 1 and world <= 8:
        assert found.imbalance <= 0.001
        heads = [len(range(part.start, part.stop)) for part in (r.parts["blk.0.attn_q.weight"] for r in found.ranks)]
        assert set(heads) == {4096 // world}


def test_rows_of_one_matrix_belong_to_columns_of_the_next():
    tensors = tensors_of(
        {
            "blk.0.attn_q.weight": ("Q4_K", (1024, 512)), "blk.0.attn_k.weight": ("Q4_K", (256, 512)),
            "blk.0.attn_output.weight": ("Q4_K", (512, 1024)), "blk.0.ffn_up.weight": ("Q8_0", (768, 512)),
            "blk.0.ffn_down.weight": ("Q4_K", (512, 768)),
        }
    )  # fmt: skip
    found = plan(tensors, 2, llama_rules(SMALL_LLAMA))
    for rank in found.ranks:
        query, output = rank.parts["blk.0.attn_q.weight"], rank.parts["blk.0.attn_output.weight"]
        assert (query.start, query.stop) == (output.start, output.stop)
        key = rank.parts["blk.0.attn_k.weight"]
        assert (4 * key.start, 4 * key.stop) == (query.start, query.stop)
        up, down = rank.parts["blk.0.ffn_up.weight"], rank.parts["blk.0.ffn_down.weight"]
        assert (up.start, up.stop) == (down.start, down.stop)
        assert down.start % 256 == 0  # a block of Q4_K
    assert [rank.parts["blk.0.ffn_down.weight"].shape for rank in found.ranks] == [(512, 512), (512, 256)]
    names = "blk.*.ffn_down.weight and blk.*.ffn_up.weight"
    assert found.notes == (f"{names}: 3 units of 256, which is a block, cannot be divided equally among 2 ranks",)


def test_fewer_key_heads_than_ranks_are_on_several_ranks():
    tensors = tensors_of({"blk.0.attn_q.weight": ("Q8_0", (1024, 64)), "blk.0.attn_k.weight": ("Q8_0", (256, 64))})
    found = plan(tensors, 16, llama_rules(SMALL_LLAMA))
    keys = [rank.parts["blk.0.attn_k.weight"] for rank in found.ranks]
    assert [(part.start, part.stop) for part in keys] == [
        (64 * (rank // 4), 64 * (rank // 4 + 1)) for rank in range(16)
    ]
    assert not found.notes


def test_bytes_of_columns():
    (tensor,) = tensors_of({"w": ("Q4_K", (3, 512))}, start=1000)
    found = plan([tensor], 2, [("w", Shard(-1))])
    ranges = [list(rank.parts["w"].byte_ranges()) for rank in found.ranks]
    assert ranges == [[(1000, 144), (1288, 144), (1576, 144)], [(1144, 144), (1432, 144), (1720, 144)]]


def test_bytes_of_rows_and_of_matrices():
    (tensor,) = tensors_of({"w": ("Q8_0", (4, 6, 64))}, start=0)
    of_matrices = plan([tensor], 2, [("w", Shard(0))])
    assert [list(rank.parts["w"].byte_ranges()) for rank in of_matrices.ranks] == [[(0, 816)], [(816, 816)]]
    of_rows = plan([tensor], 3, [("w", Shard(1))])
    assert list(of_rows.ranks[1].parts["w"].byte_ranges()) == [(136 + 408 * number, 136) for number in range(4)]


def test_the_first_rule_counts_and_the_rest_is_on_every_rank():
    tensors = tensors_of({"a.weight": ("F32", (4, 8)), "b.weight": ("F32", (4, 8)), "c.bias": ("F32", (8,))})
    found = plan(tensors, 2, [("a.*", Replicate()), ("*.weight", Shard(0))])
    for rank in found.ranks:
        assert rank.parts["a.weight"].dim is None
        assert rank.parts["b.weight"].shape == (2, 8)
        assert rank.parts["c.bias"].shape == (8,)
    assert [rank.n_bytes for rank in found.ranks] == [128 + 64 + 32] * 2


def test_uneven_shares_go_to_the_ranks_with_the_fewest_bytes():
    tensors = tensors_of({f"blk.{layer}.w": ("Q4_K", (64, 256 * 43)) for layer in range(8)})
    found = plan(tensors, 4, [("*.w", Shard(-1))])
    assert found.imbalance == 0
    assert found.notes == ("blk.*.w: 43 units of 256, which is a block, cannot be divided equally among 4 ranks",)
    with pytest.raises(nd.ShapeError, match=r"cannot be divided equally among 4 ranks; pass another number of ranks"):
        plan(tensors, 4, [("*.w", Shard(-1))], uneven="refuse")


def test_more_ranks_than_units():
    tensors = tensors_of({"w": ("Q4_K", (2, 512))})
    found = plan(tensors, 3, [("w", Shard(0))])
    assert [rank.parts["w"].shape for rank in found.ranks] == [(1, 512), (1, 512), (0, 512)]
    assert list(found.ranks[2].parts["w"].byte_ranges()) == []
    assert found.notes == ("w: 2 rows or matrices cannot be divided equally among 3 ranks",)


def test_stages_hold_layers_in_order():
    tensors = llama(n_layers=10)
    found = plan(tensors, 4, llama_rules(LLAMA), stages=4)
    layers = [
        sorted({int(name.split(".")[1]) for name in rank.parts if name.startswith("blk.")}) for rank in found.ranks
    ]
    assert [layer for of_rank in layers for layer in of_rank] == list(range(10))
    assert "token_embd.weight" in found.ranks[0].parts
    assert {"output.weight", "output_norm.weight"} <= set(found.ranks[3].parts)
    assert len(layers[0]) < len(layers[1]), "the table of tokens counts"
    assert found.imbalance > 0.01
    assert "stages of whole layers have" in found.notes[0]


@pytest.mark.parametrize("digits", ["9" * 5000, "9" * 10], ids=len)
def test_a_number_that_no_layer_has_is_no_number_of_a_layer(digits):
    """A name comes from the file, and Python does not convert more than 4300 digits."""
    tensors = tensors_of({"blk.0.x": ("F32", (2, 4)), "blk.1.x": ("F32", (2, 4)), f"blk.{digits}.x": ("F32", (2, 4))})
    found = plan(tensors, 2, [("blk.*", Shard(0))], stages=2)
    assert [list(rank.parts) for rank in found.ranks] == [["blk.0.x", "blk.1.x"], [f"blk.{digits}.x"]]


def test_a_table_of_tokens_that_is_also_the_output_is_in_both_stages():
    tensors = [tensor for tensor in llama(n_layers=4) if tensor.name != "output.weight"]
    found = plan(tensors, 2, llama_rules(LLAMA), stages=2)
    assert all("token_embd.weight" in rank.parts for rank in found.ranks)


def test_the_largest_stage_is_as_small_as_possible():
    """Beside all ways to cut."""
    from numba_dequant.parallel.plan import _contiguous

    chance = random.Random(0)
    for _ in range(200):
        sizes = [chance.randrange(1, 50) for _ in range(chance.randrange(1, 8))]
        count, before, after = chance.randrange(1, 5), chance.randrange(60), chance.randrange(60)

        def largest(ends, sizes=sizes, before=before, after=after):
            starts, sums = [0, *ends[:-1]], []
            for start, end in zip(starts, ends, strict=True):
                sums.append(sum(sizes[start:end]))
            sums[0] += before
            sums[-1] += after
            return max(sums)

        ways = combinations(sorted([*range(len(sizes) + 1)] * (count - 1)), count - 1)
        best = min(largest([*ends, len(sizes)]) for ends in ways)
        found = _contiguous(sizes, count, before, after)
        assert len(found) == count
        assert found[-1] == len(sizes)
        assert found == sorted(found)
        assert largest(found) == best


@pytest.mark.parametrize("seed", range(40))
def test_any_model(seed):
    """Random shapes, formats, rules and ranks: every element is held, and shares are as equal as units allow."""
    chance = random.Random(seed)
    formats, rules, shapes = ["F32", "Q4_0", "Q4_K", "Q8_0", "IQ4_XS"], [], {}
    for number in range(chance.randrange(1, 12)):
        fmt = chance.choice(formats)
        columns = nd.FORMATS[fmt].block_size * chance.randrange(1, 12)
        rows = tuple(chance.randrange(1, 40) for _ in range(chance.randrange(3)))
        name = f"blk.{chance.randrange(4)}.w{number}" if chance.random() < 0.7 else f"w{number}"
        shapes[name] = (fmt, (*rows, columns))
        if chance.random() < 0.8:
            rules.append((name, Shard(chance.randrange(-1 - len(rows), 1 + len(rows)), chance.choice([1, 1, 2, 5]))))
    tensors, world = tensors_of(shapes), chance.randrange(1, 9)
    stages = chance.choice([each for each in range(1, world + 1) if world % each == 0])
    found = plan(tensors, world, rules, stages=stages)
    assert_every_element_once(found, tensors, stages)
    for rank in found.ranks:
        assert rank.n_bytes == sum(sum(size for _, size in part.byte_ranges()) for part in rank.parts.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": 0}, "world must be a whole number, 1 or more, got 0"),
        ({"world": "two"}, "world must be a whole number, 1 or more, got 'two'"),
        ({"world": 2.0}, "world must be a whole number, 1 or more, got 2.0"),
        ({"stages": True}, "stages must be a whole number, 1 or more, got True"),
        ({"world": 1 << 40}, "world is 1099511627776; pass at most 65536 ranks"),
        ({"world": 4, "stages": 3}, "4 ranks cannot be divided into 3 stages; pass as world a multiple of stages"),
        ({"uneven": "no"}, "uneven is 'no'; pass 'allow' or 'refuse'"),
        ({"uneven": []}, "uneven is []; pass 'allow' or 'refuse'"),
        ({"tensors": 3}, "tensors must be those of a model, such as model.tensors.values(), but has 3"),
        ({"tensors": {"w": 1}}, "tensors must be those of a model, such as model.tensors.values(), but has 'w'"),
        ({"rules": 3}, "rules must be a list of pairs (pattern, placement), got 3"),
        ({"rules": {"*": Shard(0)}}, "a rule is '*', but must be a pair (pattern, placement); pass a glob for names"),
        ({"rules": ["ab"]}, "a rule is 'ab', but must be a pair (pattern, placement); pass a glob for names"),
        ({"rules": [(1, Shard(0))]}, "a rule is (1, Shard("),
        ({"rules": [("w", 0)]}, "a rule is ('w', 0), but must be a pair (pattern, placement); pass a glob for names"),
        ({"rules": [("w", Shard)]}, "a rule is ('w', <class 'numba_dequant.parallel.placements.Shard'>), but must be"),
    ],
)
def test_wrong_arguments(arguments, message):
    right = {"tensors": tensors_of({"w": ("F32", (4, 8))}), "world": 2, "rules": []}
    with pytest.raises(nd.OptionError, match=re.escape(message)):
        plan(**right | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": 0}, "unit must be a whole number, 1 or more, got 0"),
        ({"unit": 1.5}, "unit must be a whole number, 1 or more, got 1.5"),
        ({"unit": True}, "unit must be a whole number, 1 or more, got True"),
        ({"unit": "a"}, "unit must be a whole number, 1 or more, got 'a'"),
        ({"dim": None}, "dim must be a whole number, such as 0 for rows or -1 for columns, got None"),
        ({"dim": False}, "dim must be a whole number, such as 0 for rows or -1 for columns, got False"),
        ({"group": ["ffn"]}, "group must be a name or None, got ['ffn']"),
        ({"overlaps": 1, "group": "ffn"}, "overlaps must be True or False, got 1"),
        ({"overlaps": True}, "overlaps is True, but the tensor has no group; pass group, or omit overlaps"),
    ],
)
def test_wrong_placements(arguments, message):
    with pytest.raises(nd.OptionError, match=re.escape(message)):
        Shard(**{"dim": 0} | arguments)


def test_numbers_and_rules_of_other_types():
    tensors = tensors_of({"a": ("F32", (4, 8)), "b": ("F32", (4, 8))})
    placement = Shard(np.int64(0), np.uint8(2))
    assert type(placement.dim) is type(placement.unit) is int
    found = plan(iter(tensors), np.int32(2), iter([("*", placement)]), stages=np.int8(1))
    assert found == plan(tensors, 2, [["*", Shard(0, 2)]])


@pytest.mark.parametrize("shape", [(6, 512), (3, 4, 256), (0, 256), (4, 0)])
def test_the_bytes_of_a_part(shape):
    (tensor,) = tensors_of({"w": ("Q4_K", shape)})
    for dim, extent in enumerate(shape):
        step = 256 if dim == len(shape) - 1 else 1
        for start, stop in combinations(range(0, extent + 1, step), 2):
            part = Part(tensor, dim, start, stop)
            assert part.n_bytes == nd.FORMATS["Q4_K"].n_bytes(part.shape)
    assert Part(tensor, len(shape) - 1, 0, 0).n_bytes == 0
    with pytest.raises(nd.ShapeError, match="a row of a Q4_K tensor is a whole number of blocks of 256 elements"):
        _ = Part(tensor, len(shape) - 1, 0, 128).n_bytes


def test_wrong_rules():
    tensors = tensors_of({"blk.0.a": ("F32", (4, 8)), "blk.0.b": ("F32", (6, 8)), "c": ("F32", (8,))})
    with pytest.raises(nd.ShapeError, match=r"'c' of shape \(8,\) has no dimension 1; pass another dim in the"):
        plan(tensors, 2, [("c", Shard(1))])
    with pytest.raises(
        nd.ShapeError, match=r"'blk\.0\.a' has 4 elements along the dimension to cut, but another tensor"
    ):
        plan(tensors, 2, [("blk.*", Shard(0, group="g"))])
    with pytest.raises(nd.OptionError, match="does not contain the length of an attention head; write your own rules"):
        llama_rules({"general.architecture": "t5"})
    with pytest.raises(nd.OptionError, match=r"metadata must be that of a model, such as model\.metadata, got None"):
        llama_rules(None)


@pytest.mark.parametrize(
    ("shape", "dim", "units"), [((8, 4, 3, 32), 2, 1), ((8, 2, 16, 3), 1, None), ((4, 8, 8), 1, 4)]
)
def test_cuts_are_between_blocks(shape, dim, units):
    """Programs may give a tensor a shape whose rows are not whole blocks."""
    (tensor,) = tensors_of({"w": ("F32", shape)})
    tensor = tensor._replace(format=nd.FORMATS["Q8_0"], n_bytes=nd.FORMATS["Q8_0"].n_bytes((tensor.n_elements,)))
    if units is None:
        tensor = tensor._replace(shape=(8, 4, 3, 3), n_elements=288)
        with pytest.raises(nd.ShapeError, match=r"'w' of shape .* cannot be cut along dimension 1, because a block"):
            plan([tensor], 2, [("w", Shard(dim))])
        return
    for rank in plan([tensor], 2, [("w", Shard(dim))]).ranks:
        part = rank.parts["w"]
        assert part.start % units == part.stop % units == 0


def test_layers_of_two_networks_are_not_one_group():
    tensors = tensors_of({"enc.blk.0.up": ("F32", (8, 4)), "dec.blk.0.up": ("F32", (12, 4))})
    found = plan(tensors, 2, [("*.up", Shard(0, group="ffn"))])
    assert [part.stop - part.start for part in found.ranks[0].parts.values()] == [4, 6]


def test_formats_of_one_name_are_cut_apart():
    """They may have blocks of different sizes. What is known of one must not be used for the other."""
    formats = {"small": bytes_format(32), "large": replace(bytes_format(64), name="BYTES_32")}
    tensors = [
        TensorInfo(name, fmt, (2, 192), "model.gguf", 0, fmt.n_bytes((2, 192)), 384, "little", None)
        for name, fmt in formats.items()
    ]
    found = plan(tensors, 2, [("*", Shard(-1))])
    bounds = [[(part.start, part.stop) for part in rank.parts.values()] for rank in found.ranks]
    assert bounds in ([[(0, 96), (0, 128)], [(96, 192), (128, 192)]], [[(0, 96), (0, 64)], [(96, 192), (64, 192)]])
    for rank in found.ranks:
        for part in rank.parts.values():
            assert part.n_bytes == part.tensor.format.n_bytes(part.shape)
    model = {tensor.name: tensor for tensor in tensors}
    shares = routes.shares_of(found, model)
    assert [[share.n_bytes for share in of_rank] for of_rank in shares] == [
        [part.n_bytes for part in rank.parts.values()] for rank in found.ranks
    ]
