"""Dequantization in eager PyTorch as a user would write it by hand: in float32, in GGML's order, rounded at the end.

`DEQUANTIZERS` take uint8 blocks (n_blocks, type_size) and the output type, and give values (n_blocks, block_size).
"""

from collections.abc import Callable
from functools import cache

import torch

from numba_dequant import FORMATS
from numba_dequant.formats._codebooks import FP4_DOUBLED_VALUES, IQ4_NL_VALUES

IQ4 = tuple(IQ4_NL_VALUES.items.tolist())
FP4_DOUBLED = tuple(FP4_DOUBLED_VALUES.items.tolist())
HALVED_POWERS = tuple(2.0 ** (exponent - 128) for exponent in range(256))


@cache
def constant(values, dtype, device):
    """A tensor of constants, copied to the device once rather than in every call."""
    return torch.tensor(values, dtype=dtype, device=device)


def lookup(values, indexes, dtype=torch.int8):
    # Indexing with brackets would turn the indexes into int64: twice the memory traffic.
    return constant(values, dtype, indexes.device).index_select(0, indexes.flatten().int()).view(indexes.shape)


def unpack(packed, bits):
    """The numbers of `bits` bits in every byte, lowest first, along a new axis before the last."""
    shifts = constant(range(0, 8, bits), torch.uint8, packed.device)
    return (packed.unsqueeze(-2) >> shifts[:, None]) & ((1 << bits) - 1)


def apart(packed, bits):
    """The numbers in bytes of shape (n, bytes): first the lowest number of every byte, then the next of every byte."""
    return unpack(packed, bits).flatten(1)


def adjacent(packed, bits):
    """The numbers in bytes of shape (n, bytes): first all numbers of the first byte, then those of the next byte."""
    return unpack(packed.unsqueeze(-1), bits).flatten(1)


def centred(numbers, centre):
    return numbers.view(torch.int8) - centre


def scales_and_minima(packed):
    first, second, third = packed.chunk(3, dim=1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return scales, minima


def q2_k(scales, qs, d, dmin):
    quants = unpack(qs.unflatten(1, (2, 32)), 2).view(-1, 16, 16)
    return (d * (scales & 15))[:, :, None] * quants - (dmin * (scales >> 4))[:, :, None]


def q3_k(hmask, qs, scales, d):
    scales = apart(scales[:, :8], 4) | (apart(scales[:, 8:], 2) << 4)
    low = unpack(qs.unflatten(1, (2, 32)), 2).view(-1, 16, 16)
    high = unpack(hmask, 1).view(-1, 16, 16)
    return (d * centred(scales, 32))[:, :, None] * centred(low | (high << 2), 4)


def q4_k(d, dmin, scales, qs):
    scales, minima = scales_and_minima(scales)
    quants = unpack(qs.unflatten(1, (4, 32)), 4).view(-1, 8, 32)
    return (d * scales)[:, :, None] * quants - (dmin * minima)[:, :, None]


def q5_k(d, dmin, scales, qh, qs):
    scales, minima = scales_and_minima(scales)
    quants = unpack(qs.unflatten(1, (4, 32)), 4).view(-1, 8, 32) | (unpack(qh, 1) << 4)
    return (d * scales)[:, :, None] * quants - (dmin * minima)[:, :, None]


def q6_k(ql, qh, scales, d):
    low = unpack(ql.unflatten(1, (2, 64)), 4).view(-1, 16, 16)
    high = unpack(qh.unflatten(1, (2, 32)), 2).view(-1, 16, 16)
    return (d * scales)[:, :, None] * centred(low | (high << 4), 32)


def iq4_xs(d, scales_h, scales_l, qs):
    scales = adjacent(scales_l, 4) | (adjacent(scales_h, 2) << 4)
    return (d * centred(scales, 32))[:, :, None] * lookup(IQ4, unpack(qs.unflatten(1, (8, 16)), 4).flatten(2))


def dequantizer(name, values, compute=None):
    """Make a dequantizer of a function from the fields of blocks to values.

    The float16 fields come as `compute`; None means the output type.
    """
    # Fields of words come as bytes: PyTorch has few operations on uint16.
    types = {"float16": torch.float16, "int8": torch.int8}
    cuts = {
        field: (slice(start, start + kind.itemsize), types.get(kind.base.name, torch.uint8))
        for field, (kind, start) in FORMATS[name].layout.fields.items()
    }

    def dequantize(blocks, dtype):
        fields = {field: blocks[:, place].view(kind) for field, (place, kind) in cuts.items()}
        fields |= {field: stored.to(compute or dtype) for field, stored in fields.items() if stored.is_floating_point()}
        return values(**fields).flatten(1).to(dtype)

    return dequantize


VALUES = {
    "Q4_0": lambda d, qs: d * centred(apart(qs, 4), 8),
    "Q4_1": lambda d, m, qs: d * apart(qs, 4) + m,
    "Q5_0": lambda d, qh, qs: d * centred(apart(qs, 4) | (adjacent(qh, 1) << 4), 16),
    "Q5_1": lambda d, m, qh, qs: d * (apart(qs, 4) | (adjacent(qh, 1) << 4)) + m,
    "Q8_0": lambda d, qs: d * qs,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": lambda d, qs: d * lookup(IQ4, apart(qs, 4)),
    "IQ4_XS": iq4_xs,
    "TQ2_0": lambda qs, d: d * centred(apart(qs.unflatten(1, (2, 32)), 2), 1),
    "MXFP4": lambda e, qs: lookup(HALVED_POWERS, e, torch.float32) * lookup(FP4_DOUBLED, apart(qs, 4)),
    "Q1_0": lambda d, qs: d * centred(adjacent(qs, 1) << 1, 1),
    "Q2_0": lambda d, qs: d * centred(adjacent(qs, 2), 1),
}

DEQUANTIZERS: dict[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {
    name: dequantizer(name, values, torch.float32) for name, values in VALUES.items()
}

PEERS: dict[str, Callable[[torch.Tensor, torch.dtype], torch.Tensor]] = {
    name: dequantizer(name, VALUES[name], torch.float16)
    for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
}
"""Dequantizers in float16, as ComfyUI-GGUF and diffusers have them."""
