"""What the kernels compile to, checked where there is no GPU."""

import re
from pathlib import Path

import pytest
from blocks import DECODED, DTYPES, bytes_format
from numba import types
from ptx_rules import WIDE_LOAD, faults

import numba_dequant as nd
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.kernels import compiler
from numba_dequant.kernels.copy import READS

Q4_K = compiler.dequantize_kernel(nd.FORMATS["Q4_K"], "float16")


SHAPES = {(fmt.block_size, fmt.alignment): name for name, fmt in nd.FORMATS.items() if fmt.decode}
"""A format for each size and alignment of blocks: nothing else decides how a kernel is cut, and how it stores."""

KERNELS = [(name, dtype) for dtype in DTYPES for name in (DECODED if dtype == "float16" else SHAPES.values())]


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_wide_accesses_and_nothing_slow(name, dtype):
    text = compiler.ptx(compiler.dequantize_kernel(nd.FORMATS[name], dtype), (9, 0))
    assert faults(text) == ([] if numpy_dtype(dtype).itemsize > 1 else ["no 16-byte store"])


@pytest.mark.parametrize("stage", [0, 512])
def test_the_roofline_kernel_moves_16_bytes_at_a_time(stage):
    text = compiler.ptx(compiler.copy_kernel(2, 256, stage), (9, 0))
    assert faults(text) == []
    assert bool(stage) == (".shared" in text)


def test_the_read_kernel_has_several_wide_loads_on_the_way():
    text = compiler.ptx(compiler.read_kernel(256), (9, 0))
    assert faults(text) == ["no 16-byte store"]
    loop = re.search(r"(?s)\$L__BB0_2:.*?bra", text)[0]
    assert len(re.findall(WIDE_LOAD, loop)) == READS
    assert compiler.cubin(compiler.read_kernel(256), (9, 0))[1].startswith(b"\x7fELF")


@pytest.mark.parametrize("name", SHAPES.values())
def test_literal_mapping_compiles(name):
    assert ".entry" in compiler.ptx(compiler.dequantize_kernel(nd.FORMATS[name], "float16", "block"), (9, 0))


@pytest.mark.parametrize("capability", [(1, 0), (99, 9)])
def test_gpus_that_the_toolkit_does_not_know(capability):
    with pytest.raises(nd.DeviceError, match=r"cannot compile sm\d+-Q4_K-float16-tile: .+"):
        compiler.cubin(Q4_K, capability)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (12, 0)])
def test_other_gpus(capability):
    name, code = compiler.cubin(Q4_K, capability)
    assert code.startswith(b"\x7fELF")
    assert "dequantize_Q4_K" in name


def test_a_linker_that_is_older_than_the_compiler():
    """The packages of the two are chosen by different programs that share an environment."""
    text = compiler.ptx(Q4_K, (9, 0))
    newer = re.sub(r"(?m)^\.version (\d+)\.\d+$", r".version \1.99", text)
    assert newer != text
    assert compiler.assemble(newer, (9, 0)) == compiler.assemble(text, (9, 0))


def test_what_no_linker_takes_is_refused_for_its_first_reason():
    text = compiler.ptx(Q4_K, (9, 0))
    with pytest.raises(Exception, match="PTX_COMPILE"):
        compiler.assemble(text.replace("ld.global", "ld.globe"), (9, 0))


@pytest.mark.parametrize(("block_size", "n_shuffles"), [(112, 0), (144, 0), (256, 8)])
def test_threads_store_in_pairs_only_if_each_has_a_partner(block_size, n_shuffles):
    """Tiles of blocks of 112 elements have 259 threads. The last one wrote what it had not, behind the tile."""
    text = compiler.ptx(compiler.dequantize_kernel(bytes_format(block_size), "float32"), (9, 0))
    assert text.count("shfl.sync.bfly") == n_shuffles


def test_the_kernel_of_the_walk_through_compiles():
    """The page says that its loads have one byte each."""
    page = (Path(__file__).parents[2] / "docs" / "add-a-kernel.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[:2]:
        exec(code, names)
    kinds = types.uint16[::1], types.int64, types.float32[::1]
    text = compiler.function_ptx(names["row_maxima"].py_func, (9, 0), *kinds)
    loads = set(re.findall(r"ld\.global\S*\.[us]\d+", text))
    assert loads == {"ld.global.u16", "ld.global.s8"}
    assert "local" not in text.partition(".entry")[2]
