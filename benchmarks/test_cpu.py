"""The CPU path and gguf-py's NumPy code on the same data: long rows of blocks that GGML quantized, to FP16."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import QUANTIZED, note

import numba_dequant as nd
from numba_dequant.backends.devices import available_cores
from numba_dequant.verify import assert_bit_identical

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden"
ROWS = 64
KNOWN_TO_GGUF_PY = {kind.name for kind in gguf.quants._type_traits}


def realistic(name, n_elements):
    source = nd.FORMATS[name]
    with np.load(GOLDEN / f"{name}.npz") as file:
        blocks = file["bytes"][file["section"] == 0]
    picked = np.random.default_rng(0).integers(0, len(blocks), n_elements // source.block_size)
    return blocks[picked].reshape(ROWS, -1)


@pytest.mark.parametrize("name", QUANTIZED)
def test_cpu(benchmark, name):
    n_elements = 1 << 24 if benchmark.enabled else 1 << 16
    data = realistic(name, n_elements)
    out = np.empty(n_elements, np.float16)
    nd.dequantize(data, name, device="cpu", out=out)
    assert_bit_identical(out, nd.dequantize(data, name, device="reference"), name)
    benchmark.pedantic(nd.dequantize, (data, name), {"device": "cpu", "out": out}, rounds=9, warmup_rounds=1)
    note(benchmark, data.nbytes + out.nbytes, elements=n_elements, threads=available_cores())


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name in KNOWN_TO_GGUF_PY])
def test_gguf_py(benchmark, name):
    n_elements = 1 << 24 if benchmark.enabled else 1 << 16
    data = realistic(name, n_elements)
    kind = gguf.GGMLQuantizationType[name]
    found = benchmark.pedantic(lambda: gguf.dequantize(data, kind).astype(np.float16), rounds=3)
    assert_bit_identical(found.reshape(-1), nd.dequantize(data, name, device="reference"), name)
    note(benchmark, data.nbytes + found.nbytes, elements=n_elements, threads=1)
