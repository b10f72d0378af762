"""`dequantize_many` on a GPU: one launch per format."""

import gc

import numpy as np
import pytest
from blocks import DTYPES, assert_same_bits, random_blocks
from many_tensors import assert_all_same, expected, mixture

import numba_dequant as nd


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_format(self, dtype):
        tensors = mixture(nd.FORMATS, (0, 1, 3, 40, 500, 17))
        assert_all_same(nd.dequantize_many(tensors, dtype, device="cuda"), tensors, dtype)

    @pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 65_536, 70_001])
    def test_every_number_of_tensors(self, count):
        """The kernel looks for its tensor in steps of 256."""
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(count)
        lengths = rng.integers(1, 300 if count < 1000 else 3, count)
        data = random_blocks("Q4_0", int(lengths.sum()))
        ends = lengths.cumsum()
        on_gpu = nd.dequantize(data.view(np.int8), "I8", device="cuda")
        whole = torch.from_dlpack(on_gpu).view(torch.uint8)
        pieces = {i: whole[18 * (ends[i] - lengths[i]) : 18 * ends[i]] for i in range(count)}
        found = nd.dequantize_many({i: (piece, "Q4_0") for i, piece in pieces.items()})
        joined = torch.cat([torch.from_dlpack(found[i]) for i in range(count)]).cpu().numpy()
        assert_same_bits(joined, nd.dequantize(data, "Q4_0", device="reference"))

    def test_large_tensors_begin_early(self, monkeypatch):
        """Also if a later one is wrong: then there is no result, and the next call is right."""
        monkeypatch.setattr("numba_dequant.backends.cuda_batch.LARGE", 256 * 40)
        tensors = mixture(["Q4_K", "Q8_0", "F32", "I8"], (0, 1, 40, 500))
        on_gpu = {
            name: (nd.dequantize(np.ascontiguousarray(blocks).view(np.int8), "I8", device="cuda"), *rest)
            for name, (blocks, *rest) in tensors.items()
        }
        assert_all_same(nd.dequantize_many(on_gpu), tensors)
        with pytest.raises(nd.ShapeError, match="tensor 'wrong'"):
            nd.dequantize_many({**on_gpu, "wrong": (next(iter(on_gpu.values()))[0], "I8", (3, 5, 7))})
        assert_all_same(nd.dequantize_many(on_gpu), tensors)

    def test_nothing(self):
        assert nd.dequantize_many({}, device="cuda") == {}

    def batch_on(self, stream, tensors):
        """Prepared tensors, whose blocks lie in PyTorch's memory."""
        torch = pytest.importorskip("torch")
        data = {name: torch.zeros(len(entry[0]), dtype=torch.uint8, device="cuda") for name, entry in tensors.items()}
        torch.cuda.synchronize()
        entries = {name: (data[name], *entry[1:]) for name, entry in tensors.items()}
        return data, nd.prepare_many(entries, stream=stream)

    def test_a_batch_reads_and_writes_anew(self):
        torch = pytest.importorskip("torch")
        stream = torch.cuda.Stream()
        tensors = mixture(["Q4_K", "Q8_0", "F32", "I8"], (0, 1, 3, 40))
        data, batch = self.batch_on(stream, tensors)
        gc.collect()
        churn = [nd.dequantize_many(tensors, device="cuda") for _ in range(5)]  # would take what was given back
        with torch.cuda.stream(stream):
            for name, entry in tensors.items():
                data[name].copy_(torch.from_numpy(entry[0]))
        assert batch.run() is batch.results
        assert_all_same(batch.results, tensors)
        del churn

    def test_a_batch_in_a_cuda_graph(self):
        torch = pytest.importorskip("torch")
        stream = torch.cuda.Stream()
        tensors = mixture(["Q4_K", "Q8_0", "F32"], (1, 40))
        data, batch = self.batch_on(stream, tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            batch.run()
        for seed in (5, 6):
            with torch.cuda.stream(stream):
                for name, (host, source, _) in tensors.items():
                    host[:] = random_blocks(source, name[1], seed=seed)
                    data[name].copy_(torch.from_numpy(host))
                graph.replay()
            assert_all_same(batch.results, tensors)

    def test_nothing_is_written_outside(self):
        torch = pytest.importorskip("torch")
        tensors = mixture(["Q4_K", "Q5_0", "MXFP4", "F32"], (1, 5, 33))
        room = torch.full((200_000,), 7, dtype=torch.float16, device="cuda")
        used = torch.zeros(200_000, dtype=torch.bool)
        out, start = {}, 0
        for number, (name, entry) in enumerate(tensors.items()):
            start += 8 + number % 3  # some at odd addresses
            size = int(np.prod(entry[2]))
            out[name] = room[start : start + size].view(entry[2])
            used[start : start + size] = True
            start += size
        nd.dequantize_many(tensors, out=out, device="cuda")
        for name, values in expected(tensors).items():
            assert_same_bits(out[name].cpu().numpy(), values)
        assert (room.cpu()[~used] == 7).all()

    def test_data_from_everywhere(self):
        torch, cupy = pytest.importorskip("torch"), pytest.importorskip("cupy")
        data = random_blocks("Q8_0", 100)
        ours = nd.dequantize(data.view(np.int8), "I8", device="cuda")
        places = {"host": data, "torch": torch.from_numpy(data).cuda(), "cupy": cupy.asarray(data), "ours": ours}
        found = nd.dequantize_many({name: (place, "Q8_0") for name, place in places.items()})
        for tensor in found.values():
            assert_same_bits(tensor.copy_to_host(), nd.dequantize(data, "Q8_0", device="reference"))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sharing_with_torch(self, dtype):
        """Results share an allocation, which lives as long as any of them."""
        torch = pytest.importorskip("torch")
        tensors = mixture(["Q4_K", "Q8_0"], (3, 40))
        found = nd.dequantize_many(tensors, dtype, device="cuda")
        pointers = {name: tensor.ptr for name, tensor in found.items()}
        assert all(pointer % 256 == 0 for pointer in pointers.values())
        shared = {name: torch.from_dlpack(tensor) for name, tensor in found.items()}
        del found
        gc.collect()
        churn = [nd.dequantize_many(tensors, dtype, device="cuda") for _ in range(5)]
        for name, values in expected(tensors, dtype).items():
            assert shared[name].data_ptr() == pointers[name]
            assert tuple(shared[name].shape) == values.shape
            np.testing.assert_array_equal(shared[name].float().cpu().numpy(), values.astype(np.float32))
        del churn

    def test_large_results_do_not_share(self):
        data = random_blocks("Q4_0", 1 << 20)
        found = nd.dequantize_many(dict.fromkeys(range(3), (data, "Q4_0")), device="cuda")
        assert len({id(tensor.memory.owner) for tensor in found.values()}) == 3

    def test_a_wrong_tensor_is_named(self):
        with pytest.raises(nd.DataError, match="tensor 'b': "):
            nd.dequantize_many({"a": (bytes(34), "Q8_0"), "b": (bytes(35), "Q8_0")}, device="cuda")

    def test_streams(self):
        torch = pytest.importorskip("torch")
        tensors = mixture(["Q4_K", "Q8_0"])
        stream = torch.cuda.Stream()
        found = nd.dequantize_many(tensors, device="cuda", stream=stream)
        assert_all_same(found, tensors)
