"""The cost model of plans: bytes and seconds of small cases by hand, and what is true for any machine."""

import math
from dataclasses import replace

import pytest
from test_plan import LLAMA, llama, tensors_of

import numba_dequant as nd
from numba_dequant.parallel import (
    Machine,
    Part,
    Plan,
    RankPlan,
    Replicate,
    Shard,
    cost,
    llama_rules,
    plan,
    predict,
    routes,
    spans,
)
from numba_dequant.parallel.cost import AGREEMENTS, BROADCAST, OF_BATCH
from numba_dequant.parallel.routes import LEAST_DIVIDED

LATENCY = 1e-3
CALLS = AGREEMENTS + OF_BATCH
"""Calls of a load with one batch."""
MACHINE = Machine(page_cache=100.0, bus=40.0, nvlink=200.0, network=20.0, memory=2000.0, gpus_per_host=2)
RATES = ("page_cache", "bus", "nvlink", "network", "memory", "reader", "host_bus", "disk")
WORLDS = [1, 2, 4, 8, 64, 256, 1024]
REAL = Machine(page_cache=94e9, bus=52e9, nvlink=359e9, network=50e9, memory=3e12, reader=66e9, latency=5e-5)


@pytest.fixture(autouse=True)
def small_tensors_are_divided(monkeypatch, request):
    if "size" not in request.fixturenames:
        monkeypatch.setattr(cost, "LEAST_DIVIDED", 1)


def moved(prediction, link):
    return [rank.moved[link] for rank in prediction.ranks]


def seconds(prediction):
    return {stage.name: stage.seconds for stage in prediction.stages}


def bytes_of(tensors):
    return sum(tensor.n_bytes for tensor in tensors)


def test_one_rank_is_bound_by_the_slower_of_file_and_bus():
    tensors = llama(n_layers=2)
    found, n_batches = plan(tensors, 1, llama_rules(LLAMA)), 2
    for page_cache, bus in ((1e9, 2e9), (2e9, 1e9)):
        machine = Machine(page_cache, bus, nvlink=1e9, network=1e9, memory=1e12, latency=LATENCY)
        prediction = predict(found, machine)
        assert prediction.overlapped_seconds == pytest.approx(
            bytes_of(tensors) / min(page_cache, bus) + (AGREEMENTS + n_batches * OF_BATCH) * LATENCY
        )
        assert prediction.bottleneck == ("page cache" if page_cache < bus else "bus")
        assert not any(sum(moved(prediction, f"{link} in")) for link in ("NVLink", "network"))


def test_rows_by_hand(monkeypatch):
    """40 rows of 4 bytes: 80 bytes for each of two ranks. Ranks of a host gather all, and keep their parts."""
    monkeypatch.setattr(spans, "ALIGNMENT", 4)
    (tensor,) = tensors_of({"w": ("F32", (40, 1))})
    found = plan([tensor], 2, [("w", Shard(0))])
    for gpus_per_host, sent in ((2, 80), (1, 0)):
        prediction = predict(found, replace(MACHINE, gpus_per_host=gpus_per_host, host_bus=80.0))
        assert moved(prediction, "file") == moved(prediction, "bus") == [80, 80]
        assert moved(prediction, "NVLink in") == moved(prediction, "NVLink out") == [sent, sent]
        assert moved(prediction, "network out") == [0, 0]
        assert moved(prediction, "memory") == [80 + 20 * 2] * 2
        read = 80 * gpus_per_host / 100
        assert seconds(prediction) == {
            "read": read, "copy": 2.0, "exchange": sent / 200, "dequantize": 0.06, "wait": 0.0,
        }  # fmt: skip
        assert prediction.seconds == pytest.approx(2.0 + sent / 200 + 0.06)
        assert prediction.overlapped_seconds == 2.0
        assert prediction.bottleneck == "bus"
    compressed = predict(found, MACHINE, value_bytes=0)
    assert seconds(compressed)["dequantize"] == 0.0


def test_columns_by_hand(monkeypatch):
    """A lone host gathers all. Of several, the ranks of each read two of four rows, and swap half of what they read."""
    monkeypatch.setattr(spans, "ALIGNMENT", 4)
    (tensor,) = tensors_of({"w": ("F32", (4, 10))})
    found = plan([tensor], 2, [("w", Shard(-1))])
    prediction = predict(found, replace(MACHINE, disk=40.0))
    assert moved(prediction, "file") == moved(prediction, "bus") == [80, 80]
    assert moved(prediction, "NVLink in") == moved(prediction, "NVLink out") == [80, 80]
    assert prediction.distinct_bytes == (160,)
    assert prediction.stages[0].seconds == 4.0
    assert prediction.bottleneck == "disk"
    apart = predict(found, replace(MACHINE, gpus_per_host=1))
    assert moved(apart, "file") == moved(apart, "bus") == [160, 160]
    assert moved(apart, "network out") == [0, 0]
    four = predict(plan([tensor], 4, [("w", Shard(-1, unit=2))]), MACHINE)
    assert moved(four, "file") == [80] * 4
    assert sorted(moved(four, "NVLink in")) == [16, 16, 16, 32], "a rank of two columns receives two rows of them"
    assert four.distinct_bytes == (160, 160)


def test_a_whole_tensor_by_hand(monkeypatch):
    """Each of four ranks on two hosts reads a quarter. In the ring, each then receives three quarters."""
    monkeypatch.setattr(spans, "ALIGNMENT", 8)
    (tensor,) = tensors_of({"w": ("F32", (40, 1))})
    found = plan([tensor], 4, [("w", Replicate())])
    prediction = predict(found, replace(MACHINE, latency=0.25))
    assert moved(prediction, "file") == moved(prediction, "bus") == [40] * 4
    assert moved(prediction, "NVLink in") == [0, 120, 0, 120]
    assert moved(prediction, "NVLink out") == [120, 0, 120, 0]
    assert moved(prediction, "network in") == [120, 0, 120, 0]
    assert moved(prediction, "network out") == [0, 120, 0, 120]
    expected = {
        "read": 0.8,
        "copy": 1.0,
        "exchange": 6.0,
        "dequantize": (160 + 80) / 2000,
        "wait": (CALLS + 1) * 0.25,
    }
    assert seconds(prediction) == pytest.approx(expected)
    assert prediction.seconds == pytest.approx(sum(expected.values()) - expected["read"])
    assert prediction.overlapped_seconds == pytest.approx(6.0 + (CALLS + 1) * 0.25)
    assert prediction.bottleneck == "network"
    one_host = predict(found, replace(MACHINE, gpus_per_host=4))
    assert moved(one_host, "NVLink in") == [120] * 4
    assert seconds(one_host)["exchange"] == 120 / 200


def test_one_host_reads_for_the_others():
    """Ranks 2 and 3 have no file: ranks 0 and 1 read and send what they hold, a whole tensor entirely, in one call."""
    tensors = tensors_of({"w": ("F32", (40, 1)), "b": ("F32", (10,))})
    prediction = predict(plan(tensors, 4, [("w", Shard(0))]), MACHINE, files="one host")
    assert moved(prediction, "file") == moved(prediction, "bus") == [40 + 20 + 40 + 40] * 2 + [0, 0]
    assert moved(prediction, "network out") == [80, 80, 0, 0]
    assert moved(prediction, "network in") == [0, 0, 80, 80]
    assert moved(prediction, "NVLink in") == [20, 20, 0, 0]
    assert prediction.distinct_bytes == (200, 0)
    assert seconds(prediction)["exchange"] == 160 / 20
    late = predict(plan(tensors, 4, [("w", Shard(0))]), replace(MACHINE, latency=1.0), files="one host")
    ring, send = 1, 1
    assert [rank.stages[-1].seconds for rank in late.ranks] == [
        CALLS + BROADCAST + calls for calls in (ring + send, ring + send, send, send)
    ]


@pytest.mark.parametrize(("size", "calls"), [(LEAST_DIVIDED - 4, 0), (LEAST_DIVIDED, 1)])
def test_small_whole_tensors_are_read_by_each_rank(size, calls):
    tensors = tensors_of({"w": ("F32", (size // 4,))})
    prediction = predict(plan(tensors, 2, []), replace(MACHINE, latency=1.0))
    assert moved(prediction, "file") == [size // (1 + calls)] * 2
    assert [rank.stages[-1].seconds for rank in prediction.ranks] == [CALLS + calls] * 2


def test_large_exchanges_have_several_batches(monkeypatch):
    """Each of five tensors needs 40 bytes when it is gathered, and 40 for itself: two fit into a batch."""
    monkeypatch.setattr(spans, "ALIGNMENT", 4)
    monkeypatch.setattr(routes, "BATCH_BYTES", 230)
    tensors = tensors_of({f"w{number}": ("F32", (10,)) for number in range(5)})
    prediction = predict(plan(tensors, 2, []), replace(MACHINE, latency=1.0))
    assert [rank.stages[-1].seconds for rank in prediction.ranks] == [AGREEMENTS + 3 * (OF_BATCH + 1)] * 2


def test_empty_parts_are_not_sent():
    """Ranks 2 and 3 get no row, and there is an empty tensor."""
    tensors = tensors_of({"w": ("F32", (2, 1)), "b": ("F32", (0,))})
    found = plan(tensors, 4, [("w", Shard(0))])
    for files, broadcast in (("every host", 0), ("one host", BROADCAST)):
        prediction = predict(found, replace(MACHINE, latency=1.0), files=files)
        assert [rank.stages[-1].seconds for rank in prediction.ranks] == [CALLS + broadcast] * 4


def test_stages_of_a_pipeline_gather_among_themselves():
    tensors = tensors_of({f"blk.{layer}.w": ("F32", (10, 1)) for layer in range(2)})
    prediction = predict(plan(tensors, 4, [], stages=2), MACHINE)
    assert moved(prediction, "file") == [20] * 4
    assert moved(prediction, "NVLink in") == [20] * 4
    assert moved(prediction, "network in") == [0] * 4


def test_what_a_host_shares():
    """Two loads of a file of their own share the page cache, and the bus of the host."""
    tensors = [tensors_of({name: ("F32", (40, 1))}) for name in "ab"]
    ranks = tuple(RankPlan(rank, 0, {each.name: Part(each)}) for rank, (each,) in enumerate(tensors))
    alone, both = (predict(Plan(ranks[:count], ()), replace(MACHINE, host_bus=50.0)) for count in (1, 2))
    assert seconds(alone)["read"] == 1.6
    assert seconds(both)["read"] == 3.2
    assert [stage.bottleneck for stage in both.stages[:2]] == ["page cache", "bus of the host"]
    assert seconds(both)["copy"] == 320 / 50
    assert not any(moved(both, "NVLink in"))
    slow_reader = predict(Plan(ranks, ()), replace(MACHINE, reader=10.0))
    assert slow_reader.stages[0].seconds == 16.0
    assert slow_reader.bottleneck == "reader"


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_of_a_plan(world):
    tensors = llama(n_layers=4)
    found = plan(tensors, world, llama_rules(LLAMA))
    prediction = predict(found, REAL)
    whole = sum(tensor.n_bytes for tensor in tensors if found.ranks[0].parts[tensor.name].dim is None)
    held = sum(rank.n_bytes for rank in found.ranks)
    # Each host reads the rows of columns once, and perhaps some ranks of it hold none of these columns.
    assert sum(moved(prediction, "bus")) >= held - (world - 1) * whole
    if world <= 8:
        assert sum(moved(prediction, "bus")) == held - (world - 1) * whole
    for link in ("NVLink", "network"):
        assert sum(moved(prediction, f"{link} in")) == sum(moved(prediction, f"{link} out"))
    assert len(prediction.ranks) == world
    assert [rank.host for rank in prediction.ranks] == [rank // 8 for rank in range(world)]
    assert all(bytes_of_host <= bytes_of(tensors) for bytes_of_host in prediction.distinct_bytes)
    assert 0 < prediction.overlapped_seconds <= prediction.seconds < math.inf


@pytest.mark.parametrize("world", WORLDS)
def test_a_replicated_load_reads_each_byte_once(world):
    tensors = llama(n_layers=1)
    prediction = predict(plan(tensors, world, []), REAL)
    for link in ("file", "bus"):
        assert sum(moved(prediction, link)) == bytes_of(tensors)
    assert sum(prediction.distinct_bytes) == bytes_of(tensors)
    received = [rank.moved["NVLink in"] + rank.moved["network in"] for rank in prediction.ranks]
    padding = world * sum(tensor.format.type_size for tensor in tensors)  # the pieces of a tensor are equal
    assert all(0 <= each - bytes_of(tensors) * (world - 1) / world < padding for each in received)


@pytest.mark.parametrize("files", ["every host", "one host"])
@pytest.mark.parametrize("rules", [llama_rules(LLAMA), []], ids=["sharded", "replicated"])
@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_more_bandwidth_is_never_slower(world, rules, files):
    found = plan(llama(n_layers=1), world, rules)
    for slowest in RATES:
        slow = replace(REAL, **{slowest: 1e8})
        before = predict(found, slow, files=files)
        for rate in RATES:
            after = predict(found, replace(slow, **{rate: 2 * getattr(slow, rate)}), files=files)
            assert after.seconds <= before.seconds
            assert after.overlapped_seconds <= before.overlapped_seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bus": 0}, r"bus is 0, but must be a number, more than 0"),
        ({"bus": math.nan}, r"bus is nan, but must be a number, more than 0"),
        ({"nvlink": "fast"}, r"nvlink is 'fast', but must be a number"),
        ({"gpus_per_host": 1.5}, r"gpus_per_host is 1\.5, but must be a whole number, more than 0"),
        ({"latency": -1.0}, r"latency is -1\.0, but must be a number, 0 or more, and finite"),
        ({"latency": math.inf}, r"latency is inf, but must be a number, 0 or more, and finite"),
    ],
)
def test_wrong_machines(arguments, message):
    with pytest.raises(nd.OptionError, match=message):
        replace(MACHINE, **arguments)


def test_wrong_arguments():
    found = plan(tensors_of({"w": ("F32", (4, 8))}), 2, [])
    with pytest.raises(nd.OptionError, match="but must be a Plan with one rank or more"):
        predict(found.ranks, MACHINE)
    with pytest.raises(nd.OptionError, match="but must be a Plan with one rank or more"):
        predict(Plan((), ()), MACHINE)
    with pytest.raises(nd.OptionError, match="machine is 8, but must be a Machine"):
        predict(found, 8)
    with pytest.raises(nd.OptionError, match="files is 'nowhere'; pass 'every host' or 'one host'"):
        predict(found, MACHINE, files="nowhere")
    with pytest.raises(nd.OptionError, match="value_bytes is -1, but must be a whole number, 0 or more"):
        predict(found, MACHINE, value_bytes=-1)
