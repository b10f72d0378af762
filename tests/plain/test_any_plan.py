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
