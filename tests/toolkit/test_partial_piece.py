"""The last bytes of a row whose end is no multiple of 16: the code that reads them, compiled for the host."""

import ctypes
import mmap
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

pytest.importorskip("numba_cuda")

from numba_dequant.kernels import intrinsics_mma
from numba_dequant.kernels.intrinsics import BYTE, WORD
from numba_dequant.kernels.intrinsics_cuda import FOUR_WORDS


@pytest.fixture(scope="module")
def first_bytes():
    """``first_bytes(source, count, out)``."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = ir.Module()
    pointers = ir.PointerType(BYTE), ir.PointerType(FOUR_WORDS)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointers[0], WORD, pointers[1]]), "first_bytes")
    builder = ir.IRBuilder(function.append_basic_block())
    source, count, out = function.args
    builder.store(intrinsics_mma._first_bytes(builder, source, count), out, align=1)
    builder.ret_void()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    yield kind(engine.get_function_address("first_bytes"))
    engine.close()


@pytest.mark.parametrize("count", range(1, 16))
def test_the_first_bytes_and_zeros(first_bytes, count):
    given = np.random.default_rng(count).integers(1, 256, 16, np.uint8)
    found = np.full(16, 7, np.uint8)
    first_bytes(given.ctypes.data, count, found.ctypes.data)
    assert found[:count].tolist() == given[:count].tolist()
    assert not found[count:].any()


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("count", [1, 2, 15])
def test_no_other_byte_is_read(first_bytes, count):
    """The next page cannot be read."""
    page = mmap.PAGESIZE
    room = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    found = np.zeros(16, np.uint8)
    room[page - count : page] = b"\x05" * count
    first_bytes(start + page - count, count, found.ctypes.data)
    assert found.tolist() == [5] * count + [0] * (16 - count)
