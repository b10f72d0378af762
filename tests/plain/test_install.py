"""What happens where something is not installed, or Numba is told not to compile."""

import os
import subprocess
import sys

import numpy as np
import pytest
from blocks import QUANTIZED, assert_same_bits, random_blocks

import numba_dequant as nd
from numba_dequant.backends import cpu, devices
from numba_dequant.kernels import gpu_packages


@pytest.fixture
def no_gpu_packages(monkeypatch):
    """A machine without a driver and without the packages of an extra."""
    monkeypatch.setattr(gpu_packages, "is_there", lambda module: False)
    monkeypatch.setattr(gpu_packages, "driver_version", lambda: 0)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    devices.why_no_cuda.cache_clear()
    yield
    devices.why_no_cuda.cache_clear()


@pytest.mark.parametrize(
    ("version", "extra"), [(0, "cu13"), (11080, "cu12"), (12090, "cu12"), (13000, "cu13"), (14000, "cu13")]
)
def test_a_gpu_call_without_the_extra_says_the_one_command(no_gpu_packages, monkeypatch, version, extra):
    monkeypatch.setattr(gpu_packages, "driver_version", lambda: version)
    with pytest.raises(nd.DeviceError) as caught:
        nd.dequantize(bytes(34), "Q8_0", device="cuda")
    assert f'pip install "numba_dequant[{extra}]"' in str(caught.value)
    assert str(caught.value).count("pip install") == 1
    assert ("no NVIDIA driver" in str(caught.value)) == (version == 0)


def test_a_call_without_a_device_computes_on_the_cpu_and_says_why(no_gpu_packages):
    from numba_dequant.errors import warn_once

    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="computes on the CPU: no NVIDIA driver was found") as caught:
        assert nd.dequantize(bytes(34), "Q8_0").shape == (32,)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_there_is_no_cuda_on_macos(no_gpu_packages, monkeypatch):
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    with pytest.raises(nd.DeviceError, match="there is no CUDA on macOS"):
        nd.dequantize(bytes(34), "Q8_0", device="cuda")


WITHOUT_GPU_PACKAGES = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cuda", "numba_cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_everything_but_a_gpu_works_without_the_packages_of_a_gpu(tmp_path):
    code = """
import os, sys
import numpy as np, numba_dequant as nd
from numba_dequant.cli import main
from numba_dequant.kernels import compiler
kept = os.environ["NUMBA_DEQUANT_CACHE_DIR"]
os.environ["NUMBA_DEQUANT_CACHE_DIR"] = sys.argv[1]  # it is empty, so these are compiled
for name in ("Q8_0", "Q4_K", "IQ3_S", "BF16"):
    data = bytes(nd.FORMATS[name].type_size)
    for device in ("reference", "cpu"):
        assert nd.dequantize(data, name, device=device).size == nd.FORMATS[name].block_size
assert len(os.listdir(sys.argv[1])) == 4
os.environ["NUMBA_DEQUANT_CACHE_DIR"] = kept
assert main.main(["verify", "--device", "cpu"]) == 0
assert main.main(["show", "Q4_K"]) == 0
try:
    compiler.cubin(compiler.dequantize_kernel(nd.FORMATS["Q8_0"], "float16"), (9, 0))
except nd.DeviceError as error:
    assert "numba-cuda is not installed; run: pip install" in str(error), error
else:
    raise AssertionError
"""
    found = run(WITHOUT_GPU_PACKAGES + code, str(tmp_path))
    assert found.returncode == 0, found.stdout + found.stderr


def test_all_of_the_package_but_what_is_for_a_gpu_imports_without_its_packages():
    """A module that starts to need them is found here."""
    code = """
import pkgutil, importlib, numba_dequant
needed = []
for module in pkgutil.walk_packages(numba_dequant.__path__, "numba_dequant."):
    if module.name.endswith("__main__"):
        continue
    if module.name.startswith(("numba_dequant.torch", "numba_dequant.integrations.")):
        continue  # they need PyTorch and the programs
    try:
        importlib.import_module(module.name)
    except (ImportError, numba_dequant.DeviceError):
        needed.append(module.name.rpartition(".")[2])
print(*sorted(needed))
"""
    found = run(WITHOUT_GPU_PACKAGES + code)
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.split()) <= {
        *("cuda", "cuda_batch", "cuda_usual", "device_tensor", "foreign", "gpu", "gpu_memory", "simulator", "streams"),
        *("cuda_matmul", "cuda_product"),
        *("copy", "dequantize", "intrinsics_cuda", "intrinsics_halves", "intrinsics_mma", "numba_cuda"),
        *("product", "product_columns", "product_of_part", "product_panel", "product_wide"),
        *("gpu_buffers", "gpu_faults", "gpu_loader", "native_threads", "small_files", "measure"),
    }


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_cpu_computes_where_numba_is_told_not_to_compile(name, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setattr(cpu._compile, "_made", {})
    monkeypatch.setattr(cpu._compile, "_make", None)
    data = random_blocks(name, 2)
    found = nd.dequantize(data, name, device="cpu")
    monkeypatch.undo()
    assert_same_bits(found, nd.dequantize(data, name, device="cpu"))


def test_the_cpu_computes_where_numba_refuses_to_be_imported(tmp_path):
    code = """
import sys, warnings
import numpy as np, numba_dequant as nd

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5.")

sys.meta_path.insert(0, Refuse())
data = np.arange(340, dtype=np.uint8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [nd.dequantize(data, "Q8_0", device="cpu") for _ in range(2)]
assert len(caught) == 1 and "Numba needs NumPy 2.4 or less" in str(caught[0].message), caught
assert np.array_equal(found[1], nd.dequantize(data, "Q8_0", device="reference"), equal_nan=True)
"""
    found = run(code, NUMBA_DEQUANT_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stderr


@pytest.mark.long
@pytest.mark.parametrize("variable", ["NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO", "NUMBA_OPT"])
def test_settings_of_numba_do_not_break_what_is_kept(variable, tmp_path):
    code = """
import sys, warnings
import numpy as np, numba_dequant as nd
from numba_dequant.kernels import native
warnings.simplefilter("default")  # Numba has some of its own
warnings.simplefilter("error", RuntimeWarning)
data = np.arange(nd.FORMATS["IQ3_S"].type_size * 9, dtype=np.uint8)  # it has a table
found = nd.dequantize(data, "IQ3_S", device="cpu")
assert np.array_equal(found, nd.dequantize(data, "IQ3_S", device="reference"), equal_nan=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # code that is not optimized counts references, and is not kept
    assert "again" in sys.argv or native.load("read_and_send").value
"""
    environment = {"NUMBA_DEQUANT_CACHE_DIR": str(tmp_path), variable: "0" if variable == "NUMBA_OPT" else "1"}
    found = run(code, **environment)
    assert found.returncode == 0, found.stderr
    # Where it was not kept, it would be compiled as before.
    is_kept = any(path.name.startswith("native-") for path in tmp_path.iterdir())
    found = run(code, *([] if is_kept else ["again"]), **environment)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_numba_disable_jit_in_the_environment(is_on_disk, tmp_path):
    code = """
import numpy as np, numba_dequant as nd
from numba_dequant.kernels import native
data = np.arange(340, dtype=np.uint8)
found = nd.dequantize(data, "Q8_0", device="cpu")
assert np.array_equal(found, nd.dequantize(data, "Q8_0", device="reference"), equal_nan=True)
native.load("join_threads")
"""
    if is_on_disk:
        assert run(code, NUMBA_DEQUANT_CACHE_DIR=str(tmp_path)).returncode == 0
    found = run(code, NUMBA_DISABLE_JIT="1", NUMBA_DEQUANT_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stderr


def test_warm_says_that_numba_is_told_not_to_compile(monkeypatch, capsys):
    import numba

    from numba_dequant.cli import main

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert main.main(["warm", "--cpu", "--formats", "Q8_0"]) == 2
    assert "NUMBA_DISABLE_JIT" in capsys.readouterr().err


def test_names_that_numpy_has_taken_back_are_there_while_numba_cuda_is_imported(monkeypatch):
    pytest.importorskip("numba_cuda")
    from numba_dequant.kernels.numba_cuda import REMOVED_NAMES, _names_of_earlier_numpy

    before = {name: hasattr(np, name) for name in REMOVED_NAMES}
    for name in ("row_stack", "in1d"):
        monkeypatch.delattr(np, name, raising=False)
    with _names_of_earlier_numpy():
        assert vars(np)["row_stack"] is np.vstack
        assert vars(np)["in1d"] is np.isin
    assert not hasattr(np, "row_stack")
    monkeypatch.undo()
    assert before == {name: hasattr(np, name) for name in REMOVED_NAMES}


@pytest.mark.toolkit
def test_numba_cuda_is_imported_without_warnings_of_numpy():
    """NumPy 2.5 has one for a constant of numba-cuda; whoever turns warnings into errors could not use a GPU."""
    found = run("import numba_dequant.kernels.numba_cuda")  # with -W error
    assert found.returncode == 0, found.stderr
    assert "DeprecationWarning: ours" in run("import warnings; warnings.warn('ours', DeprecationWarning)").stderr
