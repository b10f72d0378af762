"""The command on a GPU."""

import json

import numpy as np
import pytest
import safetensors_bytes
from blocks import DTYPES, assert_same_bits
from measured import assert_measured

import numba_dequant as nd
from numba_dequant.cli import convert, main
from numba_dequant.cli.verify import SAMPLE

pytestmark = pytest.mark.gpu


def test_bench(capsys):
    assert main.main(["bench", "--device", "cuda", "--formats", "Q8_0,IQ2_XXS", "--dtype", "bfloat16"]) == 0
    assert_measured(capsys.readouterr().out, "bfloat16", ["Q8_0", "IQ2_XXS"])


@pytest.mark.parametrize("slice_bytes", [4096, convert.SLICE_BYTES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_convert(tmp_path, monkeypatch, dtype, slice_bytes):
    monkeypatch.setattr(convert, "SLICE_BYTES", slice_bytes)
    out = tmp_path / "m.safetensors"
    assert main.main(["convert", str(SAMPLE), str(out), "--dtype", dtype, "--device", "cuda"]) == 0
    _, arrays = safetensors_bytes.read(out)
    for name, expected in nd.load(str(SAMPLE), dtype=dtype, device="reference").items():
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(arrays[name], expected)
        else:
            assert_same_bits(arrays[name], np.asarray(expected))


def test_diff(capsys):
    assert main.main(["diff", str(SAMPLE), str(SAMPLE), "--device", "cuda"]) == 0


def test_doctor(capsys):
    status = main.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0, found["checks"]
    assert {check["status"] for check in found["checks"]} == {"ok"}
    assert found["driver"]["driver"]
    assert "GPU cuda:0" in {check["name"] for check in found["checks"]}
