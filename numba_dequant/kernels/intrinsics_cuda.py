"""The primitives of `bits.py` on Numba's CUDA target."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba.core import types

from numba_dequant import bits
from numba_dequant.kernels import intrinsics
from numba_dequant.kernels.intrinsics import BYTE, EIGHT_FLOATS, EIGHT_WORDS, FLOAT, LONG, WORD, pointer_at
from numba_dequant.kernels.numba_cuda import extending

FOUR_WORDS = ir.VectorType(WORD, 4)

GLOBAL_MEMORY = 1
"""Address space of tables. Constant memory is slow here, because the threads of a warp read different addresses."""


def instruction(builder: ir.IRBuilder, text: str, result: ir.Type, constraints: str, arguments: list[Any]) -> Any:
    """An instruction of PTX, whose result depends on its arguments alone."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    call = builder.asm(function_type, text, constraints, arguments, side_effect=False)
    call.attributes.add("readnone")  # otherwise, loads are not moved across it
    return call


def unsigned_bytes(builder: ir.IRBuilder, eight: Any) -> Any:
    """i64 -> <8 x float>."""
    return centred_bytes(builder, eight, WORD(0))


def signed_bytes(builder: ir.IRBuilder, eight: Any) -> Any:
    """i64 -> <8 x float>: flipping the top bit of a signed byte gives an unsigned byte that is 128 larger."""
    return centred_bytes(builder, builder.xor(eight, LONG(0x8080808080808080)), WORD(128))


def centred_bytes(builder: ir.IRBuilder, eight: Any, centre: Any) -> Any:
    """i64, i32 -> <8 x float>: insert each byte as the lowest byte of the float 2**23, then subtract 2**23 + `centre`.

    This takes one permutation and one subtraction per byte. A conversion instruction has a quarter of their throughput.
    """
    bias = builder.bitcast(builder.or_(centre, WORD(0x4B000000)), FLOAT)
    halves = [builder.trunc(eight, WORD), builder.trunc(builder.lshr(eight, LONG(32)), WORD)]
    result = ir.Constant(EIGHT_FLOATS, ir.Undefined)
    for lane in range(8):
        raised = permute(builder, halves[lane // 4], WORD(0x4B000000), WORD(0x7540 | lane % 4))
        value = builder.fsub(builder.bitcast(raised, FLOAT), bias)
        result = builder.insert_element(result, value, WORD(lane))
    return result


def half_to_float(builder: ir.IRBuilder, number: Any) -> Any:
    """i16 -> float."""
    return instruction(builder, "cvt.f32.f16 $0, $1;", FLOAT, "=f,h", [number])


def round_to_fp16(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>. The assembler merges the three instructions into one if the GPU has it."""
    halves = "cvt.rn.f16.f32 low, $1; cvt.rn.f16.f32 high, $2;"
    return _round_pairs(builder, "{.reg .b16 low, high; " + halves + " mov.b32 $0, {low, high};}", values)


def round_to_bf16(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>."""
    return _round_pairs(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", values)


def _round_pairs(builder: ir.IRBuilder, text: str, values: Any) -> Any:
    words = ir.Constant(FOUR_WORDS, ir.Undefined)
    for k in range(4):
        pair = [builder.extract_element(values, WORD(2 * k + side)) for side in (0, 1)]
        word = instruction(builder, text, WORD, "=r,f,f", pair)
        words = builder.insert_element(words, word, WORD(k))
    return words


def load_unaligned(builder: ir.IRBuilder, base: Any, at: Any, width: int) -> Any:
    """Load the aligned words around 4 or 8 bytes and extract the bytes; this is faster than narrow loads.

    The array must be aligned to four bytes, with four readable bytes after its end.
    """
    # Not `at & -4`: loads at constant distances then share the subtraction.
    within = builder.and_(at, LONG(3))
    first = builder.sub(at, within)
    words = [
        builder.load(pointer_at(builder, base, builder.add(first, LONG(4 * k)), WORD), align=4)
        for k in range(width // 4 + 1)
    ]
    shift = builder.mul(within, LONG(8))
    parts = []
    for low, high in pairwise(words):
        both = builder.or_(builder.zext(low, LONG), builder.shl(builder.zext(high, LONG), LONG(32)))
        parts.append(builder.and_(builder.lshr(both, shift), LONG(0xFFFFFFFF)))
    return parts[0] if width == 4 else builder.or_(parts[0], builder.shl(parts[1], LONG(32)))


def lookup_nibbles(builder: ir.IRBuilder, table: bits.LookupTable, eight: Any) -> Any:
    """Eight items of a table of 16 bytes, by byte permutations of registers."""
    words = [WORD(word) for word in table.items.view("<u4").tolist()]
    halves = [builder.trunc(eight, WORD), builder.trunc(builder.lshr(eight, LONG(32)), WORD)]
    low, high = (builder.zext(_lookup_four(builder, words, half), LONG) for half in halves)
    return builder.or_(low, builder.shl(high, LONG(32)))


def _lookup_four(builder: ir.IRBuilder, words: list[Any], nibbles: Any) -> Any:
    # A permutation takes four selectors in 16 bits, so the nibbles are packed first.
    pairs = builder.and_(builder.or_(nibbles, builder.lshr(nibbles, WORD(4))), WORD(0x00FF00FF))
    selectors = builder.or_(pairs, builder.lshr(pairs, WORD(8)))
    within_half = builder.and_(selectors, WORD(0x7777))
    below_8 = permute(builder, words[0], words[1], within_half)
    from_8 = permute(builder, words[2], words[3], within_half)
    which_half = builder.and_(builder.lshr(selectors, WORD(1)), WORD(0x4444))
    return permute(builder, below_8, from_8, builder.or_(which_half, WORD(0x3210)))


def permute(builder: ir.IRBuilder, low: Any, high: Any, selectors: Any) -> Any:
    """Four of the eight bytes of two words."""
    return instruction(builder, "prmt.b32 $0, $1, $2, $3;", WORD, "=r,r,r,r", [low, high, selectors])


target = intrinsics.NumbaTarget(
    overload=extending.overload,
    intrinsic=extending.intrinsic,
    register_model=extending.register_model,
    typeof=extending.typeof_impl,
    primitive_model=extending.core_models.PrimitiveModel,
    opaque_model=extending.core_models.OpaqueModel,
    unsigned_bytes=unsigned_bytes,
    signed_bytes=signed_bytes,
    centred_bytes=centred_bytes,
    half_to_float=half_to_float,
    rounds={"float16": round_to_fp16, "bfloat16": round_to_bf16},
    lookup_nibbles=lookup_nibbles,
    table_address_space=GLOBAL_MEMORY,
    loads_are_invariant=False,
    widens_eight_at_once=False,
    store_alignment=16,
    load_unaligned=load_unaligned,
)
intrinsics.register_primitives(target)


def _copy_codegen(item_type: ir.Type, alignment: int) -> intrinsics.Codegen:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        tile, at, data, start = arguments
        tile = intrinsics.data_pointer(context, builder, signature.args[0], tile)
        data = intrinsics.data_pointer(context, builder, signature.args[2], data)
        item = builder.load(pointer_at(builder, data, start, item_type), align=alignment)
        builder.store(item, pointer_at(builder, tile, at, item_type), align=alignment)
        return context.get_dummy_value()

    return codegen


def _is_aligned(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    data, start = arguments
    pointer = intrinsics.data_pointer(context, builder, signature.args[0], data)
    address = builder.add(builder.ptrtoint(pointer, LONG), start)
    return builder.icmp_unsigned("==", builder.and_(address, LONG(15)), LONG(0))


def _stop_unless(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    with builder.if_then(builder.not_(arguments[0]), likely=False):
        builder.asm(ir.FunctionType(ir.VoidType(), []), "trap;", "", [], side_effect=True)
    return context.get_dummy_value()


def _store_in_pairs(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    """Store two neighbouring runs of eight float32 with two neighbouring threads.

    A run is two 16-byte stores, but a memory sector has 32 bytes. The threads therefore exchange halves, and write the
    first run together and then the second.
    """
    out, index, values, _ = arguments
    words = builder.bitcast(values, EIGHT_WORDS)
    lane = instruction(builder, "mov.u32 $0, %laneid;", WORD, "=r", [])
    odd = builder.and_(lane, WORD(1))
    is_odd = builder.icmp_unsigned("==", odd, WORD(1))
    pair = builder.shl(WORD(3), builder.and_(lane, WORD(30)))
    first = second = ir.Constant(FOUR_WORDS, ir.Undefined)
    for position in range(4):
        low, high = (builder.extract_element(words, WORD(position + half)) for half in (0, 4))
        given = builder.select(is_odd, low, high)
        exchange = "shfl.sync.bfly.b32 $0, $1, 1, 31, $2;"
        taken = builder.asm(ir.FunctionType(WORD, [WORD, WORD]), exchange, "=r,r,r", [given, pair], side_effect=True)
        first = builder.insert_element(first, builder.select(is_odd, taken, low), WORD(position))
        second = builder.insert_element(second, builder.select(is_odd, high, taken), WORD(position))
    base = intrinsics.data_pointer(context, builder, signature.args[0], out)
    back = builder.mul(builder.zext(odd, LONG), LONG(16))
    start = builder.sub(builder.mul(index, LONG(4)), back)
    for part, at in ((first, start), (second, builder.add(start, LONG(32)))):
        builder.store(part, pointer_at(builder, base, at, FOUR_WORDS), align=16)
    return context.get_dummy_value()


in_pairs = (None, types.int64, intrinsics.EIGHT, types.int64)
intrinsics.register_primitive(target, bits.store_float32_in_pairs, types.none, in_pairs, _store_in_pairs)
intrinsics.register_primitive(
    target, bits.copy_16_bytes, types.none, (None, types.int64) * 2, _copy_codegen(FOUR_WORDS, 16)
)
intrinsics.register_primitive(target, bits.copy_byte, types.none, (None, types.int64) * 2, _copy_codegen(BYTE, 1))
intrinsics.register_primitive(target, bits.is_aligned, types.boolean, (None, types.int64), _is_aligned)
intrinsics.register_primitive(target, bits.stop_unless, types.none, (types.boolean,), _stop_unless)
