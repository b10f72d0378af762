"""The primitives of `numba_dequant.bits`, one function each, which every target runs on the same random input."""

import numpy as np

from numba_dequant import bits
from numba_dequant.dtypes import OUTPUT_TYPES, numpy_dtype

N = 64
"""Calls of a primitive, and bytes from one to the next read: 32."""

TABLE = bits.LookupTable(np.random.default_rng(1).integers(-128, 128, 16).astype(np.int8))
WIDE_TABLE = bits.LookupTable(np.random.default_rng(2).integers(-(2**62), 2**62, 16))


def block(itemsize, seed=0):
    """Random bytes in units of so many, with NaNs, infinities and subnormal numbers of each float type among them."""
    data = np.random.default_rng(seed).integers(0, 256, 32 * N, np.uint8)
    halves = [0, 1, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7E01, 0x8001, 0xFC00, 0xFE00, 0x7F7F, 0x7F80, 0x7FC1, 0xFF80]
    data[:28].view("<u2")[:] = halves
    data[32:64].view("<u4")[:] = [0, 1, 0x007FFFFF, 0x7F800000, 0x7FC00001, 0x80000001, 0x477FF000, 0x33000001]
    return data.view(f"u{itemsize}")


def numbers(seed=0):
    """Random integers of 64 bits, those that a shift or a sign could get wrong first."""
    found = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, N, np.int64)
    found[:6] = 0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, 0x8080808080808080 - 2**64
    return found


def _load(primitive):
    def run(block, numbers, out):
        for index in range(N):
            out[index] = primitive(block, 8 * index)

    return run


def _of_number(primitive, mask):
    def run(block, numbers, out):
        for index in range(N):
            out[index] = primitive(numbers[index] & mask)

    return run


def _eight_of_number(primitive):
    def run(block, numbers, out):
        for index in range(N):
            bits.store_float32(out, 8 * index, primitive(numbers[index]), 8)

    return run


def _eight_of_block(primitive):
    def run(block, numbers, out):
        for index in range(N):
            bits.store_float32(out, 8 * index, primitive(block, 32 * index), 8)

    return run


def _store(primitive):
    def run(block, numbers, out):
        for index in range(N):
            primitive(out, 8 * index, bits.load_8_floats(block, 32 * index), 1 + index % 8)

    return run


def _to_float(block, numbers, out):
    for index in range(N):
        out[index] = bits.to_float((numbers[index] & 0xFFFFFF) - 0x800000)


def _centred_bytes(block, numbers, out):
    for index in range(N):
        bits.store_float32(out, 8 * index, bits.centred_bytes(numbers[index], 4 * index), 8)


def _spread_bits(block, numbers, out):
    for index in range(N):
        out[index] = bits.spread_bits(numbers[index] & 0xFF)


def _lookup(table):
    def run(block, numbers, out):
        for index in range(N):
            out[index] = bits.lookup(table, numbers[index] & 15)

    return run


def _lookup_nibbles(block, numbers, out):
    for index in range(N):
        out[index] = bits.lookup_nibbles(TABLE, numbers[index] & 0x0F0F0F0F0F0F0F0F)


def _arithmetic(block, numbers, out):
    for index in range(N):
        eight, one = bits.signed_bytes(numbers[index]), bits.half(numbers[index] & 0x7FF)
        bits.store_float32(out, 8 * index, one * eight - eight * one + (eight + one), 8)


CASES = {
    **{name: (_load(getattr(bits, name)), "int64", N) for name in ("load_u8", "load_i8", "load_u16", "load_u32")},
    "load_8_bytes": (_load(bits.load_8_bytes), "int64", N),
    "half": (_of_number(bits.half, 0xFFFF), "float32", N),
    "bf16": (_of_number(bits.bf16, 0xFFFF), "float32", N),
    "single": (_of_number(bits.single, 0xFFFFFFFF), "float32", N),
    "to_float": (_to_float, "float32", N),
    "unsigned_bytes": (_eight_of_number(bits.unsigned_bytes), "float32", 8 * N),
    "signed_bytes": (_eight_of_number(bits.signed_bytes), "float32", 8 * N),
    "centred_bytes": (_centred_bytes, "float32", 8 * N),
    "spread_bits": (_spread_bits, "int64", N),
    "load_8_floats": (_eight_of_block(bits.load_8_floats), "float32", 8 * N),
    "load_8_halves": (_eight_of_block(bits.load_8_halves), "float32", 8 * N),
    "load_8_bf16": (_eight_of_block(bits.load_8_bf16), "float32", 8 * N),
    **{each.store.__name__: (_store(each.store), each.name, 8 * N) for each in OUTPUT_TYPES.values()},
    "lookup": (_lookup(TABLE), "int64", N),
    "lookup of 64 bits": (_lookup(WIDE_TABLE), "int64", N),
    "lookup_nibbles": (_lookup_nibbles, "int64", N),
    "arithmetic": (_arithmetic, "float32", 8 * N),
}
"""What runs a primitive, the type that it writes, and how many elements."""


ALIGNMENTS = (1, 2, 4, 8)


def empty(dtype, size):
    """Elements of which those that are not written to are known."""
    return np.full(size, 77, "int64" if dtype == "int64" else numpy_dtype(dtype))


def outcome(run, itemsize, dtype, size, seed):
    """What a case writes in plain Python, whose integers a decode has there."""
    out = empty(dtype, size)
    with np.errstate(all="ignore"):
        run(block(itemsize, seed), numbers(seed).tolist(), out)
    return out


def compiled_outcome(compiled, itemsize, dtype, size, seed):
    """What it writes as compiled code, which takes small floats as bits."""
    out = empty(dtype, size)
    compiled(block(itemsize, seed), numbers(seed), out.view(f"u{out.itemsize}") if out.itemsize < 4 else out)
    return out
