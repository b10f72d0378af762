"""Compiling the native functions: Numba makes LLVM's code of each, and here one text is made of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba import cfunc, types

from numba_dequant.native.pump_loop import join_threads, pump

FUNCTIONS = (pump, join_threads)

ENTRY = """
declare i32 @{name}_of(ptr, ptr, i64)

define void @{name}(ptr %record) {{
  %result = alloca i64
  %address = ptrtoint ptr %record to i64
  %status = call i32 @{name}_of(ptr %result, ptr null, i64 %address)
  ret void
}}
"""
"""A function of C around one that Numba has compiled, whose result is a status, and its value is written."""


def compile_functions() -> str:
    """All functions as LLVM's text, which needs no other function."""
    module = llvm.parse_assembly("".join(ENTRY.format(name=function.__name__) for function in FUNCTIONS))
    for function in FUNCTIONS:
        module.link_in(_compiled(function))
    for function in module.functions:
        if function.name.endswith("_of") and not function.is_declaration:
            function.linkage = "internal"
    machine = llvm.Target.from_default_triple().create_target_machine(opt=3, jit=True)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return str(module)


def _compiled(function: Callable[[int], int]) -> Any:
    """What Numba makes of a function, under its name and `_of`."""
    module = llvm.parse_assembly(cfunc(types.int64(types.int64), error_model="numpy")(function).inspect_llvm())
    path = "".join(f"{len(part)}{part}" for part in (function.__module__.rpartition(".")[2], function.__name__))
    for each in module.functions:
        # Numba's wrapper for C is left out, and with it what reports exceptions, of which there are none.
        if not each.is_declaration:
            is_it = each.name.startswith("_ZN") and path in each.name
            each.name, each.linkage = (f"{function.__name__}_of", "external") if is_it else (each.name, "internal")
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    return module
