"""The walk-through of docs/add-a-kernel.md runs, and compares its kernel with the reference."""

import re
from pathlib import Path

import pytest

from numba_dequant.backends.devices import is_simulated

PAGE = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"

pytestmark = pytest.mark.skipif(not is_simulated(), reason="runs under NUMBA_ENABLE_CUDASIM=1")


def test_the_kernel_of_the_page_is_right():
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(code, names)
    assert names["out"].copy_to_host().tolist() == names["expected"].tolist()
    assert names["expected"].min() > 0
