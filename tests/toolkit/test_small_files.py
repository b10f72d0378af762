"""Small files are copied to the GPU while their header is read. The GPU does its work as late as it may."""

import gc
import os
import threading
from dataclasses import replace

import faults
import numpy as np
import pytest
from blocks import random_blocks, write_model
from late_gpu import WITH_SMALL_FILES, installed
from small_file import GOOD
from small_model import TENSORS, assert_right

import numba_dequant as nd
from numba_dequant.loading import native_threads, small_files
from numba_dequant.loading.small_files import SmallFile

# With these, there is one tensor or more that has to wait for what the file, the memory or the caller does.
AFTER_THE_HEADER = [
    scenario
    for scenario in faults.SCENARIOS
    if scenario not in (faults.there_is_too_little_memory, faults.the_iterator_is_dropped, faults.the_file_is_gone)
]


@pytest.fixture(params=[0, 1, 2, 3])
def late(request, monkeypatch):
    yield from installed(request.param, monkeypatch, tuning=WITH_SMALL_FILES)


@pytest.fixture
def path(tmp_path, late):
    """A file of which one tensor has been loaded, so that buffers are there."""
    path = write_model(tmp_path / "model.gguf", TENSORS)
    nd.load(path, "a.norm", device="cuda")
    return path


@pytest.fixture
def copies(monkeypatch):
    """How many tensors have been loaded from each copy."""
    found, prepare = [], SmallFile.prepare

    def count(self, requests, call):
        found.append(len(requests))
        return prepare(self, requests, call)

    monkeypatch.setattr(SmallFile, "prepare", count)
    return found


@pytest.fixture
def begun(monkeypatch):
    """A list of the copies that have begun."""
    found, begin = [], SmallFile.__init__

    def remember(self, *arguments):
        begin(self, *arguments)
        found.append(self)

    monkeypatch.setattr(SmallFile, "__init__", remember)
    return found


def assert_loaded(found, dtype="float16"):
    assert list(found) == list(TENSORS)
    for name, values in found.items():
        assert_right(values, name, dtype)


def assert_nothing_is_left(late):
    gc.collect()
    assert not native_threads._running
    assert late.in_use == sum(map(len, late.idle_buffers)) * WITH_SMALL_FILES.chunk_bytes


def test_all_tensors(path, late, copies):
    before = len(os.listdir("/proc/self/fd"))
    for dtype in ("float16", "float32"):
        assert_loaded(nd.load(path, dtype=dtype, device="cuda"), dtype)
    assert copies == [len(TENSORS)] * 2
    assert len(os.listdir("/proc/self/fd")) == before
    assert_nothing_is_left(late)


def test_each_tensor_in_its_type(path, copies):
    found = nd.load(path, dtype={"*norm": "float32", "*": "bfloat16"}, device="cuda")
    for name, values in found.items():
        assert_right(values, name, "float32" if name.endswith("norm") else "bfloat16")
    assert copies == [len(TENSORS)]


def test_results_live_on(path, late):
    found = nd.load(path, device="cuda")
    kept = {"a.q": found.pop("a.q"), "output": found.pop("output")}
    del found
    assert_loaded(nd.load(path, device="cuda"))
    for name, values in kept.items():
        assert_right(values, name)
    del kept, values
    assert_nothing_is_left(late)


def test_progress_counts_the_bytes_of_tensors(path):
    reports = []
    nd.load(path, device="cuda", progress=False, callback=reports.append)
    total = sum(tensor.n_bytes for tensor in nd.open(path).tensors.values())
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    assert (reports[-1].bytes_done, reports[-1].bytes_total) == (total, total)


@pytest.mark.parametrize(
    "options",
    [
        {"select": "a.*"},
        {"select": np.array(["a.q", "b.k"])},
        {"threads": 2},
        {"stream": 7},
        {"keep_quantized": True},
        {"device": "cpu"},
        {"device": "reference"},
        {"out": {}},
    ],
    ids=str,
)
def test_what_is_not_copied_as_a_whole(path, begun, options):
    found = nd.load(path, **{"device": "cuda", **options})
    assert set(found) <= set(TENSORS)
    assert not begun


@pytest.mark.parametrize("make", ["bytes", "list", "other", "missing", "folder", "large", "empty"])
def test_what_is_no_small_file(path, begun, monkeypatch, tmp_path, make):
    source = path
    if make == "bytes":
        source = path.read_bytes()
    elif make == "list":
        source = [path]
    elif make == "other":
        source = 3.5
    elif make == "missing":
        source = tmp_path / "missing.gguf"
    elif make == "folder":
        source = tmp_path
    elif make == "large":
        tuning = replace(WITH_SMALL_FILES, small_file_bytes=path.stat().st_size - 1)
        monkeypatch.setattr("numba_dequant.loading.gpu_buffers.TUNING", tuning)
    else:
        source = tmp_path / "empty.gguf"
        source.touch()
    if make in ("bytes", "list", "large"):
        assert_loaded(nd.load(source, device="cuda"))
    else:
        with pytest.raises(nd.NumbaDequantError):
            nd.load(source, device="cuda")
    assert not begun


def test_no_file_is_copied_before_buffers_are_there(tmp_path, late, begun):
    path = write_model(tmp_path / "model.gguf", TENSORS)
    assert_loaded(nd.load(path, device="cuda"))
    assert not begun
    assert_loaded(nd.load(path, device="cuda"))
    assert len(begun) == 1


@pytest.mark.parametrize("cut", [10, 200, -500])
def test_a_header_with_a_fault(path, late, begun, cut):
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    with pytest.raises(nd.GgufError):
        nd.load(path, device="cuda")
    assert len(begun) == 1
    assert_nothing_is_left(late)
    path.write_bytes(content)
    assert_loaded(nd.load(path, device="cuda"))


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"progress": 3}, {"callback": 3}, {"dtype": {"x": "fp16"}}])
def test_a_wrong_argument(path, late, begun, options):
    with pytest.raises((nd.DtypeError, nd.OptionError)):
        nd.load(path, device="cuda", **options)
    assert len(begun) == 1
    assert_nothing_is_left(late)


def test_ctrl_c_while_the_header_is_read(path, late, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("numba_dequant.model.open_gguf", interrupt)
        with pytest.raises(KeyboardInterrupt):
            nd.load(path, device="cuda")
    assert_nothing_is_left(late)
    assert_loaded(nd.load(path, device="cuda"))


def test_shards_are_read_for_themselves(path, copies, begun):
    first = GOOD / "split-00001-of-00003.gguf"
    for name, values in nd.load(first, device="cuda").items():
        np.testing.assert_array_equal(values.copy_to_host(), nd.open(first).load(name, device="reference"))
    assert len(begun) == 1
    assert not copies


def changed_between(path, monkeypatch, change):
    """Change a file when it has been copied and its header has not been read."""
    begin = small_files.copy_of_file

    def copy_of_file(*arguments):
        begun = begin(*arguments)
        while begun._threads.left.any():
            threading.Event().wait(0.01)
        change()
        return begun

    monkeypatch.setattr(small_files, "copy_of_file", copy_of_file)


def test_a_file_that_is_written_to_after_the_copy(path, monkeypatch, copies):
    """The header says nothing of it, because it was read later. The bytes of the copy are old."""
    new = dict(TENSORS, **{"a.q": ("Q6_K", (6, 1024), random_blocks("Q6_K", 24, 7))})
    other = write_model(path.parent / "other.gguf", new)
    expected = nd.load(other, device="reference")["a.q"]
    changed_between(path, monkeypatch, lambda: (path.write_bytes(other.read_bytes()), os.utime(path, ns=(5, 5))))
    np.testing.assert_array_equal(nd.load(path, device="cuda")["a.q"].copy_to_host(), expected)
    assert not copies


def test_another_file_that_takes_its_place_after_the_copy(path, monkeypatch, copies):
    new = dict(TENSORS, **{"a.q": ("Q6_K", (6, 1024), random_blocks("Q6_K", 24, 7))})
    other = write_model(path.parent / "other.gguf", new)
    expected = nd.load(other, device="reference")["a.q"]
    changed_between(path, monkeypatch, lambda: os.replace(other, path))
    np.testing.assert_array_equal(nd.load(path, device="cuda")["a.q"].copy_to_host(), expected)
    assert not copies


def test_a_file_that_has_grown_after_the_copy(path, monkeypatch, copies):
    content = path.read_bytes()
    path.write_bytes(content[:-3000])
    changed_between(path, monkeypatch, lambda: path.write_bytes(content))
    assert_loaded(nd.load(path, device="cuda"))
    assert not copies


@pytest.mark.parametrize("n_given", [0, 1, 2])
def test_too_little_memory_for_the_copy(path, late, monkeypatch, n_given):
    """Each tensor is then read for itself."""
    real, given = late.allocate, []

    def allocate(n_bytes, stream, keeper=None):
        given.append(n_bytes)
        if len(given) == n_given + 1:
            raise nd.DeviceError("cuda:0 is out of memory")
        return real(n_bytes, stream, keeper)

    monkeypatch.setattr(late, "allocate", allocate)
    assert_loaded(nd.load(path, device="cuda"))
    assert len(given) > n_given + 1
    assert_nothing_is_left(late)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("scenario", AFTER_THE_HEADER, ids=lambda scenario: scenario.__name__)
def test_halfway(scenario, tmp_path, late, monkeypatch, layer):
    """What happens in a read happens after the header has been read."""
    path = faults.write(tmp_path / "model.gguf")
    faults.assert_loads(path, "cuda")
    may_read, begin, prepare = threading.Event(), SmallFile.__init__, SmallFile.prepare
    may_read.set()

    def begin_to_wait(self, *arguments):
        may_read.clear()
        begin(self, *arguments)

    def prepare_and_go_on(self, *arguments):
        may_read.set()
        return prepare(self, *arguments)

    monkeypatch.setattr(SmallFile, "__init__", begin_to_wait)
    monkeypatch.setattr(SmallFile, "prepare", prepare_and_go_on)
    device = faults.OnGpu(late)
    before_each_read = device.before_each_read

    def wait_before_each_read(patch, before):
        def wait(*place):
            may_read.wait(5)
            before(*place)

        before_each_read(patch, wait)

    device.before_each_read = wait_before_each_read
    scenario(device, path, monkeypatch, None, layer)
    assert_nothing_is_left(late)
    monkeypatch.undo()


def test_a_gpu_that_fails_while_it_copies(path, late, monkeypatch):
    import ctypes

    refuse = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_ssize_t] * 4)(lambda *_: 700)
    with monkeypatch.context() as patch:
        patch.setitem(late.thread_functions, "copy", refuse)
        with pytest.raises(nd.DeviceError, match="ILLEGAL_ADDRESS"):
            nd.load(path, device="cuda")
    assert not late.idle_buffers, "what it has may never be given back"
    assert_loaded(nd.load(path, device="cuda"))


def test_threads_load_at_once(path, late):
    found, barrier = [], threading.Barrier(3)

    def load():
        barrier.wait()
        found.extend(nd.load(path, device="cuda") for _ in range(4))

    workers = [threading.Thread(target=load) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 12
    for each in found:
        assert_loaded(each)
