"""Intrinsics for native functions: memory at addresses, foreign functions, atomics."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LONG, INT, BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], BYTE.as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bytes_at(typingctx: Any, address: Any) -> Any:
    """The bytes at an address as an array for the primitives of `bits`; unaligned addresses are allowed."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], BYTE.as_pointer())

    return types.CPointer(types.uint8)(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load_int(typingctx: Any, address: Any) -> Any:
    """The 32-bit number at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.sext(builder.load(builder.inttoptr(args[0], INT.as_pointer())), LONG)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def load_long(typingctx: Any, address: Any) -> Any:
    """The 64-bit number at an address; unaligned addresses are allowed."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], LONG.as_pointer()), align=1)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call_c(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a C function whose arguments and result are 64-bit."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], k) for k in range(len(arguments))]
        function_type = ir.FunctionType(LONG, [LONG] * len(values))
        return builder.call(builder.inttoptr(args[0], function_type.as_pointer()), values)

    return types.int64(types.int64, arguments), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call_cuda(typingctx: Any, address: Any, arguments: Any) -> Any:
    """Call a CUDA driver function; returns its 32-bit result code."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], k) for k in range(len(arguments))]
        function_type = ir.FunctionType(INT, [LONG] * len(values))
        return builder.zext(builder.call(builder.inttoptr(args[0], function_type.as_pointer()), values), LONG)

    return types.int64(types.int64, arguments), codegen


@intrinsic  # type: ignore[untyped-decorator]
def atomic_load(typingctx: Any, address: Any) -> Any:
    """Atomic load with acquire semantics."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def atomic_rmw(typingctx: Any, operation: Any, address: Any, value: Any) -> Any:
    """Atomic read-modify-write; returns the old value."""
    name = operation.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target = builder.inttoptr(args[1], LONG.as_pointer())
        return builder.atomic_rmw(name, target, args[2], "seq_cst")

    return types.int64(operation, types.int64, types.int64), codegen
