"""The primitives of `bits.py` on Numba's CPU target.

Float conversions use integer arithmetic on eight lanes. Every processor supports this, and it does not depend on
whether the program flushes subnormal numbers to zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic, models, overload, register_model, typeof_impl

from numba_dequant.kernels import intrinsics
from numba_dequant.kernels.intrinsics import (
    EIGHT_BYTES,
    EIGHT_FLOATS,
    EIGHT_SHORTS,
    EIGHT_WORDS,
    FLOAT,
    WORD,
    broadcast,
    splat,
)


def unsigned_bytes(builder: ir.IRBuilder, eight: Any) -> Any:
    """i64 -> <8 x float>."""
    return builder.uitofp(builder.zext(builder.bitcast(eight, EIGHT_BYTES), EIGHT_WORDS), EIGHT_FLOATS)


def signed_bytes(builder: ir.IRBuilder, eight: Any) -> Any:
    """i64 -> <8 x float>."""
    return builder.sitofp(builder.sext(builder.bitcast(eight, EIGHT_BYTES), EIGHT_WORDS), EIGHT_FLOATS)


def centred_bytes(builder: ir.IRBuilder, eight: Any, centre: Any) -> Any:
    """i64, i32 -> <8 x float>."""
    return builder.fsub(unsigned_bytes(builder, eight), broadcast(builder, builder.sitofp(centre, FLOAT)))


def half_to_float(builder: ir.IRBuilder, number: Any) -> Any:
    """i16 -> float, or vectors of eight: shift exponent and mantissa, then correct the exponent bias."""
    is_vector = isinstance(number.type, ir.VectorType)
    words, floats, item = (EIGHT_WORDS, EIGHT_FLOATS, splat) if is_vector else (WORD, FLOAT, WORD)
    wide = builder.zext(number, words)
    sign = builder.shl(builder.and_(wide, item(0x8000)), item(16))
    body = builder.shl(builder.and_(wide, item(0x7FFF)), item(13))
    exponent = builder.and_(body, item(0x1F << 23))
    normal = builder.add(body, item((127 - 15) << 23))
    special = builder.add(body, item(2 * (127 - 15) << 23))
    # A subnormal is mantissa * 2**-24: place the mantissa below a leading one of 2**-14, then subtract 2**-14.
    leading = item((127 - 14) << 23)
    raised = builder.bitcast(builder.or_(body, leading), floats)
    subnormal = builder.bitcast(builder.fsub(raised, builder.bitcast(leading, floats)), words)
    value = builder.select(builder.icmp_unsigned("==", exponent, item(0)), subnormal, normal)
    value = builder.select(builder.icmp_unsigned("==", exponent, item(0x1F << 23)), special, value)
    return builder.bitcast(builder.or_(value, sign), floats)


def round_to_fp16(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>."""
    number = builder.bitcast(values, EIGHT_WORDS)
    size = builder.and_(number, splat(0x7FFFFFFF))
    sign = builder.lshr(builder.xor(number, size), splat(16))
    odd = builder.and_(builder.lshr(size, splat(13)), splat(1))
    rebased = builder.add(size, splat((1 << 32) - ((127 - 15) << 23) + 0xFFF))
    normal = builder.lshr(builder.add(rebased, odd), splat(13))
    # After adding 0.5, the last bit of the float is 2**-24, that of a subnormal float16: the addition rounds.
    half = splat(126 << 23)
    sum_ = builder.fadd(builder.bitcast(size, EIGHT_FLOATS), builder.bitcast(half, EIGHT_FLOATS))
    subnormal = builder.sub(builder.bitcast(sum_, EIGHT_WORDS), half)
    is_nan = builder.icmp_signed(">", size, splat(0x7F800000))
    special = builder.select(is_nan, splat(0x7E00), splat(0x7C00))
    value = builder.select(builder.icmp_signed("<", size, splat((127 - 14) << 23)), subnormal, normal)
    value = builder.select(builder.icmp_signed(">=", size, splat((127 + 16) << 23)), special, value)
    return _pack(builder, builder.or_(value, sign))


def round_to_bf16(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>."""
    number = builder.bitcast(values, EIGHT_WORDS)
    odd = builder.and_(builder.lshr(number, splat(16)), splat(1))
    rounded = builder.add(builder.add(number, splat(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", values, values)
    return _pack(builder, builder.lshr(builder.select(is_nan, splat(0x7FC00000), rounded), splat(16)))


def _pack(builder: ir.IRBuilder, words: Any) -> Any:
    return builder.bitcast(builder.trunc(words, EIGHT_SHORTS), ir.VectorType(WORD, 4))


target = intrinsics.NumbaTarget(
    overload=partial(overload, target="cpu"),
    intrinsic=intrinsic,
    register_model=register_model,
    typeof=typeof_impl,
    primitive_model=models.PrimitiveModel,
    opaque_model=models.OpaqueModel,
    unsigned_bytes=unsigned_bytes,
    signed_bytes=signed_bytes,
    centred_bytes=centred_bytes,
    half_to_float=half_to_float,
    rounds={"float16": round_to_fp16, "bfloat16": round_to_bf16},
    lookup_nibbles=intrinsics.lookup_nibbles_by_loads,
    table_address_space=0,
    loads_are_invariant=True,
    widens_eight_at_once=True,
    store_alignment=1,
)
intrinsics.register_primitives(target)
