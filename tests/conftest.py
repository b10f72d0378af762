import gc
import struct
from pathlib import Path

import numpy as np
import pytest

from numba_dequant import FORMATS
from numba_dequant.backends.devices import is_simulated, why_no_cuda
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.kernels import compiler
from numba_dequant.kernels.gpu_packages import is_there

# These put something in place of a GPU under the packages that a GPU needs, or look at what they compile.
collect_ignore = (
    []
    if is_there("cuda.core") and is_there("numba_cuda")
    else ["test_gpu_faults.py", "test_gpu_loader.py", "test_gpu_loader_faults.py", "test_ptx.py"]
)

DATA = Path(__file__).parent / "data"

QUANTIZED = [name for name, source in FORMATS.items() if source.block_size > 1]
DECODED = [name for name, source in FORMATS.items() if source.decode is not None]
GOLDEN = sorted(path.stem for path in (DATA / "golden").glob("*.npz"))
DTYPES = ["float16", "bfloat16", "float32"]


def pytest_collection_modifyitems(config, items):
    problem = "the CUDA simulator is on" if is_simulated() else why_no_cuda()
    asked = config.option.markexpr
    if problem and "gpu" in asked and "not gpu" not in asked:
        # Who asks for these tests and no others must not take "all skipped" for a success.
        raise pytest.UsageError(f"-m {asked!r}, but there is no GPU that can be used: {problem}")
    no_toolkit = (
        next((item for item in items if item.get_closest_marker("toolkit")), None) and compiler.why_no_toolkit()
    )
    for item in items:
        if no_toolkit and item.get_closest_marker("toolkit"):
            item.add_marker(pytest.mark.skip(reason=no_toolkit))
        if problem and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))


def pytest_collection_finish(session):
    # Many tests collect garbage; what is imported by now is none.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests neither use nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def golden(name):
    """Bytes and GGML's float32 values, both (n_blocks, ...)."""
    with np.load(DATA / "golden" / f"{name}.npz") as file:
        return file["bytes"], file["f32"]


def rounded(values, dtype):
    with np.errstate(all="ignore"):
        return values.astype(numpy_dtype(dtype))


def assert_same_bits(found, expected):
    """Equal bit for bit; a NaN need only be a NaN."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = f"u{found.itemsize}"
    with np.errstate(all="ignore"):
        missing = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), missing)
    np.testing.assert_array_equal(found.view(bits)[~missing], expected.view(bits)[~missing])


def random_blocks(name, n_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n_blocks * FORMATS[name].type_size, np.uint8)


def write_model(path, tensors, metadata=()):
    """A GGUF file of name -> (format name, shape, bytes); gguf-py's writer does not know every format."""

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata:
        header += string(key) + struct.pack("<I", 8) + string(value)
    data = b""
    for name, (kind, shape, values) in tensors.items():
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", FORMATS[kind].ggml_id, len(data))
        data += bytes(values) + bytes(-len(bytes(values)) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


@pytest.fixture(params=[0, 1, 2, 3, "alone", "no signals"])
def late(request, monkeypatch):
    """Four orders of things, a system without what the threads need, and a driver."""
    import late_gpu

    yield from late_gpu.installed(request.param, monkeypatch)


@pytest.fixture
def with_threads(late):
    """For what only threads do: not where a system or a driver lacks what they need."""
    from small_model import has_threads

    if not has_threads():
        pytest.skip("no threads read here")


@pytest.fixture(params=[1, 3])
def threads(request):
    return request.param


@pytest.fixture
def own_format():
    """A format that is not registered. If a test registers it, that is undone."""
    from numba_dequant import formats

    known, ids = dict(formats._formats), dict(formats._with_id)
    ours = FORMATS["Q8_0"]
    yield formats.Format("OWN_by_hand", 907, 32, ours.layout, "of one's own", ours.dequantize, ours.decode)
    for kept, before in ((formats._formats, known), (formats._with_id, ids)):
        kept.clear()
        kept.update(before)
