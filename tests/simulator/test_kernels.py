"""The kernels under Numba's CUDA simulator; tests/plain/test_simulator.py runs this file in a process of its own."""

import os

import numpy as np
import pytest
from blocks import (
    DECODED,
    DTYPES,
    GOLDEN,
    assert_all_values,
    assert_same_bits,
    bytes_format,
    golden,
    random_blocks,
    rounded,
    write_model,
)
from numba import cuda

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated
from numba_dequant.kernels.dequantize import jit, make_batch_kernel
from numba_dequant.kernels.launch_shape import MAPPINGS, launch_shape, tile_directory

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, dtype):
    source = nd.FORMATS[name]
    data, values = golden(name)
    if source.block_size > 1:
        step = max(len(data) // (1024 // source.block_size), 1)
        data, values = data[::step], values[::step]
    else:
        data, values = data.reshape(-1)[: 2001 * source.type_size], values.reshape(-1)[:2001]
    out = np.full(values.shape, 77, rounded(values, dtype).dtype)
    nd.dequantize(np.ascontiguousarray(data), name, dtype, device="cuda", out=out)
    assert_same_bits(out, rounded(values, dtype))


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F16"])
def test_sizes_around_a_tile(name, mapping):
    source = nd.FORMATS[name]
    tile = launch_shape(mapping, source).tile_elements // source.block_size
    for n_blocks in {0, 1, tile - 1, tile, tile + 1}:
        data = random_blocks(name, n_blocks)
        out = np.full(n_blocks * source.block_size, 77, np.float16)
        nd.dequantize(data, name, device="cuda", out=out, mapping=mapping)
        assert_same_bits(out, nd.dequantize(data, name, device="reference"))


@pytest.mark.parametrize(("block_size", "mapping"), [(40, "tile"), (24, "block"), (264, "block")])
def test_any_number_of_runs(block_size, mapping):
    assert_all_values(block_size, "cuda", mapping)


@pytest.mark.parametrize("block_size", [24, 40, 72])
def test_a_thread_block_writes_only_its_tile(block_size):
    fmt = bytes_format(block_size)
    shape = launch_shape("tile", fmt)
    n = 2 * shape.tile_elements
    out = cuda.to_device(np.full(n, 77, np.float16))
    jit(fmt, mapping="tile")[1, shape.threads](cuda.to_device(np.zeros(fmt.n_bytes((n,)), np.uint8)), n, out)
    found = out.copy_to_host()
    assert not found[: shape.tile_elements].any()
    assert (found[shape.tile_elements :] == 77).all()


@pytest.mark.parametrize("name", DECODED)
def test_one_thread_block_per_quant_block_the_numba_way(name):
    source = nd.FORMATS[name]
    shape = launch_shape("block", source)
    data = random_blocks(name, 24 if source.block_size == 1 else 3)
    n = source.n_elements(data.size)
    out = cuda.to_device(np.full(n, 77, np.float16))
    jit(name)[shape.thread_blocks(n), shape.threads](cuda.to_device(data), n, out)
    assert_same_bits(out.copy_to_host(), nd.dequantize(data, name, device="reference"))
    if source.block_size > 1:
        assert shape.thread_blocks(n) == 3


def test_loading(tmp_path):
    tensors = {
        "a": ("Q6_K", (2, 512), random_blocks("Q6_K", 4)),
        "ids": ("I32", (3,), np.arange(3, dtype="<i4").tobytes()),
        "b": ("F32", (20, 5), np.arange(100, dtype="<f4").tobytes()),
    }
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        expected = model.load_all(device="reference")
        out = {"a": np.full((2, 512), 7, np.float16)}
        found = model.load_all(device="cuda", out=out)
        assert found["a"] is out["a"]
        np.testing.assert_array_equal(found["a"], expected["a"])
        for name in ("ids", "b"):
            np.testing.assert_array_equal(found[name].copy_to_host(), expected[name])
        for name, tensor in model.stream(device="cuda", keep_quantized=True):
            np.testing.assert_array_equal(tensor.data, model.read(name))
        os.truncate(model.path, 200)
        with pytest.raises(nd.GgufError, match="tensor 'b' ends at byte"):
            model.load("b", device="cuda")


def test_a_result_without_out():
    data = random_blocks("Q6_K", 2)
    found = nd.dequantize(data, "Q6_K", shape=(2, 256), device="cuda")
    assert found.shape == (2, 256)
    assert_same_bits(found.copy_to_host(), nd.dequantize(data, "Q6_K", shape=(2, 256), device="reference"))


@pytest.mark.parametrize(
    ("name", "lengths"), [(name, [1]) for name in ("Q8_0", "Q4_K", "MXFP4", "F32")] + [("Q4_K", [32, 1, 33, 2, 17])]
)
def test_many_tensors(name, lengths):
    source = nd.FORMATS[name]
    lengths = np.array(lengths) * (256 // source.block_size if source.block_size < 256 else 1)
    gap_bytes, gap_elements = 2 * source.type_size, 16
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    data_starts = starts * source.type_size + gap_bytes * np.arange(len(lengths))
    out_starts = starts * source.block_size + gap_elements * np.arange(len(lengths))
    shape = launch_shape("tile", source)
    table, n_tiles = tile_directory(shape, data_starts, out_starts, lengths * source.block_size)
    data = np.zeros(data_starts[-1] + lengths[-1] * source.type_size, np.uint8)
    expected = np.full(out_starts[-1] + lengths[-1] * source.block_size, 77, np.float16)
    for length, at, to in zip(lengths, data_starts, out_starts, strict=True):
        blocks = random_blocks(name, length, seed=int(at))
        data[at : at + blocks.size] = blocks
        values = nd.dequantize(blocks, name, device="reference")
        expected[to : to + values.size] = values
    out = cuda.to_device(np.full_like(expected, 77))
    kernel = cuda.jit(make_batch_kernel(source, "float16", shape))
    kernel[n_tiles, shape.threads](cuda.to_device(data), cuda.to_device(table.reshape(-1)), len(lengths), out)
    assert_same_bits(out.copy_to_host(), expected)
