"""What the kernels of products compile to, checked where there is no GPU."""

import re

import pytest
from products import FUSED
from ptx_rules import SLOW

import numba_dequant as nd
from numba_dequant.kernels import compiler
from numba_dequant.kernels.product_shape import PanelShape, ProductShape, WideShape

FAST = ProductShape(8, 2, 2, 1, True, True)


def slow(text):
    return [name for name, pattern in SLOW.items() if re.search(pattern, text)]


@pytest.mark.parametrize("name", FUSED)
def test_tensor_cores_and_asynchronous_copies_and_nothing_slow(name):
    text = compiler.ptx(compiler.product_kernel(nd.FORMATS[name], "float16", None, FAST), (9, 0))
    assert slow(text) == []
    assert text.count("mma.sync.aligned.m16n8k16") == 16, "two for each group of 32 elements of a part"
    assert text.count("mma.sync.aligned.m16n8k8") in (0, 2, 4), "the minima"
    assert "cp.async.cg.shared.global" in text
    assert "griddepcontrol.wait" in text
    assert ".maxntid 256" in text


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS"])
def test_a_column_that_is_copied_chunk_by_chunk(name):
    shape = ProductShape(10, 1, 2, 1, True, True, streams=True)
    text = compiler.ptx(compiler.product_kernel(nd.FORMATS[name], "float16", None, shape), (9, 0))
    assert slow(text) == []
    assert text.count("mma.sync.aligned.m16n8k16") == 16
    assert text.count("bar.sync") == 1 + (nd.FORMATS[name].factors.table is not None), "results, and the table"
    assert ".maxntid 320" in text


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS"])
def test_many_columns(name):
    """One format has minima, the other a table."""
    text = compiler.ptx(compiler.wide_kernel(nd.FORMATS[name], "float16", None, WideShape(True, True)), (9, 0))
    assert slow(text) == []
    assert text.count("mma.sync.aligned.m16n8k16") == 8 * 16, "for 64 columns, eight times as many as for 8"
    assert text.count("mma.sync.aligned.m16n8k8") in (0, 8 * 2, 8 * 4), "the minima"
    assert "cp.async.cg.shared.global" in text
    assert "griddepcontrol.wait" in text
    assert ".maxntid 128" in text


@pytest.mark.parametrize(
    ("name", "shape", "waits"), [("Q4_K", PanelShape(32, True, 64, 2), 1), ("Q8_0", PanelShape(128, True, 128, 1), 8)]
)
def test_tensor_cores_of_compute_capability_9_0(name, shape, waits):
    """They read the columns from shared memory, and are waited for only where a block ends."""
    spec = compiler.wide_kernel(nd.FORMATS[name], "float16", None, shape)
    text = compiler.ptx(spec, (9, 0))
    assert slow(text) == ["a division"], "where a share starts"
    assert not re.search(r"\b(div|rem)\.[su]64", text)
    assert ".target sm_90a" in text
    assert text.count(f"wgmma.mma_async.sync.aligned.m64n{shape.columns}k16") == 16
    assert text.count("wgmma.wait_group") == waits
    assert "cp.async.bulk" in text
    assert "cp.async.cg.shared.global" in text
    assert compiler.cubin(spec, (9, 0))[1].startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("Q6_K", "bfloat16", ProductShape(8, 1, 1, 8, False, False)),
        ("Q2_K", "float32", ProductShape(7, 2, 1, 32, True, False)),
    ],
)
def test_other_shapes_and_older_gpus(name, dtype, shape):
    spec = compiler.product_kernel(nd.FORMATS[name], dtype, dtype, shape)
    text = compiler.ptx(spec, (8, 0))
    assert slow(text) == []
    assert "griddepcontrol" not in text
    entry, code = compiler.cubin(spec, (8, 0))
    assert code.startswith(b"\x7fELF")
    assert f"product_{name}" in entry


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Q2_K", "Q8_0"])
def test_preparing_columns(name, dtype):
    assert slow(compiler.ptx(compiler.prepare_kernel(nd.FORMATS[name], dtype, True), (9, 0))) == []
