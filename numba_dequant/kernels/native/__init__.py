"""Functions of this package as code for this machine's processor, which Numba compiles once.

From then on they come from disk, as object code: llvmlite alone loads them, which takes 3 ms after the 30 ms that it
takes to import, and Numba is not imported. Each is a C function of integers and addresses. Calls through ctypes
release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from numba_dequant import disk_cache
from numba_dequant.errors import warn_once
from numba_dequant.locks import compiled_once

SUM_SIZE = 32

_alive: list[Any] = []
"""What holds the code, as long as the process lives: threads may be running it."""


def load(name: str) -> ctypes.c_void_p:
    """The address of one of the functions that `native.compiling` names."""
    return ctypes.c_void_p(_own_functions()[name])


def is_loaded() -> bool:
    """Whether `load` costs nothing any more."""
    return _own_functions.has()


def ensure_compiled() -> None:
    """Compile all functions, if nobody has yet, and keep them on disk."""
    _own_functions()


@compiled_once
def _own_functions() -> dict[str, int]:
    def functions() -> Sequence[Callable[..., Any]]:
        from numba_dequant.kernels.native.compiling import FUNCTIONS

        return FUNCTIONS

    return load_functions("native", ("read_and_send", "join_threads", "walk_strings"), functions)


def load_functions(
    label: str, names: Sequence[str], functions: Callable[[], Sequence[Callable[..., Any]]], *, is_kept: bool = True
) -> dict[str, int]:
    """The addresses of functions, by name: from disk, or else compiled, and kept there if `is_kept`.

    Args:
        label: of the entry on disk.
        names: of the functions.
        functions: gives the functions themselves, of int64 arguments, whose result is int64.
        is_kept: whether they depend on nothing but this package's source and the versions of Numba and llvmlite.
    """
    if is_kept:
        entry = disk_cache.cache_key(label, disk_cache.versions("numba", "llvmlite"), *processor())
        kept = disk_cache.read(entry) or b""
        if kept[:SUM_SIZE] == _sum(kept[SUM_SIZE:]):
            try:
                return _addresses(names, kept[SUM_SIZE:])
            except (RuntimeError, LookupError):
                pass  # Whatever is wrong with it, compiling anew mends it.
    from numba_dequant.kernels.native import compiling

    compiled = {function.__name__: compiling.compile_function(function) for function in functions()}
    if is_kept:
        try:
            code = compiling.object_code(compiled)
            found = _addresses(names, code)
        except Exception as error:
            # It depends on how Numba names functions and passes arguments, which is not a public interface.
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            warn_once(f"numba_dequant compiles in each process: it cannot keep code of this Numba ({reason[0]})")
        else:
            disk_cache.write(entry, _sum(code) + code)
            return found
    _alive.append(compiled)
    return {name: int(compiled[name].address) for name in names}


def _sum(code: bytes) -> bytes:
    # LLVM ends the process on what is not object code, so an entry must say that it is, even if it is a sound one.
    return hashlib.sha256(b"object code" + code).digest()


def processor() -> tuple[str, str]:
    """Name and features of the processor that code is made for; Numba's variables override what LLVM finds."""
    import llvmlite.binding as llvm

    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if name is None:
        name = llvm.get_host_cpu_name()
    if features is None:
        try:
            features = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know them on every system
            features = ""
    return name, features


def target_machine() -> Any:
    """What LLVM needs to know to make code for this process."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    name, features = processor()
    # What Numba takes: LLVM wants static relocation of code that is not linked on x86.
    relocation = "static" if target.name.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


def _addresses(names: Sequence[str], code: bytes) -> dict[str, int]:
    """Load object code.

    Raises:
        RuntimeError: LLVM cannot.
        LookupError: a function is not in it.
    """
    import llvmlite.binding as llvm

    machine = target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    found = {name: engine.get_function_address(name) for name in names}
    if not all(found.values()):
        raise LookupError(f"the code holds no {', '.join(name for name, address in found.items() if not address)}")
    return found
