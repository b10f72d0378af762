"""One process loads a model to several devices."""

import parts
import pytest
from blocks import random_blocks, write_model
from parts import assert_parts, planned

import numba_dequant as nd
from numba_dequant.loading import chunks, devices, files
from numba_dequant.loading.groups import GroupsOfGenerator
from numba_dequant.parallel import Part, Plan, RankPlan, Shard, plan, routes


@pytest.fixture
def path(tmp_path):
    return parts.write(tmp_path / "model.gguf")


@pytest.fixture(params=["one batch", "many batches"], autouse=True)
def batches(request, monkeypatch):
    monkeypatch.setattr(routes, "LEAST_DIVIDED", 100)
    if request.param == "many batches":
        monkeypatch.setattr(routes, "BATCH_BYTES", 3000)


@pytest.mark.parametrize("names", [["cpu"], ["cpu", "cpu"], ("reference", "cpu", "cpu"), ["cpu"] * 4])
def test_each_device_has_its_parts(path, names):
    assert_parts(path, nd.load(path, device=names, plan=planned(len(names))), planned(len(names)))


def test_blocks_stay_compressed(path):
    found = nd.load(path, device=["cpu", "cpu"], plan=planned(2), keep_quantized=True)
    assert_parts(path, found, planned(2), blocks=True)


def test_output_types(path):
    found = nd.load(path, dtype={"*norm": "float32", "*": "bfloat16"}, device=["cpu", "cpu"], plan=planned(2))
    assert {values.dtype.name for each in found for name, values in each.items() if "norm" in name} == {"float32"}
    assert {values.dtype.name for each in found for name, values in each.items() if "rows" in name} == {"bfloat16"}


def test_stages(path):
    found = nd.load(path, device=["cpu"] * 4, plan=planned(4, 2))
    assert "blk.1.norm" not in found[0]
    assert_parts(path, found, planned(4, 2))


def test_a_plan_by_hand(path):
    """One device holds what another one divides, and a part that overlaps."""

    def by_hand(model):
        rows, columns = model.tensors["blk.0.rows"], model.tensors["blk.0.columns"]
        ranks = (
            RankPlan(0, 0, {"blk.0.rows": Part(rows), "blk.0.columns": Part(columns, 1, 0, 768)}),
            RankPlan(1, 0, {"blk.0.rows": Part(rows, 0, 2, 5), "blk.0.columns": Part(columns, 1, 512, 1280)}),
            RankPlan(2, 0, {"blk.0.rows": Part(rows), "blk.0.columns": Part(columns, 1, 1280, 1280)}),
        )
        return Plan(ranks, ())

    assert_parts(path, nd.load(path, device=["cpu"] * 3, plan=by_hand), by_hand)


def test_each_byte_is_read_once(path, monkeypatch):
    reads = []
    read_into = files.read_into

    def counted(file, buffer, offset):
        reads.append((offset, buffer.nbytes))
        return read_into(file, buffer, offset)

    with nd.open(path) as model:
        monkeypatch.setattr(files, "read_into", counted)
        monkeypatch.setattr(chunks, "MAX_GAP", 0)
        model.load_all(device=["cpu", "cpu"], plan=plan(model.tensors.values(), 2, []))
        wanted = [each for each in model.tensors.values() if each.n_bytes >= routes.LEAST_DIVIDED]
        for tensor in wanted:
            first, last = tensor.offset, tensor.offset + tensor.n_bytes
            inside = sum(max(min(at + size, last) - max(at, first), 0) for at, size in reads)
            assert inside == tensor.n_bytes, tensor.name


def test_stream(path):
    with nd.open(path) as model:
        found = [{}, {}]
        for name, of_devices in model.stream(device=["cpu", "cpu"], plan=planned(2, 2)):
            for of_device, part in zip(found, of_devices, strict=True):
                if part is not None:
                    of_device[name] = part
    assert_parts(path, found, planned(2, 2))


@pytest.mark.parametrize("options", [{"stages": 2}, {"rules": [("*", Shard(0))]}, {"rules": []}])
def test_a_stream_does_not_read_the_whole_model(path, monkeypatch, options):
    """It did, if no tensor was exchanged."""
    monkeypatch.setattr(devices, "STREAM_BYTES", 1)
    read = []
    really = GroupsOfGenerator._read

    def counted(groups, size):
        read.extend(found := really(groups, size))
        return found

    monkeypatch.setattr(GroupsOfGenerator, "_read", counted)
    rules = options.pop("rules", [])
    with nd.open(path) as model:
        found = model.stream(
            device=["cpu", "cpu"], plan=lambda model: plan(model.tensors.values(), 2, rules, **options), prefetch=1
        )
        next(found)
        found.close()
        assert 0 < len(read) < len(model.tensors)


def test_a_stream_may_end_early(path):
    with nd.open(path) as model:
        results = model.stream(device=["cpu", "cpu"], plan=planned(2))
        assert next(results)[0] == "token_embd"
        results.close()


def test_progress(path):
    seen = []
    nd.load(path, device=["cpu", "cpu"], plan=planned(2), callback=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total


def test_an_error_of_the_callback_ends_the_load(path):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nd.load(path, device=["cpu", "cpu"], plan=planned(2), callback=stop)


def test_an_error_of_one_device_ends_the_load(path, monkeypatch):
    def fail(file, buffer, offset):
        raise OSError(5, "Input/output error")

    with nd.open(path) as model:
        monkeypatch.setattr(files, "read_into", fail)
        with pytest.raises(nd.ReadError, match="Input/output error"):
            model.load_all(device=["cpu", "cpu", "cpu"], plan=planned(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": ["cpu"]}, nd.OptionError, "device is a list, so plan must say which device holds what; pass plan"),
        ({"plan": planned(2)}, nd.OptionError, r"plan needs a list of devices, such as \['cuda:0', 'cuda:1'\], got"),
        ({"plan": planned(2), "device": []}, nd.OptionError, "plan needs a list of devices"),
        ({"plan": planned(2), "device": ["cpu"]}, nd.OptionError, "the plan is for 2 ranks, but there are 1 devices"),
        ({"plan": 2, "device": ["cpu"]}, nd.OptionError, "plan must be a Plan or a function that returns one"),
        ({"plan": lambda model: None, "device": ["cpu"]}, nd.OptionError, "plan must be a Plan or a function"),
        ({"plan": planned(1), "device": ["cpu"], "select": "*"}, nd.OptionError, "select cannot be combined with plan"),
        ({"plan": planned(1), "device": ["cpu"], "out": {}}, nd.OptionError, "out cannot be combined with plan"),
        ({"plan": planned(1), "device": ["cpu"], "stream": 0}, nd.OptionError, "stream cannot be combined with plan"),
        ({"plan": planned(1), "device": ["gpu"]}, nd.DeviceError, "unknown device 'gpu'"),
        ({"plan": planned(1), "device": ["cpu"], "threads": 0}, nd.OptionError, "threads must be"),
        ({"plan": planned(1), "device": ["cpu"], "keep_quantized": 1}, nd.OptionError, "keep_quantized must be"),
        ({"plan": planned(1), "device": ["cpu"], "dtype": "int8"}, nd.DtypeError, "int8"),
    ],
)
def test_wrong_arguments(path, options, error, message):
    with pytest.raises(error, match=message):
        nd.load(path, **options)


def test_a_plan_for_another_model(path, tmp_path):
    other = write_model(tmp_path / "other.gguf", {"blk.0.rows": ("Q8_0", (2, 32), random_blocks("Q8_0", 2))})
    with nd.open(other) as model:
        wrong = planned(2)(model)
    with pytest.raises(nd.OptionError, match=r"the plan is for another model: it has 'blk\.0\.rows' as Q8_0"):
        nd.load(path, device=["cpu", "cpu"], plan=wrong)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda tensor: Part(tensor, -1, 0, 256), "has no part of dimension -1"),
        (lambda tensor: Part(tensor, 2, 0, 1), "has no part of dimension 2"),
        (lambda tensor: Part(tensor, "0", 0, 1), "has no part of dimension 0"),
        (lambda tensor: Part(tensor, 0, -2, 1), "from -2 to 1"),
        (lambda tensor: Part(tensor, 0, 3, 1), "from 3 to 1"),
        (lambda tensor: Part(tensor, 0, 0, 7), "from 0 to 7"),
        (lambda tensor: Part(tensor, 1, 0, 100), "is not whole blocks of Q4_K"),
        (lambda tensor: tensor, "pass a Part of that tensor"),
    ],
)
def test_a_part_that_is_none(path, part, message):
    with nd.open(path) as model:
        rank = RankPlan(0, 0, {"blk.0.rows": part(model.tensors["blk.0.rows"])})
        with pytest.raises(nd.OptionError, match=message):
            model.load_all(device=["cpu"], plan=Plan((rank,), ()))
        rank = RankPlan(0, 0, {"another": Part(model.tensors["blk.0.rows"])})
        with pytest.raises(nd.OptionError, match="as the part of 'another'; pass a Part of that tensor"):
            model.load_all(device=["cpu"], plan=Plan((rank,), ()))


def test_a_stream_may_read_far_ahead(path):
    with nd.open(path) as model:
        assert len(list(model.stream(device=["cpu"], plan=planned(1), prefetch=2**62))) == len(model.tensors)
