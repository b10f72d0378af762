"""The primitives of `bits.py` as LLVM instructions, for Numba's CPU and CUDA targets.

Both targets share this code. A `NumbaTarget` holds the differences: how the target registers functions and converts
between float types. Eight float32 are one LLVM vector, which each target lowers to its own registers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llvmlite import ir
from numba.core import types

from numba_dequant import bits
from numba_dequant.dtypes import OUTPUT_TYPES

BYTE, SHORT, WORD, LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
FLOAT = ir.FloatType()
EIGHT_FLOATS, EIGHT_WORDS, EIGHT_SHORTS, EIGHT_BYTES = (
    ir.VectorType(item_type, 8) for item_type in (FLOAT, WORD, SHORT, BYTE)
)

Codegen = Callable[[Any, Any, Any, Any], Any]
Emit = Callable[[ir.IRBuilder, Any], Any]


class EightFloats(types.Type):
    """The Numba type of the result of a `decode`: eight float32."""

    def __init__(self) -> None:
        super().__init__("EightFloats")


EIGHT = EightFloats()


class LookupTableType(types.Dummy):
    """The Numba type of one table, whose items are compile-time constants."""

    def __init__(self, table: bits.LookupTable) -> None:
        self.table = table
        super().__init__(table.name)


@dataclass(frozen=True)
class NumbaTarget:
    """The target-specific parts of `register_primitives`."""

    overload: Callable[..., Any]
    intrinsic: Callable[..., Any]
    register_model: Callable[..., Any]
    typeof: Any
    primitive_model: type[Any]
    opaque_model: type[Any]
    unsigned_bytes: Emit
    """i64 -> <8 x float>."""
    signed_bytes: Emit
    """i64 -> <8 x float>."""
    centred_bytes: Callable[[ir.IRBuilder, Any, Any], Any]
    """i64, i32 -> <8 x float>."""
    half_to_float: Emit
    """i16 -> float."""
    rounds: dict[str, Emit]
    """As `ROUNDS`, for output types to which the target rounds in its own way."""
    lookup_nibbles: Callable[[ir.IRBuilder, bits.LookupTable, Any], Any]
    """i64 with a nibble per byte -> i64 with their table entries."""
    table_address_space: int
    loads_are_invariant: bool
    """Whether blocks are constant during a decode, so that loads may be moved across stores."""
    widens_eight_at_once: bool
    """Whether eight floats are loaded as one vector (`half_to_float` then takes a vector) or one by one."""
    store_alignment: int
    """Guaranteed alignment in bytes of a run of outputs."""
    load_unaligned: Callable[[ir.IRBuilder, Any, Any, int], Any] | None = None
    """(array address, byte offset, 4 or 8 bytes) -> i64, if the target has no unaligned loads."""
    registered: set[Callable[..., Any]] = field(default_factory=set)
    """Decodes and helpers that are registered with the target."""


def vector(values: list[int], item_type: ir.Type = WORD) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(ir.VectorType(item_type, len(values)), values)


def splat(value: int, item_type: ir.Type = WORD) -> ir.Constant:
    """A constant vector of eight equal values."""
    return vector([value] * 8, item_type)


def data_pointer(context: Any, builder: ir.IRBuilder, numba_type: Any, value: Any) -> Any:
    """The address of the bytes of an array; kernel arguments may also be plain addresses."""
    is_array = isinstance(numba_type, types.Array)
    pointer = context.make_helper(builder, numba_type, value).data if is_array else value
    return builder.bitcast(pointer, ir.PointerType(BYTE))


def pointer_at(builder: ir.IRBuilder, pointer: Any, at: Any, item_type: ir.Type) -> Any:
    """`pointer` plus `at` bytes, as a pointer to `item_type`."""
    return builder.bitcast(builder.gep(pointer, [at]), ir.PointerType(item_type))


def load_codegen(target: NumbaTarget, width: int, signed: bool) -> Codegen:
    """A load of `width` bytes that assumes the alignment of the array's item size."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        block, at = arguments
        integer = ir.IntType(8 * width)
        base = data_pointer(context, builder, signature.args[0], block)
        alignment = min(width, signature.args[0].dtype.bitwidth // 8)
        if width >= 4 and alignment < 4 and target.load_unaligned is not None:
            return target.load_unaligned(builder, base, at, width)
        item = builder.load(pointer_at(builder, base, at, integer), align=alignment)
        if target.loads_are_invariant:
            item.set_metadata("invariant.load", builder.module.add_metadata([]))
        if width == 8:
            return item
        return builder.sext(item, LONG) if signed else builder.zext(item, LONG)

    return codegen


def table_item(builder: ir.IRBuilder, table: bits.LookupTable, index: Any, address_space: int) -> Any:
    """One item of a table, which becomes a constant of the compiled module."""
    item = ir.IntType(8 * table.items.itemsize)
    array_type = ir.ArrayType(item, len(table.items))
    constant = builder.module.globals.get(table.name)
    if constant is None:
        constant = ir.GlobalVariable(builder.module, array_type, table.name, address_space)
        constant.initializer = ir.Constant(array_type, [item(value) for value in table.items.tolist()])
        constant.global_constant = True
        constant.linkage = "internal"
        constant.align = 16
    return builder.load(builder.gep(constant, [LONG(0), index]), align=table.items.itemsize)


def lookup_codegen(address_space: int) -> Codegen:
    """One item of a table."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        item = table_item(builder, signature.args[0].table, arguments[1], address_space)
        return item if item.type == LONG else builder.sext(item, LONG)

    return codegen


def lookup_nibbles_by_loads(builder: ir.IRBuilder, table: bits.LookupTable, eight: Any) -> Any:
    """Eight items of a table of bytes, packed in an i64, with one load each."""
    lanes = builder.bitcast(eight, EIGHT_BYTES)
    result = ir.Constant(EIGHT_BYTES, ir.Undefined)
    for lane in range(8):
        index = builder.zext(builder.extract_element(lanes, WORD(lane)), LONG)
        result = builder.insert_element(result, table_item(builder, table, index, 0), WORD(lane))
    return builder.bitcast(result, LONG)


def eight_loads_codegen(target: NumbaTarget, item_type: ir.Type, widen: Emit) -> Codegen:
    """A load of eight floats of type `item_type`, widened to float32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        block, at = arguments
        base = data_pointer(context, builder, signature.args[0], block)
        alignment = min(item_type.width // 8, signature.args[0].dtype.bitwidth // 8)
        if target.widens_eight_at_once:
            vector = pointer_at(builder, base, at, ir.VectorType(item_type, 8))
            return widen(builder, builder.load(vector, align=alignment))
        result = ir.Constant(EIGHT_FLOATS, ir.Undefined)
        for lane in range(8):
            offset = builder.add(at, LONG(lane * item_type.width // 8))
            item = builder.load(pointer_at(builder, base, offset, item_type), align=alignment)
            result = builder.insert_element(result, widen(builder, item), WORD(lane))
        return result

    return codegen


def store_codegen(convert: Emit, alignment: int) -> Codegen:
    """Stores of up to eight values at element `index`, as words that `convert` makes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        out, index, values, count = arguments
        words = convert(builder, values)
        n_words = words.type.count
        item = ir.IntType(4 * n_words)
        base = data_pointer(context, builder, signature.args[0], out)
        start = builder.gep(base, [builder.mul(index, LONG(item.width // 8))])
        with builder.if_else(builder.icmp_signed(">=", count, LONG(8))) as (is_full, is_partial):
            with is_full:
                size = min(n_words, 4)  # 16 bytes at most
                for first in range(0, n_words, size):
                    few = builder.shuffle_vector(words, words, vector(list(range(first, first + size))))
                    target = pointer_at(builder, start, LONG(4 * first), few.type)
                    builder.store(few, target, align=min(alignment, 4 * size))
            with is_partial:
                items = builder.bitcast(words, ir.VectorType(item, 8))
                for lane in range(8):
                    with builder.if_then(builder.icmp_signed("<", LONG(lane), count)):
                        address = pointer_at(builder, start, LONG(lane * item.width // 8), item)
                        builder.store(builder.extract_element(items, WORD(lane)), address, align=item.width // 8)
        return context.get_dummy_value()

    return codegen


def broadcast(builder: ir.IRBuilder, value: Any) -> Any:
    """A float, broadcast to eight; a vector is returned as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    one = builder.insert_element(ir.Constant(EIGHT_FLOATS, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(one, ir.Constant(EIGHT_FLOATS, ir.Undefined), splat(0))


def arithmetic_codegen(operation: str) -> Codegen:
    """A float operation on vectors of eight; a scalar side is broadcast."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        left, right = (broadcast(builder, side) for side in arguments)
        return getattr(builder, operation)(left, right)

    return codegen


def emit(function: Emit) -> Codegen:
    """A codegen from a function of the builder and one argument."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return function(builder, arguments[0])

    return codegen


def bf16(builder: ir.IRBuilder, number: Any) -> Any:
    """i16 -> float, as its upper half; or vectors of eight."""
    if isinstance(number.type, ir.VectorType):
        return builder.bitcast(builder.shl(builder.zext(number, EIGHT_WORDS), splat(16)), EIGHT_FLOATS)
    return builder.bitcast(builder.shl(builder.zext(number, WORD), WORD(16)), FLOAT)


def single(builder: ir.IRBuilder, number: Any) -> Any:
    """i32 -> the float with these bits; or vectors of eight."""
    return builder.bitcast(number, EIGHT_FLOATS if isinstance(number.type, ir.VectorType) else FLOAT)


def to_float(builder: ir.IRBuilder, number: Any) -> Any:
    """i32 -> float."""
    return builder.sitofp(number, FLOAT)


def register_primitives(target: NumbaTarget) -> None:
    """Register the primitives of `bits.py` with a Numba target."""
    target.register_model(EightFloats)(_model_for(target))
    target.register_model(LookupTableType)(target.opaque_model)
    target.typeof.register(bits.LookupTable)(lambda table, _: LookupTableType(table))

    def nibbles_codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return target.lookup_nibbles(builder, signature.args[0].table, arguments[1])

    def centred_codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return target.centred_bytes(builder, *arguments)

    for load, width, signed in (
        (bits.load_u8, 1, False),
        (bits.load_i8, 1, True),
        (bits.load_u16, 2, False),
        (bits.load_u32, 4, False),
        (bits.load_8_bytes, 8, True),
    ):
        register_primitive(target, load, types.int64, (None, types.int64), load_codegen(target, width, signed))
    for convert, parameter, codegen in (
        (bits.half, types.uint16, emit(target.half_to_float)),
        (bits.bf16, types.uint16, emit(bf16)),
        (bits.single, types.uint32, emit(single)),
        (bits.to_float, types.int32, emit(to_float)),
    ):
        register_primitive(target, convert, types.float32, (parameter,), codegen)
    register_primitive(target, bits.unsigned_bytes, EIGHT, (types.int64,), emit(target.unsigned_bytes))
    register_primitive(target, bits.signed_bytes, EIGHT, (types.int64,), emit(target.signed_bytes))
    register_primitive(target, bits.centred_bytes, EIGHT, (types.int64, types.int32), centred_codegen)
    register_primitive(
        target, bits.lookup, types.int64, (None, types.int64), lookup_codegen(target.table_address_space)
    )
    register_primitive(target, bits.lookup_nibbles, types.int64, (None, types.int64), nibbles_codegen)
    register_primitive(target, bits.spread_bits, types.int64, (types.int64,), emit(spread_bits))
    for load_eight, item, widen in (
        (bits.load_8_floats, WORD, single),
        (bits.load_8_halves, SHORT, target.half_to_float),
        (bits.load_8_bf16, SHORT, bf16),
    ):
        register_primitive(target, load_eight, EIGHT, (None, types.int64), eight_loads_codegen(target, item, widen))
    for name, output_type in OUTPUT_TYPES.items():
        kinds = (None, types.int64, EIGHT, types.int64)
        words = target.rounds.get(name) or ROUNDS[name]
        register_primitive(target, output_type.store, types.none, kinds, store_codegen(words, target.store_alignment))
    for sign, operation in ((operator.mul, "fmul"), (operator.add, "fadd"), (operator.sub, "fsub")):
        _register_operator(target, sign, arithmetic_codegen(operation))


def _bits_of_floats(builder: ir.IRBuilder, values: Any) -> Any:
    return builder.bitcast(values, EIGHT_WORDS)


ROUNDS: dict[str, Emit] = {"float32": _bits_of_floats}
"""For output types, the rounding that targets share: <8 x float> -> <n x i32>, the rounded values in order.

Build the words from words. A GPU would store a vector of bytes that is bitcast to words in several pieces.
"""


def spread_bits(builder: ir.IRBuilder, number: Any) -> Any:
    """Bit k of the low byte becomes byte k: mask bit k in copy k of the byte, then carry it to the top bit."""
    four_copies = builder.mul(builder.and_(builder.trunc(number, WORD), WORD(0xFF)), WORD(0x01010101))
    copies = builder.zext(four_copies, LONG)
    copies = builder.or_(copies, builder.shl(copies, LONG(32)))
    picked = builder.and_(copies, LONG(0x8040201008040201))
    carried = builder.add(picked, LONG(0x00406070787C7E7F))
    return builder.and_(builder.lshr(carried, LONG(7)), LONG(0x0101010101010101))


def register_decode(target: NumbaTarget, decode: Callable[..., Any]) -> None:
    """Let compiled code of this target call a decode and its helpers; they are compiled when called."""
    for function in [*bits.shared_helpers, decode]:
        if function not in target.registered:
            register(target, function)
            target.registered.add(function)


def register(target: NumbaTarget, function: Callable[..., Any]) -> None:
    """Let compiled code of this target call a Python function, which is compiled when called."""
    target.overload(function, strict=False)(lambda *arguments: function)


def _model_for(target: NumbaTarget) -> type[Any]:
    class EightFloatsModel(target.primitive_model):  # type: ignore[name-defined, misc]
        def __init__(self, manager: Any, numba_type: Any) -> None:
            super().__init__(manager, numba_type, EIGHT_FLOATS)

    return EightFloatsModel


def register_primitive(
    target: NumbaTarget, function: Callable[..., Any], result: Any, kinds: tuple[Any, ...], codegen: Codegen
) -> None:
    """Replace `function` by `codegen` in compiled code; `kinds` are the parameter types, None for any type."""

    def typed(*given: Any) -> Any:
        return result(*(parameter or actual for parameter, actual in zip(kinds, given, strict=True))), codegen

    # Numba requires explicit parameters.
    names = ", ".join("abcdefgh"[: len(kinds)])
    intrinsic = target.intrinsic(eval(f"lambda _, {names}: typed({names})", {"typed": typed}))  # noqa: S307
    stand_in = eval(f"lambda {names}: intrinsic({names})", {"intrinsic": intrinsic})  # noqa: S307
    target.overload(function, strict=False)(lambda *given: stand_in)


def _register_operator(target: NumbaTarget, sign: Callable[..., Any], codegen: Codegen) -> None:
    def of_eight(a: Any, b: Any) -> Any:
        if EIGHT not in (a, b) or not all(side is EIGHT or isinstance(side, types.Number) for side in (a, b)):
            return None
        return stand_in

    two = target.intrinsic(
        lambda _, a, b: (EIGHT(*(EIGHT if side is EIGHT else types.float32 for side in (a, b))), codegen)
    )
    stand_in = lambda a, b: two(a, b)  # noqa: E731
    target.overload(sign, strict=False)(of_eight)
