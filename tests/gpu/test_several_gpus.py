"""One process loads a model to several GPUs, and to GPUs and the CPU."""

import threading

import parts
import pytest
import random_plans
from blocks import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import assert_parts, planned

import numba_dequant as nd
from numba_dequant.backends.gpu import gpu_at, n_devices
from numba_dequant.loading import gpu_loader
from numba_dequant.parallel import plan, routes

pytestmark = pytest.mark.gpu

DEVICES = [
    ["cuda:0"],
    ["cuda:0", "cuda:0"],
    ["cuda:0", "cpu"],
    ["cpu", "cuda:0", "reference"],
    ["cuda:0", "cuda:1"],
    ["cuda:1", "cpu", "cuda:0", "cuda:1"],
]


@pytest.fixture
def path(tmp_path):
    return parts.write(tmp_path / "model.gguf")


@pytest.fixture(params=["one batch", "many batches"])
def batches(request, monkeypatch):
    monkeypatch.setattr(routes, "LEAST_DIVIDED", 100)
    if request.param == "many batches":
        monkeypatch.setattr(routes, "BATCH_BYTES", 3000)


@pytest.fixture(params=DEVICES, ids=",".join)
def devices(request):
    if "cuda:1" in request.param and n_devices() < 2:
        pytest.skip("needs two GPUs")
    return request.param


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("kept", [False, True])
def test_each_device_has_its_parts(path, devices, kept):
    for _ in range(3):  # the second load finds memory that the first one has freed
        found = nd.load(path, device=devices, plan=planned(len(devices)), keep_quantized=kept)
        assert_parts(path, found, planned(len(devices)), blocks=kept)
    for place, of_device in zip(devices, found, strict=True):
        arrays = [each.data if isinstance(each, nd.QuantizedTensor) else each for each in of_device.values()]
        assert all((getattr(each, "device", "cpu") == int(place[5:])) for each in arrays if place.startswith("cuda"))


@pytest.mark.usefixtures("batches")
def test_replicated(path, devices):
    def whole(model):
        return plan(model.tensors.values(), len(devices), [])

    assert_parts(path, nd.load(path, device=devices, plan=whole), whole)


@pytest.mark.usefixtures("batches")
def test_stream(path, devices):
    with nd.open(path) as model:
        found = [{} for _ in devices]
        for name, of_devices in model.stream(device=devices, plan=planned(len(devices))):
            for of_device, part in zip(found, of_devices, strict=True):
                of_device[name] = part
    assert_parts(path, found, planned(len(devices)))


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plan(tmp_path_factory, data):
    with nd.open(random_plans.write(tmp_path_factory.mktemp("several") / "model.gguf")) as model:
        plan_of_model, hosts, least, batch_bytes = data.draw(random_plans.cases(model.tensors))
        devices = [f"cuda:{number % n_devices()}" for number in range(len(hosts))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routes, "LEAST_DIVIDED", least)
            patch.setattr(routes, "BATCH_BYTES", batch_bytes)
            found = model.load_all(device=devices, plan=plan_of_model, keep_quantized=True)
        for of_device, rank in zip(found, plan_of_model.ranks, strict=True):
            assert of_device.keys() == rank.parts.keys()
            for name, part in rank.parts.items():
                if isinstance(of_device[name], nd.QuantizedTensor):
                    assert_same_bits(of_device[name].data.copy_to_host(), random_plans.expected(model, part))


def test_an_error_of_one_device_ends_the_load(path, monkeypatch):
    """Nothing waits, no thread is left, and the next load works."""
    load, devices, loads = gpu_loader.load_groups, ["cuda:0"] * 3, []

    def fail(requests, *arguments):
        groups = load(requests, *arguments)
        loads.append(groups)
        if len(loads) == 2:
            finish = groups.finish

            def failing():
                finish()
                raise nd.ReadError("model.gguf", "a", 0, "the disk has failed", 5)

            groups.finish = failing
        return groups

    with nd.open(path) as model:
        monkeypatch.setattr(gpu_loader, "load_groups", fail)
        with pytest.raises(nd.ReadError, match="the disk has failed"):
            model.load_all(device=devices, plan=planned(3))
        monkeypatch.undo()
        assert not [each for each in threading.enumerate() if each.name.startswith("numba_dequant load")]
        assert_parts(path, model.load_all(device=devices, plan=planned(3)), planned(3))
    with gpu_at(0).active() as device:
        device.sync()
