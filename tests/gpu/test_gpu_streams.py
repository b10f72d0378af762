"""On a GPU: calls run on the stream that PyTorch or CuPy works on, and everything is ordered with it, both ways.

No test here depends on luck: streams are kept busy for a millisecond before what is to come late, memory is poisoned
before it is written, and whatever is dropped too early is overwritten at once.
"""

import gc
import threading
import weakref

import numpy as np
import pytest
from blocks import assert_same_bits, random_blocks

import numba_dequant as nd
from numba_dequant.backends.devices import is_simulated, why_no_cuda

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")

if why_no_cuda() is None and not is_simulated():
    from cuda.bindings import driver

    from numba_dequant.backends import gpu
    from numba_dequant.backends.gpu import Gpu, gpu_at

BUSY = 2_000_000
"""Clock cycles: about a millisecond."""

N_BLOCKS = 20_000
HOST = random_blocks("Q8_0", N_BLOCKS)
OTHER = random_blocks("Q8_0", N_BLOCKS, seed=1)
N = 32 * N_BLOCKS


@pytest.fixture(scope="module")
def expected():
    return nd.dequantize(HOST, "Q8_0", device="reference")


@pytest.fixture
def blocks():
    found = torch.from_numpy(HOST).cuda()
    torch.cuda.synchronize()
    return found


def poisoned():
    return torch.full((N,), float("nan"), dtype=torch.float16, device="cuda")


def assert_right(found, expected):
    torch.cuda.synchronize()
    assert_same_bits(found.cpu().numpy(), expected)


def busy():
    torch.cuda._sleep(BUSY)


class Gate:
    """Holds a stream up until the end of a ``with`` block, or for five seconds if the host waits for the stream."""

    def __init__(self, stream):
        self.flag = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.timer = threading.Timer(5, self.flag.fill_, (1,))
        wait_until_it_is = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        (code,) = driver.cuStreamWaitValue32(stream.cuda_stream, self.flag.data_ptr(), 1, wait_until_it_is)
        assert not code

    def is_open(self):
        return bool(self.flag[0])

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *error):
        self.timer.cancel()
        self.flag.fill_(1)


@pytest.fixture(params=["with out", "without out"])
def call(request):
    """`dequantize` to a PyTorch tensor, with its options."""

    def dequantize(data, **options):
        if request.param == "with out":
            return nd.dequantize(data, "Q8_0", out=poisoned(), **options)
        return torch.from_dlpack(nd.dequantize(data, "Q8_0", device="cuda", **options))

    return dequantize


class TestPytorch:
    def test_data_of_a_side_stream_is_dropped_after_a_call_on_the_default_stream(self, blocks, expected):
        """The default stream has the handle 0, which PyTorch takes for "a new stream"."""
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        busy()
        with torch.cuda.stream(stream):
            data = blocks.clone()
            found = nd.dequantize(data, "Q8_0", stream=0)
            del data
            torch.full_like(blocks, 0x5A)
        assert_right(torch.from_dlpack(found), expected)

    def test_a_call_runs_on_the_current_stream(self, call, blocks, expected):
        """Data is written just before, on a busy stream; the result is read just after, and its memory overwritten."""
        streams = [torch.cuda.Stream() for _ in range(2)]
        seen = []
        for number in range(200):
            with torch.cuda.stream(streams[number % 2]):
                data = torch.full_like(blocks, 0xA5)
                busy()
                data.copy_(blocks)
                found = call(data)
                data.fill_(0x5A)
                del data
                again = torch.full_like(blocks, 0x5A)
                seen.append(found.clone())
                found.fill_(0)
                del found, again
            if len(seen) == 10:
                torch.cuda.synchronize()
                for each in seen:
                    assert_right(each, expected)
                seen.clear()

    def test_the_default_stream(self, call, blocks, expected):
        data = torch.full_like(blocks, 0xA5)
        busy()
        data.copy_(blocks)
        assert_right(call(data).clone(), expected)

    def test_only_the_output_is_pytorch_s(self, expected):
        stream = torch.cuda.Stream()
        data = nd.dequantize(HOST.view(np.int8), "I8", device="cuda")
        with torch.cuda.stream(stream):
            out = torch.zeros(N, dtype=torch.float16, device="cuda")
            busy()
            out.fill_(float("nan"))
            nd.dequantize(data, "Q8_0", out=out)
            seen = out.clone()
            out.fill_(0)
        assert_right(seen, expected)

    def test_a_tensor_that_was_computed_for_pytorch_is_pytorch_s(self, blocks, expected):
        """Bytes that are copied by one call are the blocks of the next, both on a side stream."""
        with torch.cuda.stream(torch.cuda.Stream()):
            data = torch.full_like(blocks, 0xA5)
            busy()
            data.copy_(blocks)
            kept = nd.dequantize(data, "I8")
            data.fill_(0x5A)
            found = nd.dequantize(kept, "Q8_0")
            assert found.stream == torch.cuda.current_stream().cuda_stream
            del kept
            again = torch.full_like(blocks, 0x5A)
            seen = torch.from_dlpack(found).clone()
            del again
        assert_right(seen, expected)

    def test_data_that_is_dropped_while_a_named_stream_reads_it(self, call, blocks, expected):
        named = torch.cuda.Stream()
        seen = []
        for _ in range(20):
            data = blocks.clone()
            pointer = data.data_ptr()
            named.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(named):
                busy()
            found = call(data, stream=named)
            has_read = named.record_event()
            del data
            taken = [torch.full_like(blocks, 0x5A) for _ in range(3)]
            assert pointer not in [each.data_ptr() for each in taken] or has_read.query()
            with torch.cuda.stream(named):
                seen.append(found.clone())
        for each in seen:
            assert_right(each, expected)

    def test_a_result_that_is_dropped_while_pytorch_reads_it(self, expected):
        """It is of the GPU's own pool, in the order of the legacy stream, and PyTorch reads it on a side stream."""
        stream = torch.cuda.Stream()
        seen = []
        for _ in range(20):
            found = nd.dequantize(HOST, "Q8_0", device="cuda")
            with torch.cuda.stream(stream):
                shared = torch.from_dlpack(found)
                busy()
                seen.append(shared.clone())
            del found, shared
            nd.dequantize(OTHER, "Q8_0", device="cuda")
        for each in seen:
            assert_right(each, expected)

    def test_a_result_that_is_dropped_while_another_call_reads_it(self, expected):
        stream = torch.cuda.Stream()
        seen = []
        for _ in range(20):
            data = nd.dequantize(HOST.view(np.int8), "I8", device="cuda")
            with torch.cuda.stream(stream):
                busy()
            seen.append(nd.dequantize(data, "Q8_0", stream=stream))
            del data
            nd.dequantize(OTHER.view(np.int8), "I8", device="cuda")
        for each in seen:
            assert_same_bits(each.copy_to_host(), expected)

    def test_from_one_stream_to_another(self, call, blocks, expected):
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        data = torch.full_like(blocks, 0xA5)
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            busy()
            data.copy_(blocks)
            found = nd.dequantize(data, "Q8_0")
        with torch.cuda.stream(second):
            seen = torch.from_dlpack(found).clone()
            del found
            second.wait_stream(first)
            again = call(data).clone()
        assert_right(seen, expected)
        assert_right(again, expected)

    def test_an_output_of_ours_knows_on_which_stream_it_was_written(self, blocks, expected):
        out = nd.dequantize(OTHER, "Q8_0", device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            busy()
            assert nd.dequantize(blocks, "Q8_0", out=out) is out
        assert_same_bits(out.copy_to_host(), expected)

    def test_results_come_from_pytorch_s_allocator(self, blocks):
        found = nd.dequantize(blocks, "Q8_0")
        tensor = found.memory.owner.tensor
        assert tensor.data_ptr() == found.ptr
        seen = weakref.ref(tensor)
        del found, tensor
        assert seen() is None

    def test_many(self, blocks, expected):
        with torch.cuda.stream(torch.cuda.Stream()):
            for out in (None, {"a": poisoned(), "b": poisoned()}):
                data = torch.full_like(blocks, 0xA5)
                busy()
                data.copy_(blocks)
                found = nd.dequantize_many({"a": (data, "Q8_0"), "b": (HOST, "Q8_0")}, out=out, device="cuda")
                data.fill_(0x5A)
                del data
                again = torch.full_like(blocks, 0x5A)
                for each in found.values():
                    assert_right(torch.as_tensor(each).clone(), expected)
                del again

    def test_a_batch_runs_on_the_stream_that_is_current_then(self, blocks, expected):
        data = torch.full_like(blocks, 0xA5)
        batch = nd.prepare_many({"a": (data, "Q8_0"), "b": (HOST, "Q8_0")})
        for _ in range(3):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                data.fill_(0xA5)
                busy()
                data.copy_(blocks)
                found = batch.run()
                data.fill_(0x5A)
                seen = [torch.from_dlpack(each).clone() for each in found.values()]
            for each in seen:
                assert_right(each, expected)

    @pytest.mark.parametrize("threads", [None, 1])
    def test_loading_to_an_output(self, tmp_path, threads, expected):
        from blocks import write_model

        model = nd.open(write_model(tmp_path / "m.gguf", {"a": ("Q8_0", (N,), HOST)}))
        for _ in range(10):
            with torch.cuda.stream(torch.cuda.Stream()):
                out = torch.zeros(N, dtype=torch.float16, device="cuda")
                busy()
                out.fill_(float("nan"))
                model.load_all(out={"a": out}, device="cuda", threads=threads)
                seen = out.clone()
                out.fill_(0)
            assert_right(seen, expected)


class TestPinnedTensors:
    def test_nobody_waits_and_the_buffer_is_kept(self, expected, monkeypatch):
        stream = torch.cuda.Stream()
        for many in (False, True):
            data = torch.from_numpy(HOST).pin_memory()
            with torch.cuda.stream(stream):
                nd.dequantize(data, "Q8_0", device="cuda")
                nd.dequantize_many({"a": (data, "Q8_0")}, device="cuda")  # the driver may wait while it loads a kernel
                stream.synchronize()
                with Gate(stream) as gate:
                    monkeypatch.setattr(Gpu, "synchronize", lambda *_: pytest.fail("waited for the stream"))
                    if many:
                        found = nd.dequantize_many({"a": (data, "Q8_0")}, device="cuda")["a"]
                    else:
                        found = nd.dequantize(data, "Q8_0", device="cuda")
                    monkeypatch.undo()
                    assert not gate.is_open()
                    assert not stream.query()
                del data
                others = [torch.full_like(torch.from_numpy(OTHER), 0x5A).pin_memory() for _ in range(3)]
                seen = torch.from_dlpack(found).clone()
                del others
            assert_right(seen, expected)

    def test_on_the_default_stream_and_on_a_named_one(self, expected):
        data = torch.from_numpy(HOST).pin_memory()
        for stream in (None, torch.cuda.Stream()):
            assert_same_bits(nd.dequantize(data, "Q8_0", device="cuda", stream=stream).copy_to_host(), expected)

    def test_other_pinned_memory_may_be_changed_at_once(self, expected):
        with gpu_at(0).active():
            buffer = gpu_at(0).pinned(HOST.size)
        buffer[:] = HOST
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            busy()
        found = nd.dequantize(buffer, "Q8_0", device="cuda", stream=stream)
        buffer[:] = 0x5A
        assert_same_bits(found.copy_to_host(), expected)


class TestGraphs:
    def replayed(self, graph, data, found, blocks, expected):
        for _ in range(3):
            data.fill_(0xA5)
            found.fill_(float("nan"))
            data.copy_(blocks)
            graph.replay()
            assert_right(found, expected)

    @pytest.mark.parametrize("is_loaded", [True, False])
    def test_capture_and_replay(self, call, blocks, expected, is_loaded):
        data = torch.full_like(blocks, 0xA5)
        out = poisoned()
        if is_loaded:
            call(data)
        else:
            gpu._load_kernel.cache_clear()
            gpu_at(0).kernels.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(data)
            out.copy_(found)
        self.replayed(graph, data, out, blocks, expected)

    def test_a_strided_slice(self, blocks, expected):
        padded = torch.full((N_BLOCKS, 50), 0xA5, dtype=torch.uint8, device="cuda")
        out = poisoned()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            nd.dequantize(padded[:, :34], "Q8_0", out=out)
        padded[:, :34] = blocks.view(N_BLOCKS, 34)
        out.fill_(float("nan"))
        graph.replay()
        assert_right(out, expected)

    def test_what_was_computed_before_may_be_read(self, expected):
        data = nd.dequantize(HOST.view(np.int8), "I8", device="cuda")
        out = poisoned()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            nd.dequantize(data, "Q8_0", out=out)
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
            assert_right(out, expected)

    def test_a_batch_that_was_prepared_before(self, blocks, expected):
        data = torch.full_like(blocks, 0xA5)
        batch = nd.prepare_many({"a": (data, "Q8_0"), "b": (HOST, "Q8_0")})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch.run()
        for found in batch.results.values():
            self.replayed(graph, data, torch.from_dlpack(found), blocks, expected)

    def test_what_cannot_be_captured_says_so_and_the_capture_goes_on(self, blocks, expected, tmp_path):
        from blocks import write_model

        model = nd.open(write_model(tmp_path / "m.gguf", {"a": ("Q8_0", (N,), HOST)}))
        out, data = poisoned(), torch.full_like(blocks, 0xA5)
        odd = torch.zeros(N + 1, dtype=torch.float16, device="cuda")[1:]
        ready = nd.dequantize(blocks, "Q8_0")
        ours = nd.dequantize(HOST.view(np.int8), "I8", device="cuda")
        pinned = torch.from_numpy(HOST).pin_memory()
        # PyTorch hands out 32 streams in turn: a stream created earlier could be the one that captures.
        capturing, named = torch.cuda.Stream(), torch.cuda.Stream()
        assert capturing != named
        attempts = {
            "data on the host": lambda: nd.dequantize(HOST, "Q8_0", out=out),
            "host cannot": lambda: nd.dequantize(pinned, "Q8_0", out=out),
            "loaded": lambda: model.load("a", device="cuda", out=out),
            "multiple of 16": lambda: nd.dequantize(data, "Q8_0", out=odd),
            "prepare": lambda: nd.dequantize_many({"a": (data, "Q8_0")}),
            "copied to the host": lambda: nd.dequantize(data, "Q8_0").copy_to_host(),
            "would not contain it": lambda: nd.dequantize(ours, "Q8_0"),
            "use the capturing stream": lambda: nd.dequantize(data, "Q8_0", out=out, stream=named),
        }
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capturing):
            for message, attempt in attempts.items():
                with pytest.raises(nd.DeviceError, match=message):
                    attempt()
            nd.dequantize(data, "Q8_0", out=out)
        self.replayed(graph, data, out, blocks, expected)
        assert_same_bits(ready.copy_to_host(), expected)

    def test_memory_that_is_dropped_during_a_capture(self, blocks, expected):
        dropped = [nd.dequantize(HOST, "Q8_0", device="cuda") for _ in range(4)]
        stream = torch.cuda.Stream()
        dropped += [nd.dequantize(blocks, "Q8_0", stream=stream) for _ in range(4)]
        dropped += [nd.dequantize(blocks, "Q8_0") for _ in range(4)]
        shared = [torch.from_dlpack(each) for each in dropped]
        out = poisoned()
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # what other tests have left must not be freed during the capture
        with torch.cuda.graph(graph, stream=stream):
            dropped.clear()
            shared.clear()
            gc.collect()
            nd.dequantize(blocks, "Q8_0", out=out)
        out.fill_(float("nan"))
        graph.replay()
        assert_right(out, expected)


class TestCupy:
    @pytest.fixture
    def cupy(self):
        return pytest.importorskip("cupy")

    @pytest.mark.parametrize("has_out", [True, False])
    @pytest.mark.parametrize("non_blocking", [True, False])
    def test_a_call_runs_on_the_current_stream(self, cupy, blocks, expected, has_out, non_blocking):
        given = cupy.asarray(HOST)
        cupy.cuda.Device().synchronize()
        for _ in range(20):
            with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
                with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                    busy()
                data = cupy.full_like(given, 0xA5)
                data[:] = given
                out = cupy.full(N, np.nan, np.float16) if has_out else None
                found = nd.dequantize(data, "Q8_0", out=out)
                data.fill(0x5A)
                del data
                again = cupy.full_like(given, 0x5A)
                seen = cupy.asarray(found).copy()
                del found, out, again
            stream.synchronize()
            assert_same_bits(seen.get(), expected)

    def test_data_that_is_dropped_while_a_named_stream_reads_it(self, cupy, expected):
        given = cupy.asarray(HOST)
        named = torch.cuda.Stream()
        seen = []
        for _ in range(20):
            data = given.copy()
            with torch.cuda.stream(named):
                busy()
            seen.append(nd.dequantize(data, "Q8_0", stream=named))
            del data
            taken = [cupy.full_like(given, 0x5A) for _ in range(3)]
            del taken
        for each in seen:
            assert_same_bits(each.copy_to_host(), expected)

    def test_capture_and_replay(self, cupy, expected):
        given = cupy.asarray(HOST)
        data, out = cupy.full_like(given, 0xA5), cupy.full(N, np.nan, np.float16)
        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            with pytest.raises(nd.DeviceError, match="pass out="):
                nd.dequantize(data, "Q8_0")
            with pytest.raises(nd.DeviceError, match="data on the host"):
                nd.dequantize(HOST, "Q8_0", out=out)
            nd.dequantize(data, "Q8_0", out=out)
            graph = stream.end_capture()
            for _ in range(3):
                data[:] = given
                out.fill(np.nan)
                graph.launch(stream)
                stream.synchronize()
                assert_same_bits(out.get(), expected)

    def test_together_with_pytorch(self, cupy, blocks, expected):
        """The stream is PyTorch's, whose the data is; CuPy's waits for it, before and after."""
        for _ in range(10):
            with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream(non_blocking=True) as stream:
                data = torch.full_like(blocks, 0xA5)
                with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
                    busy()
                out = cupy.full(N, np.nan, np.float16)
                busy()
                data.copy_(blocks)
                nd.dequantize(data, "Q8_0", out=out)
                seen = out.copy()
                out.fill(0)
                stream.synchronize()
            assert_same_bits(seen.get(), expected)


class TestStridedData:
    def test_padded_rows(self, blocks, expected):
        padded = torch.full((N_BLOCKS // 10, 400), 0xA5, dtype=torch.uint8, device="cuda")
        padded[:, :340] = blocks.view(-1, 340)
        assert_right(torch.from_dlpack(nd.dequantize(padded[:, :340], "Q8_0")), expected)
        found = nd.dequantize_many({"a": (padded[:, :340], "Q8_0")})["a"]
        assert_right(torch.from_dlpack(found), expected)
        assert_right(torch.from_dlpack(nd.dequantize(padded[:, :340], "Q8_0", stream=torch.cuda.Stream())), expected)

    def test_cupy(self, blocks, expected):
        cupy = pytest.importorskip("cupy")
        padded = cupy.full((N_BLOCKS, 50), 0xA5, np.uint8)
        padded[:, :34] = cupy.asarray(HOST).reshape(-1, 34)
        assert_same_bits(nd.dequantize(padded[:, :34], "Q8_0").copy_to_host(), expected)

    def test_a_batch_reads_strided_data_anew(self, blocks, expected):
        cupy = pytest.importorskip("cupy")
        ours = torch.full((N_BLOCKS, 50), 0xA5, dtype=torch.uint8, device="cuda")
        theirs = cupy.full((N_BLOCKS, 50), 0xA5, np.uint8)
        for stream in (None, torch.cuda.Stream()):
            ours.fill_(0xA5)
            theirs.fill(0xA5)
            batch = nd.prepare_many({"a": (ours[:, :34], "Q8_0"), "b": (theirs[:, :34], "Q8_0")}, stream=stream)
            batch.run()
            torch.cuda.synchronize()
            ours[:, :34] = blocks.view(N_BLOCKS, 34)
            theirs[:, :34] = cupy.asarray(HOST).reshape(-1, 34)
            torch.cuda.synchronize()
            for found in batch.run().values():
                assert_same_bits(found.copy_to_host(), expected)

    def test_an_output_must_be_contiguous(self, blocks):
        cupy = pytest.importorskip("cupy")
        for out in (torch.zeros(2 * N, dtype=torch.float16, device="cuda")[::2], cupy.zeros(2 * N, np.float16)[::2]):
            with pytest.raises(nd.OutputError, match="not C-contiguous"):
                nd.dequantize(blocks, "Q8_0", out=out)

    def test_other_libraries_must_make_it_contiguous(self):
        from numba import cuda

        with pytest.raises(nd.DataError, match="contiguous"):
            nd.dequantize(cuda.to_device(np.zeros(680, np.uint8))[::2], "Q8_0")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "int32", "float32"])
    def test_bytes_of_any_type(self, blocks, expected, dtype):
        data = blocks.view(getattr(torch, dtype))
        assert_right(torch.from_dlpack(nd.dequantize(data, "Q8_0")), expected)

    def test_a_parameter_that_requires_gradients(self, blocks):
        weight = torch.nn.Parameter(torch.ones(64, device="cuda"))
        assert (nd.dequantize(weight, "F32").copy_to_host() == 1).all()

    def test_an_output_that_keeps_gradients(self, blocks):
        """As on the CPU: only a leaf may be written."""
        leaf = torch.zeros(blocks.numel() // 34 * 32, device="cuda", requires_grad=True)
        with pytest.raises(nd.OutputError, match=r"keeps gradients; pass out\.detach\(\)"):
            nd.dequantize(blocks, "Q8_0", "float32", out=leaf * 1)
        assert nd.dequantize(blocks, "Q8_0", "float32", out=leaf) is leaf


class TestMany:
    def test_a_batch_that_is_dropped_while_a_named_stream_reads_its_data(self, blocks, expected):
        named = torch.cuda.Stream()
        seen = []
        for _ in range(10):
            data = blocks.clone()
            ours = nd.dequantize(HOST.view(np.int8), "I8", device="cuda")
            named.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(named):
                busy()
            seen += nd.dequantize_many({"a": (data, "Q8_0"), "b": (ours, "Q8_0")}, stream=named).values()
            del data, ours
            taken = [torch.full_like(blocks, 0x5A) for _ in range(3)]
            taken.append(nd.dequantize(OTHER.view(np.int8), "I8", device="cuda"))
            del taken
        for each in seen:
            assert_same_bits(each.copy_to_host(), expected)

    def test_outputs_must_not_overlap(self, blocks, tmp_path):
        from blocks import write_model

        room = torch.zeros(2 * N, dtype=torch.float16, device="cuda")
        outs = {"a": room[:N], "b": room[N // 2 : N // 2 + N]}
        with pytest.raises(nd.OutputError, match="shares memory"):
            nd.dequantize_many({"a": (blocks, "Q8_0"), "b": (blocks, "Q8_0")}, out=outs)
        path = write_model(tmp_path / "m.gguf", {"a": ("Q8_0", (N,), HOST), "b": ("Q8_0", (N,), HOST)})
        with pytest.raises(nd.OutputError, match="shares memory"):
            nd.open(path).load_all(out=outs, device="cuda")
        both = torch.zeros(34 * N_BLOCKS + 2 * N, dtype=torch.uint8, device="cuda")
        tensors = {"a": (blocks, "Q8_0"), "b": (both[: 34 * N_BLOCKS], "Q8_0")}
        first = both[32 * 1000 : 32 * 1000 + 2 * N].view(torch.float16)
        with pytest.raises(nd.OutputError, match="shares memory with the data of tensor 'b'"):
            nd.dequantize_many(tensors, out={"a": first, "b": torch.zeros(N, dtype=torch.float16, device="cuda")})
        assert not room.any()

    def test_tensors_without_memory(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = torch.empty(34, dtype=torch.uint8, device="cuda")
        for data in (fake, torch.empty(34, dtype=torch.uint8, device="meta")):
            with pytest.raises(nd.DataError, match=r"numba_dequant\.torch"):
                nd.dequantize(data, "Q8_0", device="cuda")
            with pytest.raises(nd.DataError, match=r"numba_dequant\.torch"):
                nd.dequantize(data, "Q8_0")
