"""`Format.factors`, which products use, against `dequantize`."""

import copy
import gc
import pickle

import numpy as np
import pytest
from blocks import SCALES_OF_ONE_BYTE, every_scale, random_blocks
from products import FUSED, ROUNDED, WITH_FACTORS

import numba_dequant as nd


def padded(block, fmt):
    """A block as the kernels see it: aligned, with readable bytes after its end."""
    raw = np.zeros((fmt.type_size // 8 + 3) * 8, np.uint8)
    raw[: fmt.type_size] = block
    return raw.view(f"u{fmt.alignment}")


def values_of_factors(block, fmt):
    """``scale * quants + offset * minimum`` in float64: the terms of products, and their sum."""
    factors, raw = fmt.factors, padded(block, fmt)
    terms = np.zeros((2, fmt.block_size))
    seen = np.zeros(fmt.block_size, int)
    with np.errstate(all="ignore"):
        for run in range(fmt.block_size // 8):
            elements = np.array(factors.order.elements[run & 3]) + 32 * (run >> 2)
            quants = factors.quants(raw, 0, run)
            assert quants.dtype == np.float16
            assert np.isfinite(quants).all()
            terms[0, elements] = quants.astype(np.float64) * np.float64(factors.scale(raw, 0))
            seen[elements] += 1
        if factors.minimum is not None:
            offset = 1.0 if factors.offset is None else np.float64(factors.offset(raw, 0))
            for number in range(fmt.block_size // factors.minimum_size):
                span = slice(number * factors.minimum_size, (number + 1) * factors.minimum_size)
                terms[1, span] = np.float64(factors.minimum(raw, 0, number)) * offset
    np.testing.assert_array_equal(seen, 1)
    return terms


@pytest.mark.parametrize("name", WITH_FACTORS)
def test_the_factors_give_the_values(name):
    fmt = nd.FORMATS[name]
    data = random_blocks(name, 60, seed=3)
    if name in SCALES_OF_ONE_BYTE:
        data = np.concatenate([data, every_scale(name)])
    for block in data.reshape(-1, fmt.type_size):
        expected = nd.dequantize(block, name, "float32", device="reference").astype(np.float64)
        terms = values_of_factors(block, fmt)
        with np.errstate(all="ignore"):
            found = terms.sum(axis=0)
            # GGML rounds the terms and their sum to float32.
            slack = 2.0**-22 * abs(terms).max(axis=0) + (2.0**-11 * abs(terms[0]) if name in ROUNDED else 0)
        is_finite = np.isfinite(expected)
        assert np.isfinite(found[is_finite]).all()
        assert (abs(found - expected)[is_finite] <= slack[is_finite]).all()
        # An infinite or NaN scale leaves no finite number.
        assert not (np.isfinite(found) & ~np.isfinite(expected) & (abs(found) < 3e38)).any()


@pytest.mark.parametrize("name", [name for name in WITH_FACTORS if name not in ROUNDED])
def test_the_quants_are_exact(name):
    fmt = nd.FORMATS[name]
    for block in random_blocks(name, 40, seed=4).reshape(40, -1):
        raw = padded(block, fmt)
        for run in range(fmt.block_size // 8):
            quants = fmt.factors.quants(raw, 0, run).astype(np.float64)
            # 11 bits from the lowest to the highest that is used.
            unit = 2.0**-20 if name == "NVFP4" else 1
            assert (quants / unit == np.round(quants / unit)).all()
            assert (abs(quants) <= 2048 * (unit if name == "NVFP4" else 1) * (2**14 if name == "NVFP4" else 1)).all()


@pytest.mark.parametrize("name", WITH_FACTORS)
def test_minima_are_exact_in_tf32(name):
    factors = nd.FORMATS[name].factors
    if factors.minimum is None:
        return
    for block in random_blocks(name, 40, seed=5).reshape(40, -1):
        raw = padded(block, nd.FORMATS[name])
        for number in range(nd.FORMATS[name].block_size // factors.minimum_size):
            bits = np.float32(factors.minimum(raw, 0, number)).view(np.uint32)
            assert bits & 0x1FFF == 0


def test_formats_with_blocks_have_factors():
    assert set(FUSED) - set(WITH_FACTORS) == {"TQ1_0"}


def test_copies_keep_the_factors():
    fmt = nd.FORMATS["Q4_K"]
    assert pickle.loads(pickle.dumps(fmt)).factors is fmt.factors
    assert copy.deepcopy(fmt).factors is fmt.factors


def test_a_format_of_ones_own_is_pickled_with_its_factors():
    fmt = nd.FORMATS["Q8_0"]
    own = nd.Format("OWN", 9002, 32, fmt.layout, "mine", fmt.dequantize, fmt.decode, fmt.factors)
    text = pickle.dumps(own)
    assert pickle.loads(text) is own
    del own
    gc.collect()
    assert pickle.loads(text).factors.quants is fmt.factors.quants


def test_what_is_no_factors_is_refused():
    fmt = nd.FORMATS["Q8_0"]
    with pytest.raises(nd.OptionError, match="OWN: factors must be a Factors of a format with `decode`, got 3"):
        nd.Format("OWN", 9002, 32, fmt.layout, "mine", fmt.dequantize, fmt.decode, 3)
