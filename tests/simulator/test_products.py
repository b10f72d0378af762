"""The kernels of products under Numba's CUDA simulator: each warp is 32 Python threads that exchange their values."""

import numpy as np
import pytest
from numba import cuda
from products import FUSED, bound, columns, error, weights

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated
from numba_dequant.kernels.product import make_product_kernel
from numba_dequant.kernels.product_columns import make_prepare_kernel, make_routes_kernel
from numba_dequant.kernels.product_panel import make_panel_kernel
from numba_dequant.kernels.product_shape import (
    PREPARE_THREADS,
    PanelShape,
    ProductShape,
    WideShape,
    column_bytes,
    has_products,
    shared_bytes,
    wide_shared_bytes,
)
from numba_dequant.kernels.product_wide import make_wide_kernel

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


def prepare(fmt, x, n_prepared, thread_blocks_of_column=2, panel=0, n_flags=0):
    """The prepared columns and their powers, and flags."""
    n_columns, n_elements = x.shape
    prepared = cuda.to_device(np.full(n_prepared * column_bytes(fmt, n_elements), 99, np.uint8))
    factors = cuda.to_device(np.full(n_prepared + n_flags, 99, np.float32))
    kernel = cuda.jit(make_prepare_kernel(fmt, "float16" if x.dtype == np.float16 else "bfloat16", panel=panel))
    given = cuda.to_device(x.view(np.uint8).reshape(-1))
    kernel[(n_prepared, thread_blocks_of_column), PREPARE_THREADS](
        given, n_columns, n_elements // 32, prepared, factors, n_flags
    )
    powers, flags = np.split(factors.copy_to_host(), [n_prepared])
    assert not flags.any()
    return prepared, cuda.to_device(powers.view(np.uint8)), cuda.to_device(flags.view(np.uint8))


def wide_product(name, blocks, x, shape, make_kernel, n_shares, bias=None):
    """As `product`, by a kernel for many columns; thread blocks have equal shares of the work, or their own rows."""
    fmt = nd.FORMATS[name]
    (n_rows, row_bytes), (n_columns, n_elements) = blocks.shape, x.shape
    times = -(-n_columns // shape.columns)
    prepared, powers, flags = prepare(fmt, x, times * shape.columns, 1, shape.panel, n_shares)
    out = cuda.to_device(np.full(n_columns * n_rows, 77, np.float32))
    added = cuda.to_device(np.zeros(0, np.uint8) if bias is None else bias.view(np.uint8))
    kernel = cuda.jit(make_kernel(fmt, "float32", None if bias is None else "float16", shape))
    arguments = [cuda.to_device(blocks.reshape(-1)), n_rows, row_bytes, n_elements // 32, prepared, n_columns, powers]
    arguments += [added, out]
    if n_shares:
        arguments += [cuda.to_device(np.full(n_shares * shape.rows * shape.columns * 4, 99, np.uint8)), flags]
    grid = n_shares or (-(-n_rows // shape.rows), times)
    kernel[grid, shape.threads, 0, wide_shared_bytes(fmt, shape)](*arguments)
    return out.copy_to_host().reshape(n_columns, n_rows)


@pytest.mark.parametrize(
    ("name", "n_rows", "n_elements", "n_columns", "shape", "make_kernel", "n_shares"),
    [
        ("Q4_K", 17, 256, 3, WideShape(is_aligned=True, overlaps=False), make_wide_kernel, 0),
        # Of two products of two parts, two thread blocks have a part each, the third has the other product.
        ("Q4_1", 17, 288, 35, PanelShape(32, is_aligned=False, rows=64, resident=2), make_panel_kernel, 3),
    ],
)
def test_many_columns(name, n_rows, n_elements, n_columns, shape, make_kernel, n_shares):
    blocks, values = weights(name, n_rows, n_elements)
    x, bias = columns(n_columns, n_elements), columns(1, n_rows, seed=1)[0]
    found = wide_product(name, blocks, x, shape, make_kernel, n_shares, bias)
    assert error(found, x.astype(np.float64) @ values.T + bias) < bound(name)


def product(name, blocks, x, shape, bias=None, thread_blocks=1):
    fmt = nd.FORMATS[name]
    (n_rows, row_bytes), (n_columns, n_elements) = blocks.shape, x.shape
    n_groups = n_elements // 32
    out = cuda.to_device(np.full(n_columns * n_rows, 77, np.float32))
    prepared, powers = cuda.to_device(x.view(np.uint8).reshape(-1)), cuda.to_device(np.zeros(0, np.uint8))
    if shape.columns > 1:
        prepared, powers, _ = prepare(fmt, x, shape.columns, 2 if shape.columns == 8 else 1)
    added = cuda.to_device(np.zeros(0, np.uint8) if bias is None else bias.view(np.uint8))
    kernel = cuda.jit(make_product_kernel(fmt, "float32", None if bias is None else "float16", shape))
    kernel[thread_blocks, shape.threads, 0, shared_bytes(fmt, shape, n_elements)](
        cuda.to_device(blocks.reshape(-1)),
        n_rows,
        row_bytes,
        n_groups,
        prepared,
        n_columns,
        powers,
        added,
        out,
        cuda.to_device(np.zeros(1, np.int64)),
        1,
    )
    return out.copy_to_host().reshape(n_columns, n_rows)


@pytest.mark.parametrize("name", FUSED)
def test_one_column(name):
    n_elements = max(256, nd.FORMATS[name].block_size)
    blocks, values = weights(name, 16, n_elements)
    x = columns(1, n_elements)
    found = product(name, blocks, x, ProductShape(1, 1, 1, 1, False, False))
    assert error(found, x.astype(np.float64) @ values.T) < bound(name)


@pytest.mark.parametrize(("n_columns", "width", "n_rows"), [(3, 8, 37), (13, 16, 17), (18, 32, 3)])
def test_more_tiles_columns_and_warps_than_fit_evenly(n_columns, width, n_rows):
    blocks, values = weights("Q4_1", n_rows, 32 * 19)
    x, bias = columns(n_columns, 32 * 19), columns(1, n_rows, seed=1)[0]
    found = product("Q4_1", blocks, x, ProductShape(2, 2, 2, width, False, False), bias, thread_blocks=2)
    expected = x.astype(np.float64) @ values.T + bias.astype(np.float64)
    assert error(found, expected) < bound("Q4_1")


@pytest.mark.parametrize(("name", "parts"), [("Q4_1", 2), ("Q2_K", 1), ("IQ4_XS", 2), ("Q8_0", 1)])
def test_a_column_that_is_copied_chunk_by_chunk(name, parts):
    """Its last chunk is short, and warps have different numbers of chunks."""
    n_elements = 256 * 3 if nd.FORMATS[name].block_size == 256 else 32 * 19
    blocks, values = weights(name, 37, n_elements)
    x, bias = columns(1, n_elements), columns(1, 37, seed=1)[0]
    shape = ProductShape(2, 1, parts, 1, False, False, streams=True)
    found = product(name, blocks, x, shape, bias, thread_blocks=2)
    assert error(found, x.astype(np.float64) @ values.T + bias.astype(np.float64)) < bound(name)


def test_bfloat16_columns():
    import ml_dtypes

    blocks, values = weights("Q2_K", 16, 256)
    x = (columns(2, 256) * np.array([[1e-30], [1e30]], np.float32)).astype(ml_dtypes.bfloat16)
    found = product("Q2_K", blocks, x, ProductShape(1, 1, 1, 8, False, False))
    for column in range(2):
        assert error(found[column], x[column].astype(np.float64) @ values.T) < bound("Q2_K")


def test_formats_without_factors_round_their_values():
    plain = nd.FORMATS["Q8_0"]
    fmt = nd.Format("MINE", 9001, 32, plain.layout, "mine", plain.dequantize, plain.decode)
    assert has_products(fmt)
    assert not has_products(nd.FORMATS["F16"])


def test_experts():
    """Each column with the matrices of its experts; one expert has more columns than a kernel multiplies at a time."""
    fmt, n_experts, n_rows = nd.FORMATS["Q4_0"], 3, 20
    blocks, values = weights("Q4_0", n_experts * n_rows, 256)
    x = columns(10, 256)
    ids = np.array([[2, 0]] * 9 + [[0, 2]], np.int64)
    routes = cuda.to_device(np.full(n_experts + 1 + ids.size, -7, np.int64))
    cuda.jit(make_routes_kernel())[1, PREPARE_THREADS](cuda.to_device(ids.reshape(-1)), ids.size, n_experts, routes)
    pairs = np.arange(20).reshape(10, 2)
    by_expert = [sorted(pairs[ids == expert].tolist()) for expert in range(n_experts)]
    assert routes.copy_to_host().tolist() == [0, 10, 10, 20, *by_expert[0], *by_expert[1], *by_expert[2]]

    shape = ProductShape(1, 1, 1, 8, True, False, experts=True)
    prepared = cuda.to_device(np.zeros(10 * column_bytes(fmt, 256), np.uint8))
    powers, out = cuda.to_device(np.zeros(10, np.float32)), cuda.to_device(np.full(20 * n_rows, 77, np.float32))
    given = cuda.to_device(x.view(np.uint8).reshape(-1))
    cuda.jit(make_prepare_kernel(fmt, "float16"))[(10, 1), PREPARE_THREADS](given, 10, 8, prepared, powers, 0)
    kernel = cuda.jit(make_product_kernel(fmt, "float32", None, shape))
    kernel[(1, n_experts), shape.threads, 0, shared_bytes(fmt, shape, 256)](
        cuda.to_device(blocks.reshape(-1)), n_rows, blocks.shape[1], 8, prepared, 10,
        cuda.to_device(powers.copy_to_host().view(np.uint8)), powers, out, routes, 2,
    )  # fmt: skip
    expected = np.einsum("nk,ncrk->ncr", x.astype(np.float64), values.reshape(n_experts, n_rows, 256)[ids])
    assert error(out.copy_to_host().reshape(10, 2, n_rows), expected) < bound("Q4_0")
