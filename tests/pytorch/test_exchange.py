"""Any plan, any hosts: ranks that are threads read, exchange and hold exactly the bytes of their parts."""

import threading
from collections import defaultdict
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import random_plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_plans import cases, expected

import numba_dequant as nd
from numba_dequant.loading import host_loader
from numba_dequant.loading.parts import PartReader
from numba_dequant.loading.requests import request_for
from numba_dequant.parallel import Part, Plan, RankPlan, routes
from numba_dequant.parallel.spans import places_of

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

from numba_dequant.backends.devices import DeviceSpec  # noqa: E402
from numba_dequant.backends.host import HostBackend  # noqa: E402
from numba_dequant.torch.distributed import _digest  # noqa: E402
from numba_dequant.torch.ranks import ALL_GATHER, Exchange, _columns  # noqa: E402


class Threads:
    """A group whose ranks are threads. Two ranks exchange tensors in the order in which they send them."""

    def __init__(self, count):
        self.count, self.mail = count, defaultdict(Queue)
        self.lock, self.errors = threading.Lock(), []

    def box(self, source, target):
        with self.lock:
            return self.mail[source, target]

    def rank(self, number):
        return ThreadRank(self, number)


class ThreadRank:
    """What `Exchange` needs of `Ranks`."""

    def __init__(self, threads, rank):
        self.threads, self.rank, self.count, self.group = threads, rank, threads.count, None

    def swap(self, sent, received):
        for target, tensor in sent:
            if tensor.numel():
                self.threads.box(self.rank, target).put(tensor.clone())
        for source, tensor in received:
            if tensor.numel():
                tensor.copy_(self.threads.box(source, self.rank).get(timeout=20))

    def call(self, function, *arguments, group=None):
        if function is ALL_GATHER:
            gathered, piece = arguments
            everyone = [other for other in range(self.count) if other != self.rank]
            own = gathered.split(piece.numel())[self.rank]
            assert own.data_ptr() == piece.data_ptr()
            parts = gathered.split(piece.numel())
            self.swap([(other, piece) for other in everyone], [(other, parts[other]) for other in everyone])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with nd.open(random_plans.write(tmp_path_factory.mktemp("exchange") / "model.gguf")) as model:
        yield model


def load(requests, on_bytes_read, ends):
    return host_loader.load_groups(requests, HostBackend(DeviceSpec("cpu")), 1, on_bytes_read, ends)


def loaded(model, taken, rank):
    """What a rank holds after a load: name -> bytes."""
    found = {share.name: torch.empty(0, dtype=torch.uint8) for share in taken.shares[rank.rank] if not share.n_bytes}
    exchange = Exchange(rank, taken, torch.device("cpu"))
    reader = PartReader(model.tensors, taken, rank.rank, lambda part: request_for(part, None), load, load)
    try:
        for batch in range(taken.n_batches + 1):
            reader.begin()
            own, pieces = reader.finish(batch)
            found |= {name: torch.from_numpy(each.data) for name, each in own.items()}
            read = {each: torch.from_numpy(data) for each, data in pieces.items()}
            if batch < taken.n_batches:
                found |= exchange.run(batch, read, exchange.memory(batch))
            assert not read or batch < taken.n_batches
    finally:
        reader.close()
    return found


def assert_loaded(model, plan, hosts, least, batch_bytes, places=(), *, gathers_parts=False):
    """Each rank holds its parts, if small tensors are divided and batches are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "LEAST_DIVIDED", least)
        shares = routes.shares_of(plan, model.tensors)
        taken = routes.Routes(shares, hosts, batch_bytes, places, gathers_parts=gathers_parts)
        threads, found = Threads(len(hosts)), {}

        def run(number):
            try:
                found[number] = loaded(model, taken, threads.rank(number))
            except BaseException as error:
                threads.errors.append(error)

        workers = [threading.Thread(target=run, args=(number,)) for number in range(len(hosts))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not threads.errors
    for number, rank in enumerate(plan.ranks):
        assert found[number].keys() == rank.parts.keys()
        for name, part in rank.parts.items():
            held = found[number][name].reshape(-1)
            np.testing.assert_array_equal(held.numpy(), expected(model, part), f"rank {number}, {name}")


def test_columns_of_two_dimensions(model):
    """Their rows differ, so their ranks cannot divide the rows."""
    stack = model.tensors["c"]
    ranks = [RankPlan(0, 0, {"c": Part(stack, 1, 0, 1)}), RankPlan(1, 0, {"c": Part(stack, 2, 0, 32)})]
    assert_loaded(model, Plan(tuple(ranks), ()), ["one", "one"], 1, 1)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_rank_gets_its_bytes(model, data):
    case = data.draw(cases(model.tensors))
    assert_loaded(model, *case)
    for gathers_parts in (False, True):
        assert_loaded(model, *case, places_of(model.tensors.values()), gathers_parts=gathers_parts)


def test_a_column_of_one_byte_can_be_sent():
    share = routes.Share(0, "w", "I8", (9, 2), 1, 0, 1, 9, 18)
    found = _columns(torch.arange(18, dtype=torch.uint8), share)
    assert found.is_contiguous()
    assert found.tolist() == list(range(0, 18, 2))


def test_the_names_of_formats_are_part_of_the_digest_of_a_file(model):
    """Two ranks may have registered different formats under one id."""
    another = SimpleNamespace(name="Q9_9")
    tensors = dict(model.tensors)
    name, tensor = next(iter(tensors.items()))
    renamed = SimpleNamespace(tensors={**tensors, name: tensor._replace(format=another)})
    assert _digest(model) == _digest(SimpleNamespace(tensors=tensors)) != _digest(renamed)
