"""How products of one and of eight columns are divided on an H100, checked where there is no GPU."""

from types import SimpleNamespace

import pytest
from products import FUSED

import numba_dequant as nd
from numba_dequant.backends import product_choice
from numba_dequant.kernels.product_shape import ROWS, shared_bytes

H100 = SimpleNamespace(capability=(9, 0), shared_memory=227 << 10, processors=132)
OLDER = SimpleNamespace(capability=(8, 0), shared_memory=163 << 10, processors=108)
MEMORY_OF_PROCESSOR = 228 << 10
RESERVED = 1 << 10


def sizes(name, n_rows, n_elements, gpu=H100, columns=1):
    fmt, tiles = nd.FORMATS[name], -(-n_rows // ROWS)
    shape = product_choice.product_shape(gpu, fmt, tiles, n_elements, columns, is_aligned=True)
    thread_blocks, n_bytes = product_choice.launch_size(gpu, fmt, shape, tiles, n_elements)
    assert shared_bytes(fmt, shape, n_elements) <= n_bytes <= gpu.shared_memory
    assert 0 < thread_blocks <= tiles
    return shape, thread_blocks, n_bytes


@pytest.mark.parametrize("n_elements", [256, 2048, 4096, 5120, 14336, 28672])
@pytest.mark.parametrize("name", FUSED)
def test_one_wave_has_exactly_two_thread_blocks_on_a_multiprocessor(name, n_elements):
    shape, thread_blocks, n_bytes = sizes(name, 4096, n_elements)
    assert thread_blocks == 4096 // ROWS
    assert MEMORY_OF_PROCESSOR // (n_bytes + RESERVED) == shape.resident == 2
    assert shape.threads * 2 * 96 <= 65536, "registers"
    assert shape.streams == (n_elements > 8192)


@pytest.mark.parametrize("n_rows", [4240, 14336, 32752])
@pytest.mark.parametrize("name", FUSED)
def test_some_waves(name, n_rows):
    """Either thread blocks have one tile each, or all of them run at once."""
    shape, thread_blocks, n_bytes = sizes(name, n_rows, 4096)
    assert shape.parts == 2
    if name == "Q1_0":  # it needs more loads in flight
        assert thread_blocks == min(132 * (H100.shared_memory // n_bytes), n_rows // ROWS)
    elif thread_blocks != n_rows // ROWS:
        per_processor = min(shape.resident, MEMORY_OF_PROCESSOR // (n_bytes + RESERVED))
        assert thread_blocks == min(132 * per_processor, n_rows // ROWS)


@pytest.mark.parametrize(
    ("name", "warps", "stages", "thread_blocks"),
    [
        ("Q4_0", 8, 2, 264),
        ("Q8_0", 8, 2, 132),
        ("Q4_K", 8, 1, 396),
        ("Q6_K", 8, 1, 396),
        ("IQ4_XS", 8, 1, 896),
        ("Q1_0", 8, 2, 792),
    ],
)
def test_what_was_fastest_for_14336x4096(name, warps, stages, thread_blocks):
    shape, found, _ = sizes(name, 14336, 4096)
    assert (shape.warps, shape.stages, found) == (warps, stages, thread_blocks)


@pytest.mark.parametrize(("n_rows", "n_elements"), [(256, 256), (4096, 14336), (14336, 4096), (131072, 4096)])
@pytest.mark.parametrize("name", FUSED)
def test_eight_columns_run_all_at_once(name, n_rows, n_elements):
    shape, thread_blocks, n_bytes = sizes(name, n_rows, n_elements, columns=8)
    per_processor = min(shape.resident, MEMORY_OF_PROCESSOR // (n_bytes + RESERVED))
    assert thread_blocks == min(132 * per_processor, n_rows // ROWS)
    assert shape.threads * shape.resident * 84 <= 65536, "registers"


@pytest.mark.parametrize(
    ("name", "n_rows", "n_elements", "layout", "thread_blocks"),
    [
        ("Q4_0", 131072, 4096, (8, 1, 2), 264),
        ("Q8_0", 131072, 4096, (8, 2, 2), 132),
        ("Q2_K", 131072, 4096, (8, 1, 2), 396),
        ("Q4_K", 4096, 14336, (8, 2, 1), 256),
        ("Q4_K", 4096, 4096, (8, 1, 2), 256),
    ],
)
def test_what_was_fastest_for_eight_columns(name, n_rows, n_elements, layout, thread_blocks):
    shape, found, _ = sizes(name, n_rows, n_elements, columns=8)
    assert ((shape.warps, shape.stages, shape.parts), found) == (layout, thread_blocks)


@pytest.mark.parametrize("n_rows", [4096, 14336, 131072])
@pytest.mark.parametrize("name", FUSED)
def test_where_kernels_do_not_overlap(name, n_rows):
    shape, _, _ = sizes(name, n_rows, 4096, OLDER)
    assert not shape.overlaps
    assert not shape.streams
