"""Kernels of the documentation are right: that of docs/add-a-kernel.md, and the launch in the README."""

import re
from pathlib import Path

import numpy as np
import pytest
from finite_blocks import finite_blocks
from numba import cuda

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-a-kernel.md"

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


def python_of(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_kernel_of_the_page_is_right():
    names = {}
    for code in python_of(PAGE):
        exec(code, names)
    assert names["out"].copy_to_host().tolist() == names["expected"].tolist()
    assert names["expected"].min() > 0


@pytest.mark.parametrize("code", [code for code in python_of(ROOT / "README.md") if "jit(" in code])
def test_the_launch_of_the_readme(code):
    blocks = finite_blocks("Q4_K", 2, 256)
    out = cuda.to_device(np.zeros(512, np.float16))
    exec(code, {"nd": nd, "data": cuda.to_device(blocks.reshape(-1)), "n": 512, "out": out})
    np.testing.assert_array_equal(out.copy_to_host(), nd.dequantize(blocks, "Q4_K", device="reference"))
