"""The command on a GPU."""

import pytest
from measured import assert_measured

from numba_dequant.cli import main

pytestmark = pytest.mark.gpu


def test_bench(capsys):
    assert main.main(["bench", "--device", "cuda", "--formats", "Q8_0,IQ2_XXS", "--dtype", "bfloat16"]) == 0
    assert_measured(capsys.readouterr().out, "bfloat16", ["Q8_0", "IQ2_XXS"])
