"""Results in bfloat16 on the CPU reach other libraries."""

import ctypes
import pickle
from copy import copy, deepcopy

import numpy as np
import pytest
from blocks import assert_same_bits
from three_tensors import BLOCKS, dequantize, open_model

import numba_dequant as nd


@pytest.fixture
def model(tmp_path):
    return open_model(tmp_path)


class TestBfloat16:
    """Results in bfloat16 are NumPy arrays, which DLPack carries to other libraries."""

    def results(self, model):
        yield dequantize(dtype="bf16").reshape(6, 32)
        yield dequantize(dtype="bf16", device="reference", shape=(6, 32))
        yield dequantize(BLOCKS[:4], "BF16", "bf16")
        yield nd.dequantize_many({1: (BLOCKS, "Q8_0", (6, 32))}, "bf16", device="cpu")[1]
        yield model.load("token_embd.weight", "bf16", device="cpu")
        yield from model.load_all(["token*", "blk*"], "bf16", device="cpu").values()
        yield from dict(model.stream(["token*", "blk*"], "bf16", device="cpu")).values()

    def test_every_result_reaches_torch(self, model):
        torch = pytest.importorskip("torch")
        for values in self.results(model):
            tensor = torch.from_dlpack(values)
            assert tensor.dtype == torch.bfloat16
            assert tensor.data_ptr() == values.ctypes.data
            np.testing.assert_array_equal(tensor.float().numpy(), values.astype(np.float32))

    def test_the_type_is_in_the_capsule(self, model):
        """Without PyTorch: the code, the bits and the lanes of the type that a capsule says."""
        get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        start = ctypes.sizeof(ctypes.c_void_p) + 12
        for values in [*self.results(model), dequantize(b"", dtype="bf16"), dequantize(dtype="bf16")[::3]]:
            assert isinstance(values, nd.Bfloat16Array)
            for options in ({}, {"stream": None}):
                capsule = values.__dlpack__(**options)
                place = get(capsule, b"dltensor") + start
                assert bytes((ctypes.c_uint8 * 4).from_address(place)) == bytes([4, 16, 1, 0])
            assert values.__dlpack_device__() == (1, 0)
            # NumPy 1 gives a capsule of the old kind, which is allowed.
            for options in ({"max_version": (1, 0)}, {"max_version": (1, 1), "copy": True, "dl_device": (1, 0)}):
                assert "dltensor" in repr(values.__dlpack__(**options))

    def test_slices_and_results_of_arithmetic_reach_torch_too(self):
        torch = pytest.importorskip("torch")
        values = dequantize(dtype="bf16", shape=(6, 32))
        for part in (values[2:], values.T, values[::2, 3:], values + values, values.copy(), values.reshape(-1)):
            tensor = torch.from_dlpack(part)
            assert tensor.dtype == torch.bfloat16
            np.testing.assert_array_equal(tensor.float().numpy(), part.astype(np.float32))

    def test_the_memory_lives_as_long_as_the_tensor(self):
        torch = pytest.importorskip("torch")
        tensor = torch.from_dlpack(dequantize(dtype="bf16"))
        churn = [dequantize(bytes(204), dtype="bf16") for _ in range(10)]
        np.testing.assert_array_equal(tensor.float().numpy(), dequantize(dtype="bf16").astype(np.float32))
        del churn

    def test_in_all_else_it_is_a_numpy_array(self):
        values = dequantize(dtype="bf16", shape=(6, 32))
        plain = values.view(np.ndarray)
        assert repr(values) == repr(plain)
        assert str(values) == str(plain)
        assert type(values[0, 0]) is type(plain[0, 0])
        for reduce in (np.max, np.sum, np.mean):
            assert type(reduce(values)) is type(reduce(plain))
        assert type(values == plain) is np.ndarray
        assert type(values + np.float32(1)) is np.ndarray
        assert type(values[0] @ plain[0]) is type(plain[0] @ plain[0])
        assert type(np.concatenate([values, values])) is np.ndarray
        np.testing.assert_array_equal(values, plain)
        out = np.empty_like(values)
        assert np.add(values, values, out=out) is out
        assert isinstance(values.tobytes(), bytes)
        assert values.__array_interface__["data"] == plain.__array_interface__["data"]

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_a_copy_is_one(self, protocol):
        values = dequantize(dtype="bf16", shape=(6, 32))
        for found in (pickle.loads(pickle.dumps(values, protocol)), copy(values), deepcopy(values)):
            assert type(found) is nd.Bfloat16Array
            assert_same_bits(found, values)

    def test_other_types_are_exported_by_numpy(self):
        values = dequantize(dtype="bf16").astype(np.float32)
        np.testing.assert_array_equal(np.from_dlpack(values), values)
