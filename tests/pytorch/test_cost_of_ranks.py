"""The cost model counts what the loader for ranks really reads, copies, sends and receives."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blocks import random_blocks, write_model

import numba_dequant as nd
from numba_dequant.loading.groups import GroupsOfGenerator
from numba_dequant.loading.parts import PartReader
from numba_dequant.loading.requests import request_for
from numba_dequant.parallel import Machine, Part, Plan, RankPlan, cost, plan, predict, routes
from numba_dequant.parallel.cost import AGREEMENTS, BROADCAST, OF_BATCH
from numba_dequant.parallel.spans import places_of

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

import counted_ranks  # noqa: E402 it needs PyTorch
from counted_ranks import HOST, RULES  # noqa: E402
from test_ranks import start  # noqa: E402

from numba_dequant.torch import ranks  # noqa: E402

MACHINE = Machine(page_cache=1e9, bus=1e9, nvlink=1e9, network=1e9, memory=1e9, gpus_per_host=HOST, latency=1.0)
SHAPES = {
    "rows": ("Q8_0", (10, 64)), "columns": ("Q4_K", (6, 1024)), "stack": ("Q8_0", (3, 4, 32)),
    "whole": ("Q8_0", (5, 32)), "norm": ("Q8_0", (1, 32)), "empty": ("F32", (0,)),
}  # fmt: skip
WAYS = {"rows": ["rows", "stack"], "columns": ["columns"], "whole": ["whole", "norm", "empty"], "all": list(SHAPES)}


def write(path, names=SHAPES):
    """A file of random blocks."""
    found = {}
    for name in names:
        fmt, shape = SHAPES[name]
        found[name] = fmt, shape, random_blocks(fmt, nd.FORMATS[fmt].n_bytes(shape) // nd.FORMATS[fmt].type_size)
    return write_model(path, found)


def n_calls(rank):
    """The collectives, sends and receives of a rank: the latency is one second."""
    return rank.stages[-1].seconds


class Recorder:
    """A rank of a group that only counts what it would send and receive, by link."""

    def __init__(self, rank, count):
        self.rank, self.count, self.group, self.found = rank, count, None, Counter()

    def _count(self, other, way, n_bytes):
        link = "NVLink" if other // HOST == self.rank // HOST else "network"
        self.found[f"{link} {way}"] += n_bytes

    def swap(self, sent, received):
        self.found["calls"] += any(tensor.numel() for _, tensor in [*sent, *received])
        for way, tensors in (("out", sent), ("in", received)):
            for other, tensor in tensors:
                self._count(other, way, tensor.nbytes)

    def call(self, function, *arguments, group=None, **options):
        if function is torch.distributed.all_reduce:  # the first connection
            return
        self.found["calls"] += 1
        assert function is ranks.ALL_GATHER
        gathered, piece = (tensor.nbytes for tensor in arguments)
        assert gathered == piece * self.count
        self._count((self.rank + 1) % self.count, "out", gathered - piece)
        self._count((self.rank - 1) % self.count, "in", gathered - piece)


def counted(model, found, n_readers):
    """What each rank would read, copy, send and receive, by the loader; and the number of batches."""
    world = len(found.ranks)
    shares = routes.shares_of(found, model.tensors)
    hosts = [str(rank // HOST) if rank < n_readers else None for rank in range(world)]
    places, is_one_host = places_of(model.tensors.values()), len(set(hosts)) == 1
    taken = routes.Routes(shares, hosts, places=places, gathers_parts=is_one_host)
    for rank in range(world):
        recorder = Recorder(rank, world)
        exchange = ranks.Exchange(recorder, taken, torch.device("cpu"))

        def read(requests, on_bytes_read, recorder):
            for request in requests:
                recorder.found["file"] += request.tensor.n_bytes
                yield request.finished(np.zeros(request.tensor.n_bytes, np.uint8))

        def load(requests, on_bytes_read, ends, recorder=recorder):
            results = partial(read, requests, recorder=recorder)
            return GroupsOfGenerator(results, ends, on_bytes_read, has_thread=False)

        reader = PartReader(model.tensors, taken, rank, lambda part: request_for(part, None), load, load)
        for batch in range(taken.n_batches + 1):
            reader.begin()
            pieces = {each: torch.from_numpy(data) for each, data in reader.finish(batch)[1].items()}
            if batch < taken.n_batches:
                exchange.run(batch, pieces, exchange.memory(batch))
        reader.close()
        recorder.found["bus"] = recorder.found["file"]
        yield recorder.found, taken.n_batches


def assert_predicted(model, found, files):
    world = len(found.ranks)
    n_readers = world if files == "every host" else min(HOST, world)
    prediction = predict(found, MACHINE, files=files, value_bytes=0)
    agreements = AGREEMENTS + (BROADCAST if n_readers < world else 0)
    for rank, (counts, n_batches) in zip(prediction.ranks, counted(model, found, n_readers), strict=True):
        assert n_calls(rank) == counts.pop("calls", 0) + agreements + n_batches * OF_BATCH
        assert rank.moved == counts


@pytest.fixture(params=["one batch", "several batches"])
def model(tmp_path, monkeypatch, request):
    for module in (routes, cost):
        monkeypatch.setattr(module, "LEAST_DIVIDED", 100)
    if request.param == "several batches":
        monkeypatch.setattr(routes, "BATCH_BYTES", 2500)
    with nd.open(write(tmp_path / "model.gguf")) as model:
        yield model


@pytest.mark.parametrize("files", ["every host", "one host"])
@pytest.mark.parametrize(("world", "stages"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (6, 1), (6, 3)])
def test_bytes_and_calls_are_those_of_the_loader(model, world, stages, files):
    assert_predicted(model, plan(model.tensors.values(), world, RULES, stages=stages), files)


@pytest.mark.parametrize("files", ["every host", "one host"])
def test_a_plan_by_hand(model, files):
    """Ranks 0 and 2 hold a whole tensor, and ranks 1 and 3 some of its rows."""
    rows, whole = model.tensors["rows"], model.tensors["whole"]
    parts = [Part(rows), Part(rows, 0, 0, 4), Part(rows), Part(rows, 0, 4, 10)]
    ranks = [RankPlan(rank, 0, {"rows": part}) for rank, part in enumerate(parts)]
    ranks[3].parts["whole"] = Part(whole)
    assert_predicted(model, Plan(tuple(ranks), ()), files)


@pytest.mark.parametrize("world", [1, 3])
def test_big_endian_pieces_are_whole_blocks(model, world):
    tensors = {name: tensor._replace(byte_order="big") for name, tensor in model.tensors.items()}
    found = plan(tensors.values(), world, RULES)
    assert_predicted(SimpleNamespace(tensors=tensors), found, "every host")


@pytest.mark.long
def test_four_processes_move_what_is_predicted(tmp_path, monkeypatch):
    """Two hosts of two ranks: bytes of the file, bytes between ranks, and all collectives of `load_file`."""
    monkeypatch.setattr(cost, "LEAST_DIVIDED", 1)
    for way, names in WAYS.items():
        write(tmp_path / f"{way}.gguf", names)
    scenarios = [*WAYS, *(f"{way} missing" for way in WAYS)]
    outputs, codes = start(Path(counted_ranks.__file__), tmp_path, 4, *scenarios)
    assert codes == [0] * 4, outputs
    by_rank = [dict(json.loads(line) for line in out.splitlines() if line.startswith("[")) for out, _ in outputs]
    for scenario in scenarios:
        way, _, missing = scenario.partition(" ")
        with nd.open(tmp_path / f"{way}.gguf") as model:
            found = plan(model.tensors.values(), 4, RULES)
        prediction = predict(found, MACHINE, files="one host" if missing else "every host")
        for rank, counts in zip(prediction.ranks, by_rank, strict=True):
            moved = {link: rank.moved[link] for link in ("file", "bus")}
            moved |= {end: rank.moved[f"NVLink {end}"] + rank.moved[f"network {end}"] for end in ("in", "out")}
            expected = Counter(moved) | Counter(calls=int(n_calls(rank)))
            assert Counter(counts[scenario]) == expected, (scenario, rank.rank)
