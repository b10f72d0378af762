import importlib
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks

import numba_dequant as nd

BLOCKS = random_blocks("Q8_0", 6)
EXPECTED = nd.dequantize(BLOCKS, "Q8_0", device="reference")


@pytest.mark.parametrize(
    "data",
    [BLOCKS.tobytes(), bytearray(BLOCKS), memoryview(BLOCKS), BLOCKS, BLOCKS.reshape(6, 34), BLOCKS.view("<u2")],
    ids=["bytes", "bytearray", "memoryview", "array", "2-D", "uint16"],
)
def test_every_kind_of_host_memory(data):
    for device in ("reference", "cpu"):
        assert_same_bits(nd.dequantize(data, "Q8_0", device=device), EXPECTED)


def test_an_odd_address_is_read_all_the_same():
    room = np.empty(BLOCKS.size + 1, np.uint8)
    room[1:] = BLOCKS
    assert_same_bits(nd.dequantize(room[1:], "Q8_0", device="cpu"), EXPECTED)


def test_nothing_in_nothing_out():
    assert nd.dequantize(b"", "Q4_K", device="cpu").shape == (0,)
    assert nd.dequantize(b"", "Q4_K", shape=(0, 256), device="reference").shape == (0, 256)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)], ids=["name", "type", "dtype"]
)
def test_dtype_by_name_or_as_a_dtype(dtype):
    assert nd.dequantize(BLOCKS, "Q8_0", dtype, device="cpu").dtype == ml_dtypes.bfloat16


def test_dtype_of_torch():
    class TorchDtype:
        def __str__(self):
            return "torch.bfloat16"

    assert nd.dequantize(BLOCKS, "Q8_0", TorchDtype(), device="cpu").dtype == ml_dtypes.bfloat16


def test_shape_and_out():
    assert nd.dequantize(BLOCKS, "Q8_0", shape=(2, 3, 32), device="cpu").shape == (2, 3, 32)
    out = np.full((3, 64), 7, np.float16)
    assert nd.dequantize(BLOCKS, "Q8_0", device="cpu", out=out) is out
    assert_same_bits(out.reshape(-1), EXPECTED)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_length_not_whole_blocks(device):
    with pytest.raises(nd.DataError, match="blocks of 34 bytes, but 203 bytes were given: the last 33 are"):
        nd.dequantize(BLOCKS[:-1], "Q8_0", device=device)


@pytest.mark.parametrize("data", ["text", 5, None, [1, 2], np.array([object()])])
def test_not_bytes(data):
    with pytest.raises(nd.DataError):
        nd.dequantize(data, "Q8_0", device="cpu")


def test_out_of_another_shape_than_asked():
    with pytest.raises(nd.OutputError, match="shape"):
        nd.dequantize(BLOCKS, "Q8_0", shape=(6, 32), device="cpu", out=np.empty(192, np.float16))


def test_out_that_shares_memory_with_data():
    room = np.zeros(1000, np.uint8)
    room[:204] = BLOCKS
    with pytest.raises(nd.OutputError, match="shares memory"):
        nd.dequantize(room[:204], "Q8_0", device="cpu", out=room[100:484].view(np.float16))


def test_stream_is_for_cuda():
    with pytest.raises(nd.DeviceError, match="stream"):
        nd.dequantize(BLOCKS, "Q8_0", device="cpu", stream=0)


def test_unknown_mapping():
    with pytest.raises(nd.OptionError, match="'tile', 'block'"):
        nd.dequantize(BLOCKS, "Q8_0", device="cpu", mapping="warp")


def test_errors_have_one_base():
    for name in nd.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(nd, name), nd.NumbaDequantError)


def run(code, **variables):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_import_is_quick_and_leaves_numba_alone(tmp_path):
    """What it takes beyond NumPy, in processor time: beside NumPy, so that a slow or busy machine does not matter."""
    code = """
import sys, time
start = time.process_time()
import numpy
middle = time.process_time()
import numba_dequant
end = time.process_time()
heavy = {"numba", "llvmlite", "cuda", "cupy", "gguf", "torch"} & set(sys.modules)
assert not heavy, heavy
print(middle - start, end - middle)
"""
    readings = []
    for _ in range(4):
        # The environment may forbid to keep bytecode; the time of compiling all modules would then be measured.
        found = run(code, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
        assert found.returncode == 0, found.stderr
        assert not found.stderr
        readings.append([float(seconds) for seconds in found.stdout.split()])
    of_numpy, of_ours = map(min, zip(*readings[1:], strict=True))
    assert of_ours < 2 * of_numpy, readings


def test_no_device_given_and_no_gpu_says_so_once():
    code = """
import warnings
import numba_dequant as nd
from numba_dequant.backends import devices
devices.why_no_cuda = lambda: "no GPU, says the test"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        nd.dequantize(bytes(34), "Q8_0")
assert len(caught) == 1, caught
assert "computes on the CPU: no GPU, says the test" in str(caught[0].message)
assert caught[0].filename == "<string>", caught[0].filename
try:
    nd.dequantize(bytes(34), "Q8_0", device="cuda")
except nd.DeviceError as error:
    assert "no GPU, says the test" in str(error)
else:
    raise SystemExit("cuda was taken")
"""
    found = run(code)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", [name for name in nd.__all__ if name.endswith("Error")])
def test_errors_go_by_their_public_names(name):
    kind = getattr(nd, name)
    assert (kind.__module__, kind.__qualname__) == ("numba_dequant", name)


def test_what_is_pickled_goes_by_its_public_name():
    with pytest.raises(nd.GgufError) as caught:
        nd.open(b"GGUF" + bytes(20))
    kept = nd.QuantizedTensor(np.zeros(34, np.uint8), nd.FORMATS["Q8_0"], (32,))
    for thing in (caught.value, kept, nd.Progress(1, 2, 3.0)):
        written = pickle.dumps(thing)
        assert f"cnumba_dequant\n{type(thing).__name__}\n".encode() in pickle.dumps(thing, protocol=0)
        assert type(pickle.loads(written)) is type(thing)


def test_without_pytorch_its_module_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("numba_dequant.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch; install it with: pip install numba_dequant\[torch\]"):
        importlib.import_module("numba_dequant.torch")
