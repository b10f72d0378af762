"""Kernels that are kept on disk."""

import pytest
from processes import assert_processes_keep

import numba_dequant as nd
from numba_dequant import disk_cache
from numba_dequant.cli import main
from numba_dequant.kernels import compiler

pytestmark = pytest.mark.toolkit


def compile_kernel():
    name, code = compiler.cubin(compiler.dequantize_kernel(nd.FORMATS["Q8_0"], "float16"), (9, 0))
    return name, code[:4]


@pytest.mark.long
def test_five_processes_at_once(empty_store):
    assert_processes_keep(5, compile_kernel, empty_store, 1, ["numba_dequant.kernels.dequantize", "cuda.core"])


@pytest.mark.long
def test_warm_and_cache(empty_store, capsys):
    assert main.main(["cache"]) == 0
    assert "0 entries, 0 bytes" in capsys.readouterr().out
    arguments = ["warm", "--cpu", "--arch", "sm_90", "--arch", "80", "--formats", "Q8_0", "--dtype", "float32"]
    assert main.main(arguments) == 0
    assert "1 format to float32 compiled for the CPU, sm_90, sm_80" in capsys.readouterr().out
    assert main.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "6 entries" in shown
    assert "native" in shown.split()
    for label in ("cpu-Q8_0-float32", "sm90-Q8_0-float32-tile", "sm80-Q8_0-float32-batch"):
        assert label in shown
    # What is warm is not compiled again.
    written = {entry: entry.stat().st_mtime_ns for entry in empty_store.iterdir()}
    assert main.main(arguments) == 0
    assert {entry: entry.stat().st_mtime_ns for entry in empty_store.iterdir()} == written
    capsys.readouterr()
    assert main.main(["cache", "--clear"]) == 0
    assert "6 entries removed" in capsys.readouterr().out
    assert not list(empty_store.iterdir())


def test_a_kernel_entry_that_is_damaged_is_rebuilt(empty_store):
    kernel = compiler.dequantize_kernel(nd.FORMATS["Q8_0"], "float16")
    first = compiler.cubin(kernel, (9, 0))
    (entry,) = empty_store.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    assert compiler.cubin(kernel, (9, 0))[1][:4] == first[1][:4] == b"\x7fELF"


@pytest.mark.parametrize("content", [b"", b"no code", b"name\0no code"])
def test_a_sound_entry_that_is_no_code_for_a_gpu_is_compiled_anew(empty_store, content):
    first = compile_kernel()
    (name,) = disk_cache.entries()
    disk_cache.write(name, content)
    assert compile_kernel()[1] == first[1] == b"\x7fELF"


def test_kernels_of_one_label_do_not_share_their_code(empty_store):
    first = compiler.KernelSpec("same", "copy.make_copy_kernel", (1, 128, 0))
    second = compiler.KernelSpec("same", "copy.make_copy_kernel", (2, 128, 0))
    assert compiler.cubin(first, (9, 0)) != compiler.cubin(second, (9, 0))
    assert compiler.cubin(first, (9, 0)) != compiler.cubin(first._replace(bounds=(128, 8)), (9, 0))
