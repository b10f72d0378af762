"""Loading to a GPU, with one that does its work as late as it may."""

import gc
import threading

import numpy as np
import parts
import pytest
from blocks import assert_same_bits, random_blocks, write_model
from late_gpu import POISON, TUNING, at
from small_model import MAX_BYTES, TENSORS, assert_loads, assert_right, kept_bytes

import numba_dequant as nd
from numba_dequant.backends.streams import CallStream
from numba_dequant.loading import gpu_loader, requests
from numba_dequant.parallel import plan, routes


@pytest.fixture
def model(tmp_path):
    with nd.open(write_model(tmp_path / "model.gguf", TENSORS)) as model:
        yield model


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("stream", [None, 7])
def test_everything(model, late, threads, stream):
    for _ in range(2):
        found = model.load_all(device="cuda", threads=threads, stream=stream)
        assert list(found) == list(TENSORS)
        for name, tensor in found.items():
            assert_right(tensor, name)
    assert kept_bytes(late) <= MAX_BYTES
    del found, tensor
    gc.collect()
    assert late.in_use == kept_bytes(late)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_one_after_the_other(model, late, prefetch, threads):
    dtype = {"*norm": "float32", "*": "bfloat16"}
    for name, tensor in model.stream(dtype=dtype, device="cuda", threads=threads, prefetch=prefetch):
        assert_right(tensor, name, "float32" if name.endswith("norm") else "bfloat16")


def test_no_tensor_takes_memory_before_its_turn(tmp_path, late, threads):
    tensors = {f"{number}": ("Q8_0", (1000, 32), random_blocks("Q8_0", 1000)) for number in range(3)}
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        walk = model.stream(device="cuda", threads=threads, prefetch=0)
        before = late.in_use
        _, first = next(walk)
        assert late.in_use - before - MAX_BYTES <= first.nbytes
        walk.close()


def test_the_iterator_is_dropped(model, late, threads):
    before = late.in_use
    for name, tensor in model.stream(device="cuda", threads=threads, prefetch=6):
        assert_right(tensor, name)
        if name == "a.q":
            break
    del tensor
    gc.collect()
    assert late.in_use - before == kept_bytes(late)
    assert_loads(model, threads)


def test_several_threads_fill_a_buffer(tmp_path, late):
    """Each reads shares; a chunk is sent once, when the last of them is there."""
    data = random_blocks("Q8_0", 2000)
    path = write_model(tmp_path / "model.gguf", {"large": ("Q8_0", (2000, 32), data)})
    shares, lock, two_readers = [], threading.Lock(), threading.Event()
    real_read, real_copy = late.read_into, late.copy_to_device
    copied = []

    def read_into(file, data, offset):
        with lock:
            shares.append((offset, len(data), threading.get_ident()))
            if len({thread for _, _, thread in shares}) > 1:
                two_readers.set()
        if late.thread_functions:
            two_readers.wait(30)  # on a busy machine one could have read everything before another has started
        return real_read(file, data, offset)

    def copy_to_device(pointer, host, stream):
        copied.append(host.size)
        real_copy(pointer, host, stream)

    late.read_into, late.copy_to_device = read_into, copy_to_device
    with nd.open(path) as model:
        tensor = model.tensors["large"]
        found = model.load("large", device="cuda", threads=3)
    assert_same_bits(found.copy_to_host(), nd.dequantize(data, "Q8_0", shape=(2000, 32), device="reference"))
    if late.thread_functions:
        ends = [offset + n_bytes for offset, n_bytes, _ in sorted(shares)]
        assert [offset for offset, _, _ in sorted(shares)] == [tensor.offset, *ends[:-1]]
        assert ends[-1] == tensor.offset + tensor.n_bytes
        assert max(n_bytes for _, n_bytes, _ in shares) == TUNING.subread_bytes
        assert len({thread for _, _, thread in shares}) > 1
        assert sum(copied) == tensor.n_bytes
        assert len(copied) < len(shares) / 2


def test_kept_as_it_is(model, late, threads):
    for name, tensor in model.load_all(device="cuda", threads=threads, keep_quantized=True).items():
        np.testing.assert_array_equal(tensor.data.copy_to_host(), model.read(name))
        assert tensor.shape == TENSORS[name][1]


def test_rows(model, late, threads):
    found = model.load("token_embd", "float32", device="cuda", threads=threads, rows=slice(3, 31))
    np.testing.assert_array_equal(found.copy_to_host(), model.load("token_embd", "float32", device="reference")[3:31])


def test_out(model, late, threads):
    out = {"a.q": model.load("a.q", device="cuda", threads=1), "ids": model.load("ids", device="cuda", threads=1)}
    for tensor in out.values():
        at(tensor.ptr, tensor.nbytes).fill(POISON)
    found = model.load_all(device="cuda", threads=threads, out=out)
    for name, tensor in found.items():
        assert_right(tensor, name)
    assert all(found[name] is tensor for name, tensor in out.items())


def test_blocks_in_memory_of_the_caller(model, late, threads):
    out = {name: model.load(name, device="cuda", keep_quantized=True).data for name in ("a.q", "b.k")}
    for tensor in out.values():
        at(tensor.ptr, tensor.nbytes).fill(POISON)
    found = model.load_all(list(out), device="cuda", threads=threads, out=out, keep_quantized=True)
    for name, tensor in out.items():
        assert found[name].data is tensor
        np.testing.assert_array_equal(tensor.copy_to_host(), model.read(name))


def test_a_wrong_out_is_found_before_anything_is_read(model, late, threads):
    out = {"b.k": model.load("a.q", device="cuda", threads=1)}
    before = late.end
    with pytest.raises(nd.OutputError, match=r"tensor 'b\.k': out has shape"):
        model.load_all(device="cuda", threads=threads, out=out)
    assert late.end == before


def test_two_loads_at_once(model, late, threads):
    first, second = (model.stream(device="cuda", threads=threads, prefetch=3) for _ in range(2))
    for (name, one), (_, other) in zip(first, second, strict=True):
        assert_right(one, name)
        assert_right(other, name)
    assert kept_bytes(late) <= 2 * MAX_BYTES


@pytest.mark.parametrize("select", [None, "*.norm", ["a.q", "b.k"]])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_what_is_reported_is_what_was_asked_for(model, late, select, prefetch):
    """Neither the bytes between two tensors nor those between two chunks."""
    chosen = requests.plan_requests(model.tensors, select, "float16", None, keep_quantized=False)
    reports = []
    for _ in gpu_loader.load(chosen, CallStream(late), 3, prefetch, reports.append):
        pass
    assert reports == sorted(reports)
    assert reports[-1] == sum(request.tensor.n_bytes for request in chosen)


@pytest.mark.parametrize("ends", [[1, 3], [0, 2, 2, 5]])
def test_groups(model, late, ends):
    """The tensors of a group come together, and the memory of a group is not taken before it begins."""
    chosen = requests.plan_requests(model.tensors, None, "float16", None, keep_quantized=False)
    ends = [*ends, len(chosen)]
    groups = gpu_loader.load_groups(chosen, CallStream(late), 3, lambda n_bytes: None, ends)
    found, before = [], late.in_use
    groups.begin()
    for number, end in enumerate(ends):
        following = ends[min(number + 1, len(ends) - 1)]
        if number + 1 < len(ends):
            groups.begin()
        found += groups.finish()
        assert len(found) == end
        most = sum(request.job.n_elements * 2 + 256 for request in chosen[:following])
        assert late.in_use - before <= most + 2 * MAX_BYTES
    groups.close()
    for request, values in zip(chosen, found, strict=True):
        assert_right(values, request.tensor.name)


@pytest.mark.parametrize("n_begun", [0, 1, 2])
def test_groups_may_be_closed_early(model, late, n_begun):
    chosen = requests.plan_requests(model.tensors, None, "float16", None, keep_quantized=False)
    before = late.in_use
    groups = gpu_loader.load_groups(chosen, CallStream(late), 3, lambda n_bytes: None, [2, 3, len(chosen)])
    for _ in range(n_begun):
        groups.begin()
    groups.close()
    assert late.in_use <= before + 2 * MAX_BYTES
    assert_right(model.load("a.q", device="cuda"), "a.q")


@pytest.mark.parametrize(
    ("devices", "batch_bytes", "kept"),
    [(["cuda:0", "cuda:0"], 1 << 30, True), (["cpu", "cuda:0", "cuda:0"], 3000, False)],
)
def test_several_devices(tmp_path, late, monkeypatch, devices, batch_bytes, kept):
    """The exchange waits for what was read, and nothing is freed before it was copied."""
    monkeypatch.setattr(routes, "LEAST_DIVIDED", 100)
    monkeypatch.setattr(routes, "BATCH_BYTES", batch_bytes)
    path = parts.write(tmp_path / "model.gguf")
    found = nd.load(path, device=devices, plan=parts.planned(len(devices)), keep_quantized=kept)
    parts.assert_parts(path, found, parts.planned(len(devices)), blocks=kept)
    found = nd.load(path, device=devices, plan=lambda model: plan(model.tensors.values(), len(devices), []))
    parts.assert_parts(path, found, lambda model: plan(model.tensors.values(), len(devices), []))


def test_closing_a_model_keeps_the_buffers_of_the_others(model, late):
    model.load_all(device="cuda")
    before = kept_bytes(late)
    model.close()
    with nd.open(model.path):
        pass
    assert kept_bytes(late) == before
    nd.release_buffers("cuda:0")
    assert kept_bytes(late) == 0


def test_loads_in_many_threads_at_once(model, late_with_threads):
    """Each has buffers of its own; none are lost, and none are used twice."""
    barrier, found = threading.Barrier(4), []

    def load():
        barrier.wait()
        found.extend(model.load_all(device="cuda", threads=2) for _ in range(5))

    workers = [threading.Thread(target=load) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 20
    kept = late_with_threads.idle_buffers
    assert 1 <= len(kept) <= 4
    assert len({id(each) for each in kept}) == len(kept)
