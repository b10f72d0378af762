"""Measure the errors of products with compressed weights against float64.

python benchmarks/accuracy_products.py                       # writes results/products-accuracy.json; needs a GPU
python benchmarks/accuracy_products.py --device cpu --small  # prints the same figures for small products

The exact product is that of the float32 values of the blocks, in float64. Two kinds of weights are measured:

- like those of a model: normal random numbers, quantized by gguf-py. It cannot quantize to all formats; for the others,
  the blocks are random, with scales such that the values are of the size of weights.
- random bytes: the scales are huge, tiny, infinite or NaN. A result counts if its exact value is a normal number of the
  type of the results. The share of these results that is finite is measured. So is the largest error, divided by the
  sum of the absolute values of all terms.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from product_timing import SHAPES_OF_FLOATS, blocks_like_weights, error
from tables import described

import numba_dequant as nd
from numba_dequant import torch as nt

RESULTS = Path(__file__).parent / "results" / "products-accuracy.json"
N_COLUMNS = 8
SMALL = [(32, 512), (32, 512)]


def quantized(name, n_rows, n_elements):
    """Normal random numbers, quantized, and "gguf-py"; or random blocks of the same shape, and "random"."""
    values = np.random.default_rng(0).standard_normal((n_rows, n_elements), np.float32) * np.float32(0.02)
    try:
        with np.errstate(all="ignore"):
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    except (NotImplementedError, KeyError):
        return blocks_like_weights(name, n_rows, n_elements, device="cpu"), "random"
    return torch.from_numpy(blocks.view(np.uint8).reshape(n_rows, -1)), "gguf-py"


def random_bytes(name, n_rows, n_elements):
    n_bytes = n_elements // nd.FORMATS[name].block_size * nd.FORMATS[name].type_size
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (n_rows, n_bytes), np.uint8))


def fused(blocks, name, x, dtype):
    """The product by this package, with results of `dtype`. On the CPU, the columns are converted to it, too."""
    if not x.is_cuda:
        return nt.linear(x.to(dtype), blocks, name)
    from product_timing import Product

    from numba_dequant.backends.gpu import gpu_at

    with gpu_at(0).active():
        work = Product(gpu_at(0), nd.FORMATS[name], [blocks], x, torch.cuda.current_stream().cuda_stream, dtype=dtype)
        work()
        torch.cuda.synchronize()
    return work.out


def ways(blocks, name, x):
    """The results of each way."""
    values = nt.dequantize(blocks, name, torch.float16)
    return {
        "ours, FP32 results": fused(blocks, name, x, torch.float32),
        "ours, FP16 results": fused(blocks, name, x, torch.float16),
        "FP16 weights": torch.nn.functional.linear(x, values),
    }


def like_a_model(name, shape, x):
    blocks, source = quantized(name, *shape)
    blocks = blocks.to(x.device)
    exact = x.double() @ nt.dequantize(blocks, name, torch.float32).double().T
    return {"weights": source, **{way: error(found, exact) for way, found in ways(blocks, name, x).items()}}


def of_random_bytes(name, shape, x):
    blocks = random_bytes(name, *shape).to(x.device)
    values = nt.dequantize(blocks, name, torch.float32).double()
    exact, sizes = x.double() @ values.T, x.double().abs() @ values.abs().T
    found = {}
    for way, result in ways(blocks, name, x).items():
        limits, is_finite = torch.finfo(result.dtype), result.isfinite()
        counts = exact.isfinite() & (exact.abs() <= limits.max) & (exact.abs() >= limits.tiny)
        share = (result.double() - exact).abs() / sizes
        both = counts & is_finite
        found[way] = {
            "results": int(counts.sum()),
            "finite": float(is_finite[counts].double().mean()) if counts.any() else None,
            "largest error": float(share[both].max()) if both.any() else None,
        }
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small products; nothing is written")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = SMALL if options.small else SHAPES_OF_FLOATS
    x = [torch.randn(N_COLUMNS, shape[1], dtype=torch.float16, device=options.device) for shape in shapes]
    results = {
        **described("python benchmarks/accuracy_products.py", options.device),
        "shapes": shapes,
        "columns": N_COLUMNS,
        "like a model": {},
        "random bytes": {},
    }
    for name, fmt in nd.FORMATS.items():
        if fmt.block_size > 1:
            results["like a model"][name] = like_a_model(name, shapes[0], x[0])
            results["random bytes"][name] = of_random_bytes(name, shapes[1], x[1])
            print(name, results["like a model"][name], results["random bytes"][name], flush=True)
    if not options.small:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
