from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model
from functools import partial
from llvmlite import ir
from numba_dequant import bits, lowering
from numba_dequant.lowering import *

def half_to_float(builder, bits16):
    """Integer arithmetic and one exact subtraction: no float16 instruction and no subnormal float is needed."""
    wide = builder.zext(bits16, WORD)
    sign = builder.shl(builder.and_(wide, WORD(0x8000)), WORD(16))
    body = builder.shl(builder.and_(wide, WORD(0x7FFF)), WORD(13))
    exponent = builder.and_(body, WORD(0x0F800000))
    normal = builder.add(body, WORD(112 << 23))
    special = builder.add(body, WORD(224 << 23))
    smallest = ir.Constant(FLOAT, 2.0**-14)
    tiny = builder.bitcast(builder.or_(body, WORD(113 << 23)), FLOAT)
    tiny = builder.bitcast(builder.fsub(tiny, smallest), WORD)
    is_special = builder.icmp_unsigned("==", exponent, WORD(0x0F800000))
    is_tiny = builder.icmp_unsigned("==", exponent, WORD(0))
    value = builder.select(is_special, special, builder.select(is_tiny, tiny, normal))
    return builder.bitcast(builder.or_(value, sign), FLOAT)

def round_to_half(builder, values):
    x = builder.bitcast(values, EIGHT_WORDS)
    size = builder.and_(x, splat(0x7FFFFFFF))
    sign = builder.lshr(builder.xor(x, size), splat(16))
    odd = builder.and_(builder.lshr(size, splat(13)), splat(1))
    normal = builder.lshr(builder.add(builder.add(size, splat((-112 << 23) + 0xFFF & 0xFFFFFFFF)), odd), splat(13))
    magic = 126 << 23
    tiny = builder.fadd(builder.bitcast(size, EIGHT_FLOATS), builder.bitcast(splat(magic), EIGHT_FLOATS))
    tiny = builder.sub(builder.bitcast(tiny, EIGHT_WORDS), splat(magic))
    is_nan = builder.icmp_signed(">", size, splat(0x7F800000))
    large = builder.select(is_nan, splat(0x7E00), splat(0x7C00))
    value = builder.select(builder.icmp_signed("<", size, splat(113 << 23)), tiny, normal)
    value = builder.select(builder.icmp_signed(">=", size, splat(143 << 23)), large, value)
    return builder.bitcast(builder.trunc(builder.or_(value, sign), EIGHT_SHORTS), ir.VectorType(WORD, 4))

def round_to_brain(builder, values):
    x = builder.bitcast(values, EIGHT_WORDS)
    odd = builder.and_(builder.lshr(x, splat(16)), splat(1))
    rounded = builder.add(builder.add(x, splat(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", values, values)
    value = builder.lshr(builder.select(is_nan, splat(0x7FC00000), rounded), splat(16))
    return builder.bitcast(builder.trunc(value, EIGHT_SHORTS), ir.VectorType(WORD, 4))

target = Target("cpu", partial(overload, target="cpu", inline="never"), intrinsic, register_model, models.PrimitiveModel, half_to_float, round_to_half, round_to_brain, 1)
lowering.install(target)
