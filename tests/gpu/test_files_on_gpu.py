"""Models and files on a GPU have the same values as the reference."""

import numpy as np
import pytest
from blocks import DATA, assert_same_bits, random_blocks, write_model

import numba_dequant as nd
from numba_dequant.cli.verify import SAMPLE

pytestmark = pytest.mark.gpu


def test_models():
    from importlib.resources import as_file

    with as_file(SAMPLE) as path:
        everything = nd.load(path, device="cuda")
        reference = nd.load(path, device="reference")
    assert list(everything) == list(reference)
    for name, tensor in everything.items():
        assert_same_bits_or_equal(tensor.copy_to_host(), reference[name])


@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize("file", ["big_endian.gguf", "shapes.gguf", "split-00001-of-00003.gguf", "all_types.gguf"])
def test_files(file, threads):
    path = DATA / "gguf" / "good" / file
    reference = nd.load(path, device="reference")
    for name, tensor in nd.load(path, device="cuda", threads=threads).items():
        assert_same_bits_or_equal(tensor.copy_to_host(), reference[name])


def assert_same_bits_or_equal(found, expected):
    if found.dtype.kind in "iu":
        np.testing.assert_array_equal(found, expected)
    else:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("threads", [None, 1, 4, 16])
class TestLoading:
    @pytest.fixture
    def model(self, tmp_path):
        tensors = {
            "large": ("Q6_K", (100, 256_000), random_blocks("Q6_K", 100_000)),
            "norm": ("F32", (1000,), np.arange(1000, dtype="<f4").tobytes()),
            "ids": ("I32", (3000,), np.arange(3000, dtype="<i4").tobytes()),
            "small": ("Q4_0", (100, 64), random_blocks("Q4_0", 200)),
        }
        with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
            yield model

    def test_a_large_tensor_goes_through_the_small_buffers(self, model, threads):
        for _ in range(3):
            found = model.load("large", device="cuda", threads=threads)
            assert_same_bits(found.copy_to_host(), model.load("large", device="reference"))

    def test_one_after_the_other(self, model, threads):
        torch = pytest.importorskip("torch")
        for stream in (None, torch.cuda.Stream()):
            for name, tensor in model.stream(device="cuda", dtype="bfloat16", threads=threads, stream=stream):
                assert_same_bits_or_equal(tensor.copy_to_host(), model.load(name, "bfloat16", device="reference"))

    def test_rows_and_out_and_kept(self, model, threads):
        rows = model.load("large", device="cuda", threads=threads, rows=slice(31, 77))
        assert_same_bits(rows.copy_to_host(), model.load("large", device="reference")[31:77])
        out = {"small": model.load("small", device="cuda")}
        assert model.load_all("small", device="cuda", out=out, threads=threads)["small"] is out["small"]
        for name, kept in model.load_all(device="cuda", keep_quantized=True, threads=threads).items():
            np.testing.assert_array_equal(kept.data.copy_to_host(), model.read(name))
            values = kept.dequantize(device="cuda")
            assert_same_bits_or_equal(values.copy_to_host(), model.load(name, device="reference"))
