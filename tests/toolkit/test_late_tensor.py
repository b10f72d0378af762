"""`DeviceTensor` on the late GPU: what it says about itself, and what it refuses."""

import copy
import pickle

import numpy as np
import pytest
from blocks import assert_same_bits
from finite_blocks import finite_blocks

import numba_dequant as nd
from numba_dequant.backends.foreign import LEGACY_STREAM

BLOCKS = finite_blocks("Q4_0", 4, 96).reshape(-1)
EXPECTED = nd.dequantize(BLOCKS, "Q4_0", shape=(4, 96), device="reference")


@pytest.fixture
def tensor(late):
    return nd.dequantize(BLOCKS, "Q4_0", shape=(4, 96), device="cuda")


def test_what_it_says(tensor):
    assert isinstance(tensor, nd.DeviceTensor)
    assert (len(tensor), tensor.size, tensor.nbytes, tensor.device) == (4, 384, 768, 0)
    assert repr(tensor) == "DeviceTensor(shape=(4, 96), dtype=float16, device='cuda:0')"
    assert tensor.__dlpack_device__() == (2, 0)
    with pytest.raises(TypeError, match=r"a tensor with shape \(\) has no length"):
        len(nd.dequantize(np.ones(1, np.float32), "F32", shape=(), device="cuda"))


@pytest.mark.parametrize("stream", [None, 7])
def test_the_array_interface(late, stream):
    tensor = nd.dequantize(BLOCKS, "Q4_0", device="cuda", stream=stream)
    interface = tensor.__cuda_array_interface__
    assert interface["data"] == (tensor.ptr, False)
    assert interface["stream"] == (stream or LEGACY_STREAM)
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((384,), "<f2", None)
    empty = nd.dequantize(b"", "Q4_0", device="cuda")
    assert (empty.ptr, empty.__cuda_array_interface__["data"]) == (0, (0, False))
    bf16 = nd.dequantize(BLOCKS, "Q4_0", "bfloat16", device="cuda")
    with pytest.raises(AttributeError, match="has no bfloat16; use DLPack"):
        _ = bf16.__cuda_array_interface__
    assert not hasattr(bf16, "__cuda_array_interface__")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy": True}, r"can be shared on cuda:0 only, without a copy; call copy_to_host\(\) to copy it"),
        ({"dl_device": (1, 0)}, "can be shared on cuda:0 only"),
        ({"dl_device": (2, 1)}, "can be shared on cuda:0 only"),
        ({"stream": -2}, "stream must be -1, a stream handle or None, got -2"),
    ],
)
def test_what_cannot_be_shared(tensor, options, message):
    with pytest.raises(BufferError, match=message):
        tensor.__dlpack__(**options)


def test_a_copy_has_memory_of_its_own(tensor):
    """`copy.copy` shares it."""
    shared, own = copy.copy(tensor), copy.deepcopy(tensor)
    assert shared.ptr == tensor.ptr != own.ptr
    nd.dequantize(bytes(BLOCKS.size), "Q4_0", device="cuda", out=tensor)
    for found, expected in ((tensor, 0 * EXPECTED), (shared, 0 * EXPECTED), (own, EXPECTED)):
        np.testing.assert_array_equal(found.copy_to_host().reshape(4, 96), expected)
    empty = copy.deepcopy(nd.dequantize(b"", "Q4_0", device="cuda"))
    assert empty.copy_to_host().shape == (0,)


def test_it_is_not_pickled(tensor):
    with pytest.raises(nd.DeviceError, match=r"cannot be pickled; pickle the result of its copy_to_host\(\)"):
        pickle.dumps(tensor)
    assert_same_bits(pickle.loads(pickle.dumps(tensor.copy_to_host())), EXPECTED)
