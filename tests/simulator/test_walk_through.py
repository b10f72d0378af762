"""The kernels of docs/add-a-kernel.md are right."""

import re
from pathlib import Path

import pytest

from numba_dequant.backends.devices import is_simulated

PAGE = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


def python_of(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_kernel_of_the_page_is_right():
    names = {}
    for code in python_of(PAGE):
        exec(code, names)
    assert names["out"].copy_to_host().tolist() == names["expected"].tolist()
    assert names["expected"].min() > 0
