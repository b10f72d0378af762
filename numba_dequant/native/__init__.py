"""Functions of this package as code for this machine's processor, which Numba compiles once.

From then on they come from disk: llvmlite alone loads them, which takes 30 ms. Each is a C function of one address,
that of one of the `records`. Their source is in the modules that `compiling` names, which import Numba.
"""

from __future__ import annotations

import ctypes
import os
import threading
from importlib.metadata import version
from typing import Any

from numba_dequant import store

_lock = threading.Lock()
_engines: list[Any] = []
"""None, and then the one that holds the code as long as the process lives: threads may be running it."""


def load(name: str) -> ctypes.c_void_p:
    """The address of a function."""
    with _lock:
        if not _engines:
            _engines.append(_engine())
    return ctypes.c_void_p(_engines[0].get_function_address(name))


def is_loaded() -> bool:
    """Whether `load` costs nothing any more."""
    return bool(_engines)


def keep() -> None:
    """Compile all functions, if nobody has yet, and keep them on disk."""
    _text()


def _engine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(_text())
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def _text() -> str:
    """The functions as LLVM's text, from disk if they have been compiled before."""
    entry = store.entry_name("native", version("numba"), version("llvmlite"), os.uname().machine)
    kept = store.read(entry)
    if kept is None:
        from numba_dequant.native.compiling import compile_functions

        kept = compile_functions().encode()
        store.write(entry, kept)
    return kept.decode()
