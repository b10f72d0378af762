"""Random bytes through every operation of every format, to be run under each tool of compute-sanitizer.

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 python tests/gpu/sanitize.py
done

`--part 0 8` takes the first eighth of the formats. `--device cpu` tries the script without a GPU. Sizes are ragged:
around a block and around a tile. Addresses are as little aligned as the format allows. The values of `dequantize` and
of loads are compared with those of the reference.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "support")]

from blocks import DECODED, DTYPES, assert_same_bits, random_blocks, rounded, write_model  # noqa: E402

import numba_dequant as nd  # noqa: E402
from numba_dequant.kernels.launch_shape import launch_shape  # noqa: E402
from numba_dequant.kernels.product_shape import has_products  # noqa: E402

COLUMNS = (1, 3, 9, 33, 70)
SHAPES = ((1, 256), (17, 768), (130, 512))
"""Rows and elements of a row of a product."""


def sizes(fmt):
    """Numbers of blocks: one, a few, and around a tile."""
    tile = launch_shape("tile", fmt).tile_elements // fmt.block_size
    return sorted({1, 3, max(tile - 1, 1), tile, tile + 1, 2 * tile + 5})


def placed(data, offset, device):
    """A copy of bytes on the device, `offset` bytes behind an aligned address."""
    if device == "cpu":
        memory = np.zeros(data.size + 64, np.uint8)
        start = -memory.ctypes.data % 16 + offset
        memory[start : start + data.size] = data
        return memory[start : start + data.size]
    import torch

    memory = torch.zeros(data.size + offset, dtype=torch.uint8, device=device)
    memory[offset:] = torch.from_numpy(data.copy())
    return memory[offset:]


def host(array):
    return array if isinstance(array, np.ndarray) else array.copy_to_host()


def dequantized(name, device, done):
    fmt = nd.FORMATS[name]
    tensors = {}
    for number, n_blocks in enumerate(sizes(fmt)):
        data = random_blocks(name, n_blocks, seed=number)
        expected = nd.dequantize(data, name, "float32", device="reference")
        for offset in {0, fmt.alignment}:
            tensors[n_blocks, offset] = placed(data, offset, device), name
            for dtype in DTYPES:
                found = nd.dequantize(tensors[n_blocks, offset][0], name, dtype, device=device)
                assert_same_bits(host(found), rounded(expected, dtype))
                done["dequantize"] += 1
    for dtype in DTYPES:
        found = nd.dequantize_many(tensors, dtype, device=device)
        for (n_blocks, _), values in found.items():
            data = random_blocks(name, n_blocks, seed=sizes(fmt).index(n_blocks))
            assert_same_bits(host(values), nd.dequantize(data, name, dtype, device="reference"))
            done["dequantize_many"] += 1


def multiplied(name, device, done):
    fmt = nd.FORMATS[name]
    for n_rows, n_elements in SHAPES:
        weight = placed(random_blocks(name, n_rows * n_elements // fmt.block_size), fmt.alignment, device)
        for n_columns in COLUMNS:
            x = np.random.default_rng(n_columns).standard_normal((n_columns, n_elements)).astype(np.float16)
            bias = np.ones(n_rows, np.float16) if n_columns % 2 else None
            for dtype in DTYPES:
                with np.errstate(all="ignore"):
                    found = nd.matmul(x, weight, name, bias=bias, dtype=dtype, device=device)
                assert host(found).shape == (n_columns, n_rows)
                done["matmul"] += 1


def rows(name, device, done):
    import torch

    from numba_dequant import torch as nt

    fmt = nd.FORMATS[name]
    n_elements = 2 * fmt.block_size if fmt.block_size > 1 else 40
    data = torch.from_numpy(random_blocks(name, 9 * n_elements // fmt.block_size).copy()).view(9, -1).to(device)
    for indices in ([], [8], [0, 8, 8, 3]):
        for dtype in map(torch.__dict__.get, DTYPES):
            found = nt.get_rows(data, torch.tensor(indices, dtype=torch.int64, device=device), name, dtype)
            assert found.shape == (len(indices), n_elements)
            done["get_rows"] += 1


def loaded(names, device, done):
    tensors = {}
    for name in names:
        fmt = nd.FORMATS[name]
        for n_rows in (1, 7):
            n_elements = 3 * fmt.block_size if fmt.block_size > 1 else 33
            data = random_blocks(name, n_rows * n_elements // fmt.block_size, seed=n_rows)
            tensors[f"{name}.{n_rows}"] = name, (n_rows, n_elements), data
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "model.gguf", tensors)
        for dtype in DTYPES:
            for name, values in nd.load(path, dtype=dtype, device=device).items():
                kind, shape, data = tensors[name]
                assert_same_bits(host(values), nd.dequantize(data, kind, dtype, shape=shape, device="reference"))
                done["load"] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("NUMBER", "COUNT"))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    number, count = arguments.part
    names, done = DECODED[number::count], Counter()
    for name in names:
        dequantized(name, arguments.device, done)
        if has_products(nd.FORMATS[name]):
            multiplied(name, arguments.device, done)
        rows(name, arguments.device, done)
    loaded(names, arguments.device, done)
    print(f"{len(names)} formats: {dict(done)}")


if __name__ == "__main__":
    main()
