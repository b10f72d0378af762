"""Weights and columns for products, and the product in float64."""

import numpy as np
from finite_blocks import finite_blocks

import numba_dequant as nd

FUSED = [name for name, fmt in nd.FORMATS.items() if fmt.decode is not None and fmt.block_size >= 32]
"""The formats of which there are products on the tensor cores."""

WITH_FACTORS = [name for name in FUSED if nd.FORMATS[name].factors is not None]
"""Of the others, products round the values to float16. The values of TQ1_0 are float16 numbers already."""


def weights(name, n_rows, n_elements):
    """Blocks, uint8 of shape (rows, bytes per row), and their values in float64."""
    blocks = finite_blocks(name, n_rows, n_elements).copy()
    if name == "MXFP4":  # any other scale byte gives numbers that float16 does not have
        scales = blocks.reshape(-1, nd.FORMATS[name].type_size)[:, 0]
        scales[:] = 118 + scales % 8
    values = nd.dequantize(blocks, name, "float32", shape=(n_rows, n_elements), device="reference")
    return blocks, values.astype(np.float64)


def columns(n_columns, n_elements, seed=0):
    """float16 of shape (columns, elements)."""
    return np.random.default_rng(seed).standard_normal((n_columns, n_elements)).astype(np.float16)


def error(found, expected):
    """Root mean square of the differences, divided by that of the expected values."""
    difference = np.asarray(found, np.float64) - expected
    return float(np.sqrt((difference**2).sum() / (expected**2).sum()))


ROUNDED = {"Q6_K", "IQ4_XS"} | set(FUSED) - set(WITH_FACTORS) - {"TQ1_0"}
"""The formats whose quants, times the scale of their sub-block, or whose values need more bits than a float16 has."""


def bound(name):
    """The largest error of a product with float32 results."""
    return 4e-4 if name in ROUNDED else 2e-6
