"""Compiles functions: Numba makes LLVM IR of each, and all are linked to one object that does not need Numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import cfunc, config, types

from numba_dequant.kernels.native import target_machine
from numba_dequant.kernels.native.reader_loop import join_threads, read_and_send
from numba_dequant.kernels.native.string_walk import walk_strings

FUNCTIONS = (read_and_send, join_threads, walk_strings)

LONG = ir.IntType(64)


def compile_function(function: Callable[..., int]) -> Any:
    """Compile a function of int64 arguments. The result has an `address` and `inspect_llvm`."""
    arguments = [types.int64] * function.__code__.co_argcount
    with jit_enabled():
        return cfunc(types.int64(*arguments), error_model="numpy")(function)


@contextmanager
def jit_enabled() -> Iterator[None]:
    """A context in which Numba compiles even if `NUMBA_DISABLE_JIT` is set: these functions cannot run in Python."""
    before, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        yield
    finally:
        config.DISABLE_JIT = before


def object_code(compiled: Mapping[str, Any]) -> bytes:
    """The object code of all functions.

    Raises:
        Exception: this version of Numba names functions or passes arguments differently.
    """
    return bytes(target_machine().emit_object(linked(compiled)))


def linked(compiled: Mapping[str, Any]) -> Any:
    """All functions linked to one LLVM module without external functions."""
    functions = {name: each.__wrapped__ for name, each in compiled.items()}
    module = llvm.parse_assembly(str(_entries(functions)))
    for name, function in functions.items():
        module.link_in(_parsed(compiled[name].inspect_llvm(), function))
    for each in module.functions:
        if each.name.endswith("_of") and not each.is_declaration:
            each.linkage = "internal"
    _optimize(module)
    needed = [each.name for each in module.functions if each.is_declaration and not each.name.startswith("llvm.")]
    if needed:
        raise LookupError(f"the code needs {', '.join(needed)}")
    return module


def _entries(functions: Mapping[str, Callable[..., int]]) -> ir.Module:
    """A C wrapper for each function. Numba functions return a status and store their result."""
    module = ir.Module()
    module.triple, module.data_layout = llvm.get_process_triple(), str(target_machine().target_data)
    for name, function in functions.items():
        arguments = [LONG] * function.__code__.co_argcount
        exception = ir.IntType(8).as_pointer().as_pointer()
        signature = ir.FunctionType(ir.IntType(32), [LONG.as_pointer(), exception, *arguments])
        numba_function = ir.Function(module, signature, f"{name}_of")
        entry = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        builder = ir.IRBuilder(entry.append_basic_block())
        builder.call(numba_function, [builder.alloca(LONG), ir.Constant(exception, None), *entry.args])
        builder.ret_void()
    return module


def _parsed(text: str, function: Callable[..., int]) -> Any:
    """Parse Numba's LLVM IR of a function. It is renamed to its name plus `_of`; all else becomes internal."""
    module = llvm.parse_assembly(text)
    path = "".join(f"{len(part)}{part}" for part in (function.__module__.rpartition(".")[2], function.__name__))
    for each in module.functions:
        # Numba's C wrapper is dropped, with its exception reporting; the functions raise no exceptions.
        if not each.is_declaration:
            is_it = each.name.startswith("_ZN") and path in each.name
            each.name, each.linkage = (f"{function.__name__}_of", "external") if is_it else (each.name, "internal")
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    return module


def _optimize(module: Any) -> None:
    if hasattr(llvm, "create_pass_builder"):
        passes = llvm.create_pass_builder(target_machine(), llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        return
    builder = llvm.create_pass_manager_builder()  # before llvmlite 0.44
    builder.opt_level = 3
    manager = llvm.create_module_pass_manager()
    builder.populate(manager)
    manager.run(module)
