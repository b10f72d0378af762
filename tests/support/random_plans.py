"""Random plans for a small model, and the bytes that each part must have."""

import numpy as np
from blocks import random_blocks, write_model
from hypothesis import strategies as st

import numba_dequant as nd
from numba_dequant.parallel import Part, Plan, RankPlan

SHAPES = {
    "a": ("Q8_0", (7, 96)), "b": ("Q4_K", (4, 1024)), "c": ("Q4_0", (3, 2, 64)), "d": ("F32", (5, 6)),
    "e": ("F16", (40,)), "f": ("F32", (0, 3)), "g": ("Q6_K", (1, 256)),
}  # fmt: skip


def write(path):
    """The model in a file."""
    found = {}
    for name, (fmt, shape) in SHAPES.items():
        source = nd.FORMATS[fmt]
        found[name] = fmt, shape, random_blocks(fmt, source.n_bytes(shape) // source.type_size, seed=len(found))
    return write_model(path, found)


@st.composite
def parts(draw, tensor):
    """What a rank may hold of a tensor: all of it, or a range along a dimension. The last one is cut between blocks."""
    dim = draw(st.sampled_from([None, *range(len(tensor.shape))]))
    if dim is None:
        return Part(tensor)
    block = tensor.format.block_size if dim == len(tensor.shape) - 1 else 1
    ends = sorted(draw(st.tuples(*[st.integers(0, tensor.shape[dim] // block)] * 2)))
    return Part(tensor, dim, *(end * block for end in ends))


@st.composite
def cases(draw, tensors):
    count = draw(st.integers(1, 5))
    names = st.lists(st.sampled_from(sorted(tensors)), unique=True)
    held_by_all = {name: Part(tensors[name]) for name in draw(names)}
    ranks = []
    for rank in range(count):
        found = {name: draw(parts(tensors[name])) for name in draw(names)}
        ranks.append(RankPlan(rank, 0, found | held_by_all))
    hosts = draw(st.lists(st.sampled_from(["one", "two", None]), min_size=count, max_size=count).filter(any))
    return (
        Plan(tuple(ranks), ()),
        hosts,
        draw(st.sampled_from([1, 100, 1 << 20])),
        draw(st.sampled_from([1, 700, 1 << 30])),
    )


def expected(model, part):
    """The bytes of a part, cut out of the whole tensor."""
    tensor = part.tensor
    whole = model.read(tensor.name)
    if part.dim is None:
        return whole
    fmt, start, stop = tensor.format, part.start, part.stop
    size = fmt.type_size
    shape = (*tensor.shape[:-1], tensor.shape[-1] // fmt.block_size, size)
    if part.dim == len(tensor.shape) - 1:
        start, stop = start // fmt.block_size, stop // fmt.block_size
    return np.take(whole.reshape(shape), np.arange(start, stop), part.dim).reshape(-1)
