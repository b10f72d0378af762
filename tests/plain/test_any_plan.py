"""One process loads to several devices by any plan, also one made by hand."""

import numpy as np
import pytest
import random_plans
from blocks import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import numba_dequant as nd
from numba_dequant.parallel import routes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with nd.open(random_plans.write(tmp_path_factory.mktemp("several") / "model.gguf")) as model:
        yield model


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plan(model, data):
    found_plan, hosts, least, batch_bytes = data.draw(random_plans.cases(model.tensors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "LEAST_DIVIDED", least)
        patch.setattr(routes, "BATCH_BYTES", batch_bytes)
        found = model.load_all(device=["cpu"] * len(hosts), plan=found_plan, keep_quantized=True)
    for of_device, rank in zip(found, found_plan.ranks, strict=True):
        assert of_device.keys() == rank.parts.keys()
        for name, part in rank.parts.items():
            blocks, got = random_plans.expected(model, part), of_device[name]
            if isinstance(got, nd.QuantizedTensor):
                np.testing.assert_array_equal(got.data, blocks, f"{rank.rank}, {name}")
            else:
                expected = nd.dequantize(blocks, part.tensor.format, device="reference")
                assert_same_bits(np.ascontiguousarray(got).reshape(-1), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_no_rank_exchanges_is_read_last(model, data):
    """Unless batches limit the memory for all tensors: then they are in the order of the file."""
    plan, hosts, least, _ = data.draw(random_plans.cases(model.tensors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "LEAST_DIVIDED", least)
        patch.setattr(routes, "BATCH_BYTES", 700)
        shares = routes.shares_of(plan, model.tensors)
        taken, limited = routes.Routes(shares, hosts), routes.Routes(shares, hosts, 700)
        exchanged = {transfer.share.number for of_rank in taken.transfers for transfer in of_rank}
        numbers = {share.number for of_rank in shares for share in of_rank}
        for number in numbers:
            assert (taken.batch_of[number] < taken.n_batches) == (number in exchanged)
        assert {taken.batch_of[number] for number in exchanged} == set(range(taken.n_batches if exchanged else 0))
        assert limited.batch_of == sorted(limited.batch_of)
        assert max(limited.batch_of, default=0) < limited.n_batches
