"""Several GPUs in one process: each call works on the GPU that it names, and leaves the current one as it was."""

import threading

import faults
import pytest
from blocks import QUANTIZED, assert_same_bits, random_blocks

import numba_dequant as nd

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def the_first_stays_current():
    driver = pytest.importorskip("cuda.bindings.driver")
    gpu = pytest.importorskip("numba_dequant.backends.gpu")
    if gpu.n_devices() < 2:
        pytest.skip("needs two GPUs")
    with gpu.gpu_at(0).active():
        before = driver.cuCtxGetCurrent()[1]
        yield
        assert int(driver.cuCtxGetCurrent()[1]) == int(before)


@pytest.fixture
def path(tmp_path):
    return faults.write(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", QUANTIZED)
def test_dequantize(name):
    data = random_blocks(name, 100)
    found = nd.dequantize(data, name, device="cuda:1")
    assert found.device == 1
    assert_same_bits(found.copy_to_host(), nd.dequantize(data, name, device="reference"))


def test_data_on_the_other_one(path):
    kept = nd.open(path).load("blk.0.weight", device="cuda:0", keep_quantized=True)
    with pytest.raises(nd.DeviceError, match="the data is on cuda:0, but the device is cuda:1; copy it there first"):
        nd.dequantize(kept.data, "Q8_0", device="cuda:1")


def test_an_output_on_the_other_one(path):
    out = nd.open(path).load("blk.0.weight", device="cuda:0")
    with pytest.raises(nd.OutputError, match="cuda:0"):
        nd.open(path).load("blk.0.weight", device="cuda:1", out=out)


def test_many(path):
    kept = nd.open(path).load_all(device="cuda:1", keep_quantized=True)
    found = nd.dequantize_many({name: (tensor.data, tensor.format) for name, tensor in kept.items()}, device="cuda:1")
    for name, values in found.items():
        assert values.device == 1
        assert_same_bits(values.copy_to_host().reshape(faults.TENSORS[name][1]), faults.expected(name))


@pytest.mark.parametrize("threads", [1, 3, None])
def test_load(path, threads):
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        for name, values in nd.load(path, device=device, threads=threads).items():
            assert f"cuda:{values.device}" == device
            assert_same_bits(values.copy_to_host(), faults.expected(name))


def test_two_models_walked_in_turn(path):
    with nd.open(path) as model:
        walks = [model.stream(device=f"cuda:{index}", threads=2) for index in range(2)]
        for pair in zip(*walks, strict=True):
            for index, (name, values) in enumerate(pair):
                assert values.device == index
                assert_same_bits(values.copy_to_host(), faults.expected(name))


def test_two_loaders_in_two_threads(path):
    problems = []

    def work(index):
        try:
            for _ in range(5):
                for name, values in nd.load(path, device=f"cuda:{index}").items():
                    assert values.device == index
                    assert_same_bits(values.copy_to_host(), faults.expected(name))
        except BaseException as error:
            problems.append(error)

    workers = [threading.Thread(target=work, args=(index % 2,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems


def test_pytorch(path):
    torch = pytest.importorskip("torch")
    for name, values in nd.load(path, device="cuda:1").items():
        tensor = torch.from_dlpack(values)
        assert tensor.device == torch.device("cuda:1")
        assert_same_bits(tensor.cpu().numpy(), faults.expected(name))


@pytest.mark.parametrize("has_out", [True, False])
def test_pytorch_s_current_stream_of_each(has_out):
    """Each GPU has a current stream of its own; the current GPU need not be the one that the data lies on."""
    torch = pytest.importorskip("torch")
    host = random_blocks("Q8_0", 20_000)
    expected = nd.dequantize(host, "Q8_0", device="reference")
    for index in (0, 1, 1, 0):
        good = torch.from_numpy(host).to(f"cuda:{index}")
        torch.cuda.synchronize(index)
        stream = torch.cuda.Stream(index)
        with torch.cuda.stream(stream):
            data = torch.full_like(good, 0xA5)
            torch.cuda._sleep(2_000_000)
            data.copy_(good)
            out = torch.zeros(expected.size, dtype=torch.float16, device=good.device) if has_out else None
            with torch.cuda.device(1 - index):
                found = torch.as_tensor(nd.dequantize(data, "Q8_0", out=out), device=good.device)
            data.fill_(0x5A)
            seen = found.clone()
            found.fill_(0)
        torch.cuda.synchronize(index)
        assert_same_bits(seen.cpu().numpy(), expected)
        kept = nd.dequantize(data, "I8")
        del data
        assert kept.device == index
