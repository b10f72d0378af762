"""The primitives of `halves.py` that make, load and store float16, on Numba's CUDA target.

They need compute capability 8.0 or higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from numba_dequant import halves
from numba_dequant.bits import LookupTable
from numba_dequant.kernels import intrinsics
from numba_dequant.kernels.intrinsics import EIGHT, FLOAT, LONG, WORD, pointer_at
from numba_dequant.kernels.intrinsics_cuda import (
    FOUR_WORDS,
    GLOBAL_MEMORY,
    half_to_float,
    instruction,
    permute,
    target,
)
from numba_dequant.kernels.numba_cuda import extending

MAGIC = 0x64006400
"""Two float16 of 1024. If the ten bits of their mantissas are set to a number n, they become 1024 + n."""


class EightHalves(types.Type):
    """The Numba type of eight float16, in the order `halves.PACKED`."""

    def __init__(self) -> None:
        super().__init__("EightHalves")


HALVES = EightHalves()


class _HalvesModel(extending.core_models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, FOUR_WORDS)


extending.register_model(EightHalves)(_HalvesModel)


def _pack(builder: ir.IRBuilder, words: Sequence[Any]) -> Any:
    result = ir.Constant(FOUR_WORDS, ir.Undefined)
    for k, word in enumerate(words):
        result = builder.insert_element(result, word, WORD(k))
    return result


def words_of(builder: ir.IRBuilder, vector: Any) -> list[Any]:
    """The four words of eight float16."""
    return [builder.extract_element(vector, WORD(k)) for k in range(4)]


def _low_and_high(builder: ir.IRBuilder, eight: Any) -> tuple[Any, Any]:
    return builder.trunc(eight, WORD), builder.trunc(builder.lshr(eight, LONG(32)), WORD)


def _pair(builder: ir.IRBuilder, operation: str, *arguments: Any) -> Any:
    """An instruction on pairs of float16."""
    operands = ", ".join(f"${k + 1}" for k in range(len(arguments)))
    constraints = ",".join(["=r"] + ["r"] * len(arguments))
    return instruction(builder, f"{operation} $0, {operands};", WORD, constraints, list(arguments))


def _twice(builder: ir.IRBuilder, half: Any) -> Any:
    """16 bits in both halves of a word."""
    return builder.or_(half, builder.shl(half, WORD(16)))


def _integer_pair(builder: ir.IRBuilder, number: Any) -> Any:
    """An integer from -512 to 511 as two equal float16: add it to the mantissa of 1536, then subtract 1536."""
    # A multiplication copies it to both halves, in a pipe that has less to do than that of shifts and masks.
    both = builder.mul(builder.add(number, WORD(0x6600)), WORD(0x00010001))
    return _pair(builder, "sub.rn.f16x2", both, WORD(0x66006600))


def _constant_pair(builder: ir.IRBuilder, number: Any) -> Any:
    """A positive integer of 11 bits as two equal float16; the compiler computes it if the number is constant."""
    single = builder.bitcast(builder.sitofp(number, FLOAT), WORD)
    return _twice(builder, builder.lshr(builder.sub(single, WORD((127 - 15) << 23)), WORD(13)))


def _power_pair(builder: ir.IRBuilder, shift: Any) -> Any:
    """2**-shift as two equal float16."""
    return _twice(builder, builder.shl(builder.sub(WORD(15), shift), WORD(10)))


def _halves_of_bytes(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """Insert each byte into the mantissa of 1024, two at a time, then subtract 1024 + `centre`."""
    eight, centre = arguments
    bias = _constant_pair(builder, builder.add(centre, WORD(1024)))
    words = []
    for four in _low_and_high(builder, eight):
        for selectors in (0x4240, 0x4341):
            raised = permute(builder, four, WORD(0x64646464), WORD(selectors))
            words.append(_pair(builder, "sub.rn.f16x2", raised, bias))
    return _pack(builder, words)


def _mask_or(builder: ir.IRBuilder, word: Any, mask: Any) -> Any:
    """(word & mask) | MAGIC; one instruction."""
    text = "lop3.b32 $0, $1, $2, $3, 0xEA;"  # the assembler makes two instructions of an `and` and an `or`
    return instruction(builder, text, WORD, "=r,r,r,r", [word, mask, WORD(MAGIC)])


def _raised_fields(builder: ir.IRBuilder, eight: Any, shift: Any, width: Any) -> list[Any]:
    """1024 + field * 2**shift, as float16, for the fields of eight bytes."""
    one = builder.shl(WORD(0x00010001), width)
    mask = builder.shl(builder.sub(one, WORD(0x00010001)), shift)
    parts = [part for four in _low_and_high(builder, eight) for part in (four, builder.lshr(four, WORD(8)))]
    return [_mask_or(builder, part, mask) for part in parts]


def _halves_of_fields(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """One multiply-add each: the raised fields / 2**shift, minus 1024 / 2**shift + `centre`."""
    eight, shift, width, centre = arguments
    bias = _constant_pair(builder, builder.add(builder.lshr(WORD(1024), shift), centre))
    bias = builder.or_(bias, WORD(0x80008000))
    factor = _power_pair(builder, shift)
    words = [
        _pair(builder, "fma.rn.f16x2", raised, factor, bias) for raised in _raised_fields(builder, eight, shift, width)
    ]
    return _pack(builder, words)


def _scaled_fields(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """One multiply-add each: scale / 2**shift times the raised fields, minus 1024 * scale / 2**shift."""
    eight, shift, width, scale = arguments
    pair = builder.extract_element(scale, WORD(0))
    shifted = _pair(builder, "mul.rn.f16x2", pair, _power_pair(builder, shift))
    times = builder.select(builder.icmp_unsigned("==", shift, WORD(0)), pair, shifted)
    bias = _pair(builder, "mul.rn.f16x2", times, WORD(0xE400E400))
    words = [
        _pair(builder, "fma.rn.f16x2", raised, times, bias) for raised in _raised_fields(builder, eight, shift, width)
    ]
    return _pack(builder, words)


def _halves_of_nibbles(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    four, centre = arguments
    next_bytes = builder.lshr(four, WORD(8))
    bias = _constant_pair(builder, builder.add(centre, WORD(1024)))
    high_bias = builder.or_(_constant_pair(builder, builder.add(centre, WORD(64))), WORD(0x80008000))
    words = [
        _pair(builder, "sub.rn.f16x2", _mask_or(builder, part, WORD(0x000F000F)), bias) for part in (four, next_bytes)
    ]
    words += [
        _pair(builder, "fma.rn.f16x2", _mask_or(builder, part, WORD(0x00F000F0)), WORD(0x2C002C00), high_bias)
        for part in (four, next_bytes)
    ]
    return _pack(builder, words)


def _halves_of_pairs(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """A shift by 12 puts number k + 2 into the upper half of a word, at the bits of number k in the lower half."""
    two, centre = arguments
    two = builder.and_(two, WORD(0xFFFF))
    spread = builder.or_(two, builder.shl(two, WORD(12)))
    words = []
    for part in (spread, builder.lshr(spread, WORD(8))):
        for shift in (0, 2):
            raised = _mask_or(builder, part, WORD(0x00030003 << shift))
            bias = _constant_pair(builder, builder.add(centre, WORD(1024 >> shift)))
            if shift:
                bias = builder.or_(bias, WORD(0x80008000))
                words.append(_pair(builder, "fma.rn.f16x2", raised, WORD(0x34003400), bias))
            else:
                words.append(_pair(builder, "sub.rn.f16x2", raised, bias))
    return _pack(builder, words)


def _sign_words(builder: ir.IRBuilder, byte: Any) -> list[Any]:
    """Words whose bits 15 and 31 are bits of the byte, in the order of `PACKED`; the other bits are undefined."""
    spread = builder.or_(byte, builder.shl(byte, WORD(14)))
    return [builder.shl(spread, WORD(15 - bit)) for bit in (0, 1, 4, 5)]


def _halves_of_signs(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    text = "lop3.b32 $0, $1, 0x80008000, 0xBC00BC00, 0x6A;"  # (a & b) ^ c
    byte = builder.and_(arguments[0], WORD(0xFF))
    return _pack(builder, [instruction(builder, text, WORD, "=r,r", [word]) for word in _sign_words(builder, byte)])


def _negated(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    vector, minus = arguments
    text = "lop3.b32 $0, $1, 0x80008000, $2, 0x6A;"
    signs = _sign_words(builder, builder.and_(minus, WORD(0xFF)))
    words = [
        instruction(builder, text, WORD, "=r,r,r", [sign, word])
        for sign, word in zip(signs, words_of(builder, vector), strict=True)
    ]
    return _pack(builder, words)


def _halves_of_table(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    raised = _raised_items(builder, signature.args[0].table, arguments[1])
    return _pack(builder, [_pair(builder, "sub.rn.f16x2", word, WORD(RAISED_BY)) for word in raised])


def _scaled_halves_of_table(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """One multiply-add each: scale times the raised items, minus 1152 * scale, which float16 holds exactly."""
    _, four, scale = arguments
    pair = builder.extract_element(scale, WORD(0))
    bias = _pair(builder, "mul.rn.f16x2", pair, WORD(RAISED_BY | 0x80008000))
    raised = _raised_items(builder, signature.args[0].table, four)
    return _pack(builder, [_pair(builder, "fma.rn.f16x2", word, pair, bias) for word in raised])


RAISED_BY = 0x64806480
"""Two float16 of 1152: 1024, and 128 that make the items of a table unsigned."""


def _raised_items(builder: ir.IRBuilder, table: LookupTable, four: Any) -> list[Any]:
    """Eight items plus 1152, for the eight nibbles of a word.

    A byte permutation takes the four nibbles of 16 bits, and looks up each among eight bytes. For a table of 16 bytes,
    there are two permutations, and a third that chooses between their results. 128 is added to the items, so that they
    are unsigned and fit into the mantissa of 1024.
    """
    entries = [WORD(word) for word in (table.items.view(np.uint8) ^ 0x80).view("<u4").tolist()]
    within_half, which_half = four, four
    if len(entries) > 2:
        within_half = builder.and_(four, WORD(0x77777777))
        which_half = builder.or_(builder.and_(builder.lshr(four, WORD(1)), WORD(0x44444444)), WORD(0x32103210))
    words = []
    for shift in (0, 16):
        selectors = builder.lshr(within_half, WORD(shift))
        looked_up = permute(builder, entries[0], entries[1], selectors)
        if len(entries) > 2:
            from_8 = permute(builder, entries[2], entries[3], selectors)
            looked_up = permute(builder, looked_up, from_8, builder.lshr(which_half, WORD(shift)))
        words += [permute(builder, looked_up, WORD(0x64646464), WORD(places)) for places in (0x4240, 0x4341)]
    return words


def _lookup_in_tile(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, _, index = arguments
    size = signature.args[1].table.items.itemsize
    base = intrinsics.data_pointer(context, builder, signature.args[0], tile)
    place = pointer_at(builder, base, builder.mul(index, LONG(size)), ir.IntType(8 * size))
    item = builder.load(place, align=size)
    return item if size == 8 else builder.sext(item, LONG)


def _copy_to_tile(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    tile, _, index = arguments
    table = signature.args[1].table
    size = table.items.itemsize
    base = intrinsics.data_pointer(context, builder, signature.args[0], tile)
    item = intrinsics.table_item(builder, table, index, GLOBAL_MEMORY)
    builder.store(item, pointer_at(builder, base, builder.mul(index, LONG(size)), item.type), align=size)
    return context.get_dummy_value()


def _scaled(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    vector, scale = arguments
    pair = builder.extract_element(scale, WORD(0))
    return _pack(builder, [_pair(builder, "mul.rn.f16x2", word, pair) for word in words_of(builder, vector)])


def _rounded_halves(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    words = []
    for first in (0, 1, 4, 5):
        low, high = (builder.extract_element(arguments[0], WORD(first + step)) for step in (0, 2))
        words.append(instruction(builder, "cvt.rn.f16x2.f32 $0, $1, $2;", WORD, "=r,f,f", [high, low]))
    return _pack(builder, words)


def _equal_halves(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return _pack(builder, [_integer_pair(builder, arguments[0])] * 4)


def _halves_with_bits(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    return _pack(builder, [_twice(builder, arguments[0])] * 4)


def _byte_as_halves(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """Insert the byte into the mantissa of 1536, twice, then subtract. `index` is constant where this is used."""
    eight, index, centre = arguments
    low, high = _low_and_high(builder, eight)
    four = builder.select(builder.icmp_unsigned("<", index, WORD(4)), low, high)
    selectors = builder.add(builder.mul(builder.and_(index, WORD(3)), WORD(0x0101)), WORD(0x4040))
    raised = permute(builder, four, WORD(0x66666666), selectors)
    pair = _pair(builder, "sub.rn.f16x2", raised, _constant_pair(builder, builder.add(centre, WORD(1536))))
    return _pack(builder, [pair] * 4)


def _largest_bfloat16(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    largest = WORD(0)
    for word in words_of(builder, arguments[0]):
        for part in (word, builder.lshr(word, WORD(16))):
            bits = builder.and_(part, WORD(0x7FFF))
            largest = builder.select(builder.icmp_unsigned(">", bits, largest), bits, largest)
    return builder.zext(largest, LONG)


def _scaled_bfloat16(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    vector, factor = arguments
    words = []
    for word in words_of(builder, vector):
        low, high = (
            builder.fmul(builder.bitcast(bits, FLOAT), factor)
            for bits in (builder.shl(word, WORD(16)), builder.and_(word, WORD(0xFFFF0000)))
        )
        words.append(instruction(builder, "cvt.rn.f16x2.f32 $0, $1, $2;", WORD, "=r,f,f", [high, low]))
    return _pack(builder, words)


def _packed(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    first, third, second, fourth = words_of(builder, arguments[0])
    return _in_packed_order(builder, (first, second, third, fourth))


def _in_packed_order(builder: ir.IRBuilder, words: Sequence[Any]) -> Any:
    """Four words of two neighbouring float16 in the order of `PACKED`."""
    result = []
    for low, high in (words[:2], words[2:]):
        result += [permute(builder, low, high, WORD(selectors)) for selectors in (0x5410, 0x7632)]
    return _pack(builder, result)


def _load_run(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    base = intrinsics.data_pointer(context, builder, signature.args[0], arguments[0])
    words = builder.load(pointer_at(builder, base, arguments[1], FOUR_WORDS), align=16)
    return _in_packed_order(builder, words_of(builder, words))


def _load_two_fours(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    base = intrinsics.data_pointer(context, builder, signature.args[0], arguments[0])
    pairs = []
    for at in arguments[1:]:
        two = builder.load(pointer_at(builder, base, at, ir.VectorType(WORD, 2)), align=8)
        pairs.append([builder.extract_element(two, WORD(k)) for k in range(2)])
    return _pack(builder, [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]])


def _store_halves(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, vector = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[0], out)
    builder.store(vector, pointer_at(builder, base, at, FOUR_WORDS), align=16)
    return context.get_dummy_value()


def _store_in_panel(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    out, at, vector, step = arguments
    base = intrinsics.data_pointer(context, builder, signature.args[0], out)
    for pair, word in enumerate(words_of(builder, vector)):
        start = builder.add(at, builder.mul(step, LONG(pair)))
        builder.store(word, pointer_at(builder, base, start, WORD), align=4)
    return context.get_dummy_value()


def _sum_of_halves(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    total = None
    for word in words_of(builder, arguments[0]):
        for half in (builder.trunc(word, ir.IntType(16)), builder.trunc(builder.lshr(word, WORD(16)), ir.IntType(16))):
            value = half_to_float(builder, half)
            total = value if total is None else builder.fadd(total, value)
    return total


for _function, _result, _kinds, _codegen in (
    (halves.halves_of_bytes, HALVES, (types.int64, types.int32), _halves_of_bytes),
    (halves.halves_of_fields, HALVES, (types.int64, types.int32, types.int32, types.int32), _halves_of_fields),
    (halves.scaled_fields, HALVES, (types.int64, types.int32, types.int32, HALVES), _scaled_fields),
    (halves.halves_of_nibbles, HALVES, (types.int32, types.int32), _halves_of_nibbles),
    (halves.halves_of_pairs, HALVES, (types.int32, types.int32), _halves_of_pairs),
    (halves.halves_of_signs, HALVES, (types.int32,), _halves_of_signs),
    (halves.negated, HALVES, (HALVES, types.int32), _negated),
    (halves.halves_with_bits, HALVES, (types.int32,), _halves_with_bits),
    (halves.halves_of_table, HALVES, (None, types.int32), _halves_of_table),
    (halves.scaled_halves_of_table, HALVES, (None, types.int32, HALVES), _scaled_halves_of_table),
    (halves.lookup_in_tile, types.int64, (None, None, types.int64), _lookup_in_tile),
    (halves.copy_to_tile, types.none, (None, None, types.int64), _copy_to_tile),
    (halves.scaled, HALVES, (HALVES, HALVES), _scaled),
    (halves.rounded_halves, HALVES, (EIGHT,), _rounded_halves),
    (halves.equal_halves, HALVES, (types.int32,), _equal_halves),
    (halves.byte_as_halves, HALVES, (types.int64, types.int32, types.int32), _byte_as_halves),
    (halves.largest_bfloat16, types.int64, (HALVES,), _largest_bfloat16),
    (halves.scaled_bfloat16, HALVES, (HALVES, types.float32), _scaled_bfloat16),
    (halves.load_run, HALVES, (None, types.int64), _load_run),
    (halves.load_two_fours, HALVES, (None, types.int64, types.int64), _load_two_fours),
    (halves.packed, HALVES, (HALVES,), _packed),
    (halves.store_halves, types.none, (None, types.int64, HALVES), _store_halves),
    (halves.store_in_panel, types.none, (None, types.int64, HALVES, types.int64), _store_in_panel),
    (halves.sum_of_halves, types.float32, (HALVES,), _sum_of_halves),
):
    intrinsics.register_primitive(target, _function, _result, _kinds, _codegen)
