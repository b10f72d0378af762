"""On a GPU: the same values as the reference, no copy through the host, and every library shares the memory."""

import gc

import numpy as np
import pytest
from blocks import (
    DECODED,
    DTYPES,
    GOLDEN,
    QUANTIZED,
    assert_all_values,
    assert_same_bits,
    golden,
    random_blocks,
    rounded,
)

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated, why_no_cuda
from numba_dequant.kernels.launch_shape import MAPPINGS, launch_shape

pytestmark = pytest.mark.gpu

if why_no_cuda() is None and not is_simulated():
    from cuda.core import Device

    from numba_dequant.arguments import Job
    from numba_dequant.backends import cuda
    from numba_dequant.backends.gpu import Gpu, gpu_at
    from numba_dequant.backends.gpu_memory import DeviceBytes
    from numba_dequant.kernels.dequantize import jit


def poisoned(n_bytes):
    """Device memory that holds no value a kernel would write by chance."""
    gpu = gpu_at(0)
    with gpu.active():
        memory = gpu.allocate(n_bytes, 0)
        gpu.memset(memory, 0xA5, 0)
        return memory


def on_gpu(data):
    gpu = gpu_at(0)
    with gpu.active():
        memory = gpu.allocate(data.nbytes, 0)
        if data.nbytes:
            gpu.send(memory.pointer, data.reshape(-1).view(np.uint8), 0)
        return memory


def run(data, name, dtype="float16", mapping="tile", shift=0, out_shift=0):
    """Dequantize between guarded pieces of device memory, at any address."""
    source = nd.FORMATS[name]
    n = source.n_elements(data.size)
    itemsize = 4 if dtype == "float32" else 2
    room = on_gpu(np.concatenate([np.zeros(shift, np.uint8), data]))
    target = poisoned(n * itemsize + 64)
    gpu = gpu_at(0)
    with gpu.active():
        blocks = DeviceBytes(room.pointer + shift, data.size, gpu, room)
        out = DeviceBytes(target.pointer + out_shift, n * itemsize, gpu, target)
        cuda.dequantize_into(blocks, Job(None, source, dtype, n_elements=n), out, 0, mapping)
        whole = np.empty(n * itemsize + 64, np.uint8)
        gpu.copy_to_host(whole, target.pointer, 0)
    assert (whole[:out_shift] == 0xA5).all()
    assert (whole[out_shift + n * itemsize :] == 0xA5).all(), "written past the end"
    return whole[out_shift : out_shift + n * itemsize].view(rounded(np.empty(0, np.float32), dtype).dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, mapping, dtype):
    data, values = golden(name)
    assert_same_bits(run(data.reshape(-1), name, dtype, mapping), rounded(values.reshape(-1), dtype))


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", DECODED)
def test_sizes_around_a_tile(name, mapping):
    source = nd.FORMATS[name]
    tile = launch_shape(mapping, source).tile_elements // source.block_size
    for n_blocks in (0, 1, tile - 1, tile, tile + 1, 5 * tile + 3):
        data = random_blocks(name, n_blocks)
        assert_same_bits(run(data, name, mapping=mapping), nd.dequantize(data, name, device="reference"))


@pytest.mark.parametrize("shift", [1, 2, 8])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "MXFP4"])
def test_any_address(name, shift):
    data = random_blocks(name, 131)
    expected = nd.dequantize(data, name, device="reference")
    assert_same_bits(run(data, name, shift=shift, out_shift=2 * shift), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_from_host_memory(name, dtype):
    data = random_blocks(name, 40)
    tensor = nd.dequantize(data, name, dtype, shape=(2, 20 * nd.FORMATS[name].block_size), device="cuda")
    assert isinstance(tensor, nd.DeviceTensor)
    assert tensor.shape == (2, 20 * nd.FORMATS[name].block_size)
    assert_same_bits(tensor.copy_to_host().reshape(-1), nd.dequantize(data, name, dtype, device="reference"))


@pytest.mark.parametrize("name", ["I8", "I32", "I64", "F64"])
def test_plain_types(name):
    values = np.arange(24, dtype=nd.FORMATS[name].stored_dtype)
    np.testing.assert_array_equal(
        nd.dequantize(values, name, shape=(4, 6), device="cuda").copy_to_host().ravel(), values
    )


def test_nothing_in_nothing_out():
    tensor = nd.dequantize(b"", "Q4_K", shape=(0, 256), device="cuda")
    assert tensor.copy_to_host().shape == (0, 256)


@pytest.mark.filterwarnings("ignore:.*Grid size 9")
def test_one_thread_block_per_quant_block_the_numba_way():
    from numba import cuda

    data = random_blocks("Q4_K", 9)
    shape = launch_shape("block", nd.FORMATS["Q4_K"])
    out = cuda.to_device(np.full(9 * 256, 77, np.float16))
    jit("Q4_K")[shape.thread_blocks(out.size), shape.threads](cuda.to_device(data), out.size, out)
    assert_same_bits(out.copy_to_host(), nd.dequantize(data, "Q4_K", device="reference"))


class TestSharing:
    """No library copies: each sees the address that the tensor has."""

    data = random_blocks("Q4_0", 64)

    def tensor(self, dtype="float16"):
        return nd.dequantize(self.data, "Q4_0", dtype, shape=(8, 256), device="cuda")

    def expected(self, dtype="float16"):
        return nd.dequantize(self.data, "Q4_0", dtype, shape=(8, 256), device="reference")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_torch(self, dtype):
        torch = pytest.importorskip("torch")
        tensor = self.tensor(dtype)
        shared = torch.from_dlpack(tensor)
        assert shared.data_ptr() == tensor.ptr
        assert shared.dtype == getattr(torch, dtype)
        assert tuple(shared.shape) == (8, 256)
        expected = self.expected(dtype).astype(np.float32)
        del tensor
        gc.collect()
        churn = [self.tensor(dtype) for _ in range(20)]  # would take the memory, had it been given back
        np.testing.assert_array_equal(shared.float().cpu().numpy(), expected)
        del churn

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("way", ["from_dlpack", "asarray"])
    def test_cupy(self, dtype, way):
        cupy = pytest.importorskip("cupy")
        tensor = self.tensor(dtype)
        shared = getattr(cupy, way)(tensor)
        assert shared.data.ptr == tensor.ptr
        assert shared.dtype == dtype
        del tensor
        gc.collect()
        churn = [self.tensor(dtype) for _ in range(20)]
        np.testing.assert_array_equal(cupy.asnumpy(shared), self.expected(dtype))
        del churn

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_numba(self, dtype):
        from numba import cuda

        tensor = self.tensor(dtype)
        shared = cuda.as_cuda_array(tensor)
        assert shared.__cuda_array_interface__["data"][0] == tensor.ptr
        del tensor
        gc.collect()
        churn = [self.tensor(dtype) for _ in range(20)]
        np.testing.assert_array_equal(shared.copy_to_host(), self.expected(dtype))
        del churn

    def test_bfloat16_has_no_array_interface(self):
        tensor = self.tensor("bfloat16")
        assert not hasattr(tensor, "__cuda_array_interface__")
        with pytest.raises(AttributeError, match="DLPack"):
            _ = tensor.__cuda_array_interface__

    def test_data_of_torch_and_cupy_stays_on_the_gpu(self, monkeypatch):
        torch, cupy = pytest.importorskip("torch"), pytest.importorskip("cupy")
        arrays = [torch.from_numpy(self.data).cuda(), cupy.asarray(self.data)]
        for name in ("copy_to_device", "copy_to_host"):
            monkeypatch.setattr(Gpu, name, lambda *_: pytest.fail("copied through the host"))
        tensors = [nd.dequantize(array, "Q4_0", shape=(8, 256)) for array in arrays]
        monkeypatch.undo()
        for tensor in tensors:
            assert_same_bits(tensor.copy_to_host(), self.expected())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_out_of_torch(self, dtype):
        torch = pytest.importorskip("torch")
        out = torch.full((8, 256), 7, dtype=getattr(torch, dtype), device="cuda")
        assert nd.dequantize(self.data, "Q4_0", dtype, out=out, device="cuda") is out
        np.testing.assert_array_equal(out.float().cpu().numpy(), self.expected(dtype).astype(np.float32))

    def test_out_at_an_odd_place(self):
        torch = pytest.importorskip("torch")
        room = torch.full((8 * 256 + 2,), 7, dtype=torch.float16, device="cuda")
        nd.dequantize(self.data, "Q4_0", out=room[1:-1], device="cuda")
        assert_same_bits(room[1:-1].cpu().numpy(), self.expected().reshape(-1))
        assert room[0] == room[-1] == 7

    def test_wrong_out(self):
        torch = pytest.importorskip("torch")
        for out, message in (
            (np.empty((8, 256), np.float16), "on the host"),
            (torch.empty(8, 256, device="cuda"), "float32, the result is float16"),
            (torch.empty(8, 255, dtype=torch.float16, device="cuda"), "shape"),
            (torch.empty(256, 8, dtype=torch.float16, device="cuda").T, "contiguous"),
        ):
            with pytest.raises((nd.OutputError, nd.DataError), match=message):
                nd.dequantize(self.data, "Q4_0", out=out, device="cuda")

    def test_out_that_shares_memory_with_data(self):
        torch = pytest.importorskip("torch")
        room = torch.zeros(8 * 256, dtype=torch.float16, device="cuda")
        with pytest.raises(nd.OutputError, match="shares memory"):
            nd.dequantize(room.view(torch.uint8)[: self.data.size], "Q4_0", out=room[: 64 * 32], device="cuda")

    def test_data_on_a_gpu_for_the_cpu(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(nd.DeviceError, match="is on a GPU"):
            nd.dequantize(torch.from_numpy(self.data).cuda(), "Q4_0", device="cpu")


class TestStreams:
    data = random_blocks("Q8_0", 4096)

    def test_every_kind_of_stream(self):
        torch, cupy = pytest.importorskip("torch"), pytest.importorskip("cupy")
        from numba import cuda as numba_cuda

        expected = nd.dequantize(self.data, "Q8_0", device="reference")
        torch_stream = torch.cuda.Stream()
        with gpu_at(0).active():
            core = gpu_at(0).create_stream()
        foreign = torch_stream, torch_stream.cuda_stream, cupy.cuda.Stream(), numba_cuda.stream(), core
        for stream in (None, 0, 1, *foreign):
            tensor = nd.dequantize(self.data, "Q8_0", device="cuda", stream=stream)
            assert_same_bits(tensor.copy_to_host(), expected)

    def test_a_consumer_waits_for_the_producer(self, monkeypatch):
        torch = pytest.importorskip("torch")
        expected = nd.dequantize(self.data, "Q8_0", device="reference")
        busy = torch.cuda.Stream()
        other = torch.cuda.Stream()
        room = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(busy):
            for _ in range(200):
                room.add_(1)
        monkeypatch.setattr(Gpu, "synchronize", lambda *_: pytest.fail("waited for the stream"))
        tensor = nd.dequantize(self.data, "Q8_0", device="cuda", stream=busy)
        monkeypatch.undo()
        with torch.cuda.stream(other):
            found = torch.from_dlpack(tensor).clone()
        other.synchronize()
        assert_same_bits(found.cpu().numpy(), expected)

    def test_no_stream(self):
        for wrong in ("s", -1, 1.5, True, object()):
            with pytest.raises(nd.DeviceError, match="expected a stream"):
                nd.dequantize(self.data, "Q8_0", device="cuda", stream=wrong)


def test_pinned_memory_may_be_changed_at_once():
    with gpu_at(0).active():
        buffer = gpu_at(0).pinned(34 * 100_000)
    buffer[:] = random_blocks("Q8_0", 100_000)
    expected = nd.dequantize(buffer.copy(), "Q8_0", device="reference")
    tensor = nd.dequantize(buffer, "Q8_0", device="cuda")
    buffer[:] = 0
    assert_same_bits(tensor.copy_to_host(), expected)


def test_copies_and_pickles():
    import copy
    import pickle

    tensor = nd.dequantize(random_blocks("Q8_0", 10), "Q8_0", device="cuda")
    expected = tensor.copy_to_host()
    shallow, deep = copy.copy(tensor), copy.deepcopy(tensor)
    assert shallow.ptr == tensor.ptr != deep.ptr
    kept = copy.deepcopy(nd.QuantizedTensor(tensor, nd.FORMATS["F16"], tensor.shape))
    del tensor
    for each in (shallow, deep, kept.data):
        assert_same_bits(each.copy_to_host(), expected)
    assert kept.format is nd.FORMATS["F16"]
    with pytest.raises(nd.DeviceError, match="cannot be pickled"):
        pickle.dumps(deep)


def test_what_the_driver_refuses_is_a_device_error(monkeypatch):
    from cuda.core import LaunchConfig

    from numba_dequant.backends import gpu

    monkeypatch.setattr(gpu, "_launch_config", lambda *_: LaunchConfig(grid=1, block=4096))
    with pytest.raises(nd.DeviceError, match="the CUDA driver returned CUDA_ERROR"):
        nd.dequantize(bytes(34), "Q8_0", device="cuda")


def test_no_such_device():
    with pytest.raises(nd.DeviceError, match="no device cuda:99"):
        nd.dequantize(bytes(34), "Q8_0", device="cuda:99")


def test_the_caller_s_context_is_put_back():
    from cuda.bindings import driver

    Device(0).set_current()
    before = driver.cuCtxGetCurrent()[1]
    nd.dequantize(bytes(34), "Q8_0", device="cuda")
    assert int(driver.cuCtxGetCurrent()[1]) == int(before)


def test_out_of_memory():
    message = r"out of memory: .* bytes are needed"
    with pytest.raises(nd.DeviceError, match=message), gpu_at(0).active():
        gpu_at(0).allocate(1 << 45, 0)
    assert nd.dequantize(bytes(34), "Q8_0", device="cuda").size == 32


def test_memory_comes_back():
    from cuda.bindings import driver

    def reserved():
        """Bytes of this process's pool. Free memory of the GPU would depend on other processes too."""
        gc.collect()
        with gpu_at(0).active() as device:
            device.sync()
            code, pool = driver.cuDeviceGetMemPool(0)
            assert not code
            code, n_bytes = driver.cuMemPoolGetAttribute(
                pool, driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT
            )
            assert not code
            return int(n_bytes)

    data = random_blocks("Q8_0", 1 << 18)
    nd.dequantize(data, "Q8_0", device="cuda")
    before = reserved()
    assert before
    for _ in range(300):
        nd.dequantize(data, "Q8_0", device="cuda")
    assert reserved() - before < 64 << 20


def test_more_than_two_to_the_31_elements():
    torch = pytest.importorskip("torch")
    tile = random_blocks("Q4_K", 1009, seed=3)
    expected = nd.dequantize(tile, "Q4_K", device="reference")
    n_tiles = 2**31 // expected.size + 2
    data = torch.from_numpy(tile).cuda().repeat(n_tiles)
    found = torch.from_dlpack(nd.dequantize(data, "Q4_K"))
    assert found.numel() > 2**31
    bits = found.view(torch.int16).view(n_tiles, expected.size)
    one = torch.from_numpy(expected.view(np.int16)).cuda()
    ordinary = torch.from_numpy(~np.isnan(expected)).cuda()
    for first in range(0, n_tiles, 512):
        assert ((bits[first : first + 512] == one) | ~ordinary).all()
    assert found[-1].item() == expected[-1] or np.isnan(expected[-1])


@pytest.mark.parametrize("mapping", ["tile", "block"])
@pytest.mark.parametrize("block_size", [8, 24, 40, 48, 72, 112, 144, 264, 496])
def test_any_number_of_runs(block_size, mapping):
    for dtype in DTYPES:
        assert_all_values(block_size, "cuda", mapping, dtype)
