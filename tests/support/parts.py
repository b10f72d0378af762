"""A small model whose tensors are divided in all ways, and what each device or rank must hold of it."""

import numpy as np
from blocks import assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant.parallel import Shard, plan

SHAPES = {
    "token_embd": ("Q8_0", (13, 64)), "blk.0.norm": ("F32", (7,)), "blk.0.rows": ("Q4_K", (6, 512)),
    "blk.0.columns": ("Q4_K", (5, 1280)), "blk.0.whole": ("Q6_K", (30, 256)), "blk.1.norm": ("F32", (64,)),
    "blk.1.experts": ("Q4_0", (4, 3, 64)), "blk.1.columns": ("Q8_0", (4, 2, 96)), "empty": ("F32", (0,)),
    "output": ("F16", (9, 4)),
}  # fmt: skip
RULES = [
    ("token_embd", Shard(0)), ("*.rows", Shard(0)), ("*.columns", Shard(-1)), ("*.experts", Shard(0)),
    ("output", Shard(0)),
]  # fmt: skip


def write(path):
    """The model in a file."""
    found = {}
    for name, (fmt, shape) in SHAPES.items():
        source = nd.FORMATS[fmt]
        found[name] = fmt, shape, random_blocks(fmt, source.n_bytes(shape) // source.type_size)
    return write_model(path, found)


def planned(world, stages=1):
    return lambda model: plan(model.tensors.values(), world, RULES, stages=stages)


def assert_parts(path, found, of_plan, *, blocks=False):
    """Each device has its parts of the whole tensors, and nothing else."""
    with nd.open(path) as model:
        for parts, rank in zip(found, of_plan(model).ranks, strict=True):
            assert list(parts) == list(rank.parts)
            for name, part in rank.parts.items():
                fmt, shape = part.tensor.format, part.tensor.shape
                if blocks:
                    whole, got = model.read(name).reshape(*shape[:-1], -1), parts[name].data
                    assert (parts[name].format, parts[name].shape) == (fmt, part.shape)
                else:
                    whole, got = model.load(name, device="reference"), parts[name]
                if part.dim is not None:
                    size = fmt.type_size if blocks and part.dim == len(shape) - 1 else 1
                    per = fmt.block_size if size > 1 else 1
                    ends = (end // per * size for end in (part.start, part.stop))
                    whole = np.take(whole, np.arange(*ends), part.dim)
                values = np.asarray(got.copy_to_host() if hasattr(got, "copy_to_host") else got)
                assert_same_bits(np.ascontiguousarray(values.reshape(whole.shape)), np.ascontiguousarray(whole))
