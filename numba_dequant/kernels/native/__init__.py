"""Native functions of this package, which Numba compiles once for the processor of this machine.

They are cached on disk as object code. Loading takes 3 ms and needs only llvmlite (30 ms to import), not Numba. Each
is a C function of integers and addresses. Calls through ctypes release the GIL.
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
"""Owners of the code. They live as long as the process, because threads may be running it."""


def load(name: str) -> ctypes.c_void_p:
    """The address of a function in `native.compiling.FUNCTIONS`."""
    return ctypes.c_void_p(_own_functions()[name])


def is_loaded() -> bool:
    """Whether the functions are loaded."""
    return _own_functions.has()


def ensure_compiled() -> None:
    """Compile all functions and cache them on disk, unless that is done."""
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
    """The addresses of functions, by name, from the cache or newly compiled.

    Args:
        label: the label of the cache entry.
        names: the names of the functions.
        functions: returns the functions; their arguments and results are int64.
        is_kept: whether to cache them; they must then depend only on this package and on Numba and llvmlite.
    """
    if is_kept:
        entry = disk_cache.cache_key(label, disk_cache.versions("numba", "llvmlite"), *processor())
        kept = disk_cache.read(entry) or b""
        if kept[:SUM_SIZE] == _sum(kept[SUM_SIZE:]):
            try:
                return _addresses(names, kept[SUM_SIZE:])
            except (RuntimeError, LookupError):
                pass  # Compile again.
    from numba_dequant.kernels.native import compiling

    compiled = {function.__name__: compiling.compile_function(function) for function in functions()}
    if is_kept:
        try:
            code = compiling.object_code(compiled)
            addresses = _addresses(names, code)
        except Exception as error:
            # How Numba names functions and passes arguments is not a public interface.
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            warn_once(
                f"numba_dequant compiles in each process, because it cannot cache code of this Numba ({reason[0]})"
            )
        else:
            disk_cache.write(entry, _sum(code) + code)
            return addresses
    _alive.append(compiled)
    return {name: int(compiled[name].address) for name in names}


def _sum(code: bytes) -> bytes:
    # LLVM aborts the process if the data is not object code, so the entry is marked as such.
    return hashlib.sha256(b"object code" + code).digest()


def processor() -> tuple[str, str]:
    """Name and features of the target processor, from LLVM or from Numba's environment variables."""
    import llvmlite.binding as llvm

    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if name is None:
        name = llvm.get_host_cpu_name()
    if features is None:
        try:
            features = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # not supported on every system
            features = ""
    return name, features


def target_machine() -> Any:
    """The LLVM target machine for this process."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    name, features = processor()
    # As in Numba: on x86, LLVM needs static relocation for JIT code.
    relocation = "static" if target.name.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc=relocation, codemodel="jitdefault", jit=True
    )


def _addresses(names: Sequence[str], code: bytes) -> dict[str, int]:
    """Load object code.

    Raises:
        RuntimeError: LLVM cannot load the code.
        LookupError: a function is missing.
    """
    import llvmlite.binding as llvm

    machine = target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    addresses = {name: engine.get_function_address(name) for name in names}
    if missing := [name for name, address in addresses.items() if not address]:
        raise LookupError(f"the code has no function {', '.join(missing)}")
    return addresses
