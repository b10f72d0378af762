"""The primitives of `bits.py` on Numba's CUDA target."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.cuda.extending import core_models, intrinsic, overload, register_model

from numba_dequant import bits, lowering
from numba_dequant.lowering import BYTE, FLOAT, LONG, WORD

FOUR_WORDS = ir.VectorType(WORD, 4)


def _instruction(builder: ir.IRBuilder, text: str, result: ir.Type, constraints: str, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.asm(kind, text, constraints, arguments, side_effect=False)


def half_to_float(builder: ir.IRBuilder, number: Any) -> Any:
    """i16 -> float."""
    return _instruction(builder, "cvt.f32.f16 $0, $1;", FLOAT, "=f,h", [number])


def round_to_half(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>. The assembler makes one instruction of the three where the GPU has it."""
    halves = "cvt.rn.f16.f32 low, $1; cvt.rn.f16.f32 high, $2;"
    return _round_pairs(builder, "{.reg .b16 low, high; " + halves + " mov.b32 $0, {low, high};}", values)


def round_to_brain(builder: ir.IRBuilder, values: Any) -> Any:
    """<8 x float> -> <4 x i32>."""
    return _round_pairs(builder, "cvt.rn.bf16x2.f32 $0, $2, $1;", values)


def _round_pairs(builder: ir.IRBuilder, instruction: str, values: Any) -> Any:
    words = ir.Constant(FOUR_WORDS, ir.Undefined)
    for index in range(4):
        pair = [builder.extract_element(values, WORD(2 * index + side)) for side in (0, 1)]
        word = _instruction(builder, instruction, WORD, "=r,f,f", pair)
        words = builder.insert_element(words, word, WORD(index))
    return words


target = lowering.Target(
    overload,
    intrinsic,
    register_model,
    core_models.PrimitiveModel,
    half_to_float,
    round_to_half,
    round_to_brain,
    loads_are_invariant=False,
    store_alignment=16,
)
lowering.install(target)


def _copy_codegen(kind: ir.Type, alignment: int) -> lowering.Codegen:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        tile, at, data, start = arguments
        tile = lowering.data_pointer(context, builder, signature.args[0], tile)
        data = lowering.data_pointer(context, builder, signature.args[2], data)
        item = builder.load(lowering.pointer_at(builder, data, start, kind), align=alignment)
        builder.store(item, lowering.pointer_at(builder, tile, at, kind), align=alignment)
        return context.get_dummy_value()

    return codegen


def _is_aligned(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
    data, start = arguments
    pointer = lowering.data_pointer(context, builder, signature.args[0], data)
    address = builder.add(builder.ptrtoint(pointer, LONG), start)
    return builder.icmp_unsigned("==", builder.and_(address, LONG(15)), LONG(0))


lowering.implement(target, bits.copy_16_bytes, types.none, (None, types.int64) * 2, _copy_codegen(FOUR_WORDS, 16))
lowering.implement(target, bits.copy_byte, types.none, (None, types.int64) * 2, _copy_codegen(BYTE, 1))
lowering.implement(target, bits.is_aligned, types.boolean, (None, types.int64), _is_aligned)
