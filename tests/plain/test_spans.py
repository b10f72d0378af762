"""Which tensors ranks read together, and which piece each of them reads."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from numba_dequant.backends.nvlink import Links, are_connected
from numba_dequant.parallel import Part, Plan, RankPlan, routes, spans
from numba_dequant.parallel.routes import Routes, shares_of
from numba_dequant.parallel.spans import Place, Span, places_of, runs, span_of

KIB = 1024


def tensor(path, offset, n_bytes, byte_order="little"):
    return SimpleNamespace(path=path, offset=offset, n_bytes=n_bytes, byte_order=byte_order)


def test_places_have_the_number_of_the_file_and_big_endian_tensors_have_none():
    tensors = [tensor("b", 64, 10), tensor("a", 32, 20), tensor("b", 96, 5, "big"), tensor("b", 128, 5)]
    assert places_of(tensors) == [Place(0, 64, 10), Place(1, 32, 20), None, Place(0, 128, 5)]


@pytest.mark.parametrize(
    ("place", "follows"),
    [
        (Place(0, 1000 + 3 * 8, 50), True),
        (Place(0, 1024 + 4064, 50), True),
        (Place(0, 1024 + 4096, 50), False),  # too far
        (Place(0, 1000, 50), False),  # their bytes overlap
        (Place(0, 1025, 50), False),  # the second would not be aligned
        (Place(1, 1024, 50), False),  # another file
        (None, False),
    ],
)
def test_runs_end_where_tensors_are_not_consecutive(place, follows):
    places = [Place(0, 0, 1000 + 8), place]
    assert runs(places, [0, 1], 0) == ([[0, 1]] if follows else [[0]] if place is None else [[0], [1]])


def test_runs_have_at_least_so_many_bytes():
    places = [Place(0, 0, 64), Place(0, 64, 64), Place(1, 0, 127), Place(1, 8192, 128)]
    assert runs(places, range(4), 128) == [[0, 1], [3]]
    assert runs(places, [1, 3], 128) == [[3]], "others are held by some ranks only"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_ranks_read_each_byte_once(count):
    places = [Place(0, 96, 4 * KIB), Place(0, 96 + 4 * KIB + 32, 555)]
    span = span_of(places, [0, 1], count)
    assert span.numbers == (0, 1)
    assert span.starts == (0, 4 * KIB + 32)
    assert span.n_bytes == 4 * KIB + 32 + 555
    assert span.piece % spans.ALIGNMENT == 0
    assert span.piece * count - span.n_bytes < spans.ALIGNMENT * count
    end = 0
    for rank in range(count):
        first, n_bytes = span.range_of(rank)
        assert first == min(rank * span.piece, span.n_bytes) == end
        assert n_bytes <= span.piece
        end += n_bytes
    assert end == span.n_bytes


def test_many_ranks_of_a_small_span_read_nothing():
    assert [Span((0,), (0,), 300, 256).range_of(rank) for rank in range(4)] == [(0, 256), (256, 44), (300, 0), (300, 0)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    from blocks import random_blocks, write_model

    import numba_dequant as nd

    monkeypatch.setattr(routes, "LEAST_DIVIDED", 64)
    monkeypatch.setattr(routes, "BATCH_BYTES", 4 * 8 * 34)
    tensors = {f"w{number}": ("Q8_0", (8, 32), random_blocks("Q8_0", 8)) for number in range(5)}
    with nd.open(write_model(tmp_path / "model.gguf", tensors)) as model:
        yield model


def routes_of(model, hosts, without=(), cut=(), **options):
    """Two ranks hold all tensors, but for some that only the first one holds, and some of which each holds half."""

    def part_of(rank, tensor):
        return Part(tensor, 0, 4 * rank, 4 * rank + 4) if tensor.name in cut else Part(tensor)

    ranks = tuple(
        RankPlan(
            rank,
            0,
            {name: part_of(rank, each) for name, each in model.tensors.items() if not (rank and name in without)},
        )
        for rank in range(2)
    )
    shares = shares_of(Plan(ranks, ()), model.tensors)
    return Routes(shares, hosts, places=places_of(model.tensors.values()), **options)


def test_what_all_ranks_hold_is_cut_where_batches_end(model):
    found = routes_of(model, ["one", "two"])
    assert [[span.numbers for span in of_batch] for of_batch in found.spans] == [[(0, 1)], [(2, 3)], [(4,)]]
    assert found.transfers == [[], []]
    assert list(found.direct(0)) == []


def test_a_large_tensor_that_only_some_ranks_hold_divides_a_run(model, monkeypatch):
    monkeypatch.setattr(spans, "MOST_PADDING", 32)
    found = routes_of(model, ["one", "one"], without=["w1"])
    assert [span.numbers for of_batch in found.spans for span in of_batch] == [(0,), (2,), (3, 4)]
    assert [share.name for share in found.direct(0)] == ["w1"]
    assert list(found.direct(1)) == []


def test_ranks_without_the_file_receive_tensors_one_by_one(model):
    found = routes_of(model, ["one", None])
    assert found.spans == [[]] * found.n_batches
    assert len(found.transfers[1]) == 5


def test_parts_are_gathered_only_if_links_are_fast(model, monkeypatch):
    monkeypatch.setattr(spans, "MOST_PADDING", 32)
    cut = ["w1", "w2"]
    apart = routes_of(model, ["one", "one"], cut=cut)
    assert [span.numbers for of_batch in apart.spans for span in of_batch] == [(0,), (3,), (4,)]
    assert [share.name for share in apart.direct(1)] == cut
    gathered = routes_of(model, ["one", "one"], cut=cut, gathers_parts=True)
    assert [number for of_batch in gathered.spans for span in of_batch for number in span.numbers] == [0, 1, 2, 3, 4]
    assert list(gathered.direct(1)) == gathered.transfers[1] == []


def test_what_one_rank_does_not_hold_is_not_gathered(model):
    found = routes_of(model, ["one", "one"], without=["w1"], cut=["w0"], gathers_parts=True)
    assert {number for of_batch in found.spans for span in of_batch for number in span.numbers} == {0, 2, 3, 4}


A, B, C = (Links(own, frozenset("abc") - {own}) for own in "abc")


@pytest.mark.parametrize(
    ("links", "connected"),
    [
        ([A, B], True),
        ([A, B, C], True),
        ([A, None], False),  # the driver does not say it
        ([A, A], False),  # two ranks share a GPU
        ([A, Links("b", frozenset("c"))], False),  # one of them cannot see the other
        ([A, B, Links("d", frozenset("ab"))], False),
    ],
)
def test_gpus_are_connected_if_each_is_linked_with_each(links, connected):
    assert are_connected(links) is connected


def test_the_last_batches_are_halved(monkeypatch):
    monkeypatch.setattr(routes, "LAST_BYTES", 4)
    needed = np.ones((40, 2), np.int64)
    sizes = [count for _, count in sorted(Counter(routes.batches(needed, 16)).items())]
    assert sizes == [16, 16, 4, 4]
    assert routes.batches(needed[:12], 16) == [0] * 6 + [1] * 4 + [2] * 2
    assert routes.batches(needed[:3], 3) == [0, 0, 0], "a limit below that of the last batch"
