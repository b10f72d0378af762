"""Loading on several ranks: gloo on CPUs, two and four processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from finite_blocks import finite_blocks

import numba_dequant as nd

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

import ranks  # noqa: E402 it needs PyTorch

SUPPORT = Path(ranks.__file__)
SHAPES = {
    "token_embd.rows": ("Q8_0", (13, 64)), "blk.0.norm": ("F32", (7,)), "blk.0.a.rows": ("Q4_K", (6, 512)),
    "blk.0.b.columns": ("Q4_K", (5, 1280)), "blk.0.whole": ("Q6_K", (3, 256)), "blk.1.norm": ("F32", (64,)),
    "blk.1.c.experts": ("Q4_0", (4, 3, 64)), "blk.1.d.columns": ("Q8_0", (4, 2, 96)), "output.rows": ("F16", (9, 4)),
}  # fmt: skip


def write(path, seed=0, shapes=SHAPES):
    writer = gguf.GGUFWriter(path, "llama")
    for number, (name, (fmt, shape)) in enumerate(shapes.items()):
        n_rows = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        if nd.FORMATS[fmt].block_size > 1:
            data = finite_blocks(fmt, n_rows, shape[-1], seed + number).reshape(*shape[:-1], -1)
        else:
            data = np.random.default_rng(seed + number).standard_normal(shape).astype(f"f{nd.FORMATS[fmt].type_size}")
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[fmt])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write(folder / "model.gguf")
    write(folder / "even.gguf", shapes=SHAPES | {"blk.1.d.columns": ("Q8_0", (4, 2, 128))})
    write(folder / "other.gguf", shapes=SHAPES | {"blk.0.norm": ("F32", (8,))})
    whole = (folder / "model.gguf").read_bytes()
    (folder / "damaged.gguf").write_bytes(b"GGUF\xff" + whole[5:])
    return folder


def start(script, folder, world, *arguments, **variables):
    """Run a script on some ranks, with environment variables: what they print, and the exit codes."""
    group = folder / "group"
    group.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-W", "always::ResourceWarning", script]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([*command, str(rank), str(world), folder, *arguments], **streams) for rank in range(world)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    return outputs, [process.returncode for process in processes]


def run(folder, world, *scenarios, **variables):
    """For each scenario, what each rank found; the exit codes; and what they print as errors."""
    outputs, codes = start(SUPPORT, folder, world, *scenarios, **variables)
    found = {scenario: [] for scenario in scenarios}
    for out, _ in outputs:
        for scenario, result in map(json.loads, filter(lambda line: line.startswith("["), out.splitlines())):
            found[scenario].append(result)
    return found, codes, [error for _, error in outputs]


def expected_parts(folder, world, stages=1, *, blocks=False):
    """What each rank must find, cut out of the whole tensors."""
    with nd.open(folder / "model.gguf") as model:
        found = []
        for of_rank in ranks.planned(world, stages)(model).ranks:
            parts = {}
            for name, part in of_rank.parts.items():
                fmt, shape = part.tensor.format, part.tensor.shape
                if blocks and fmt.block_size > 1:
                    data = model.read(name).reshape(*shape[:-1], -1)
                    ends = part.start, part.stop
                    if part.dim == len(shape) - 1:
                        ends = (end // fmt.block_size * fmt.type_size for end in ends)
                else:
                    data, ends = model.load(name, "float32", device="reference"), (part.start, part.stop)
                if part.dim is not None:
                    data = np.take(data, np.arange(*ends), part.dim)
                parts[name] = torch.from_numpy(np.ascontiguousarray(data))
            found.append(ranks.described(parts))
    return found


@pytest.fixture(scope="module")
def two(folder):
    scenarios = (
        "values",
        "blocks",
        "stages",
        "missing",
        "empty",
        "memory file",
        "small",
        "batches",
        "dtensor",
        "dtensor uneven",
        "dtensor wrong",
        "dtype",
        "no plan",
        "not a plan",
        "nobody",
        "other",
        "damaged",
        "plan",
        "memory",
        "unreadable",
        "type",
        "header",
        "no room",
        "planner",
        "device",
        "flag",
        "silent",
        "nccl",
        "group",
        "wrong group",
        "other model",
        "linked",
        "linked blocks",
        "linked batches",
        "dtensor dimension",
        "dtensor list",
        "dtensor mesh",
    )
    found, codes, errors = run(folder, 2, *scenarios, "select", "dead")
    assert codes == [0, 3], errors
    assert not any("unclosed file" in error for error in errors), errors
    return found


def test_two_ranks_hold_their_parts(two, folder):
    assert two["values"] == expected_parts(folder, 2)
    assert two["blocks"] == expected_parts(folder, 2, blocks=True)
    assert two["stages"] == expected_parts(folder, 2, stages=2)
    assert two["linked"] == two["linked batches"] == two["values"]
    assert two["linked blocks"] == two["blocks"]
    assert two["memory file"] == two["small"] == two["batches"] == two["values"]
    with nd.open(folder / "model.gguf") as model:
        rows = model.load("blk.0.a.rows", "float32", device="reference")
    assert two["empty"][1]["blk.0.a.rows"] == ranks.described({"": torch.from_numpy(rows)})[""]
    assert two["empty"][0]["blk.0.a.rows"][0] == [0, 512], "rank 0 has the table of tokens"


def test_dtensors_are_the_whole_together(two, folder):
    with nd.open(folder / "even.gguf") as model:
        names = list(model.tensors)
        whole = {name: torch.from_numpy(model.load(name, "float32", device="reference")) for name in names}
    expected = ranks.described(whole)
    for found in two["dtensor"]:
        assert {name: each[1:] for name, each in found.items()} == expected
        assert found["blk.1.d.columns"][0] == "(Shard(dim=2),)"
        assert found["blk.1.c.experts"][0] == "(Shard(dim=0),)"
        assert found["blk.0.b.columns"][0] == found["blk.0.norm"][0] == "(Replicate(),)"


def test_four_ranks_hold_their_parts(folder):
    found, codes, errors = run(
        folder,
        4,
        "values",
        "blocks",
        "stages",
        "missing",
        "batches",
        "reversed",
        "pairs",
        "strangers",
        "linked",
        "linked stages",
    )
    assert codes == [0] * 4, errors
    assert found["linked"] == found["reversed"] == found["batches"] == found["values"]
    assert found["linked stages"] == found["stages"]
    assert found["values"] == found["missing"] == expected_parts(folder, 4)
    assert found["blocks"] == expected_parts(folder, 4, blocks=True)
    assert found["stages"] == expected_parts(folder, 4, stages=2)
    assert found["pairs"] == expected_parts(folder, 2, stages=2) * 2, "two groups, each with a model of its own"
    assert found["strangers"][:2] == found["pairs"][:2]
    assert all("group must be a process group to which this rank belongs" in each for each in found["strangers"][2:])


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "world"), [("gloo", 2), ("cpu:gloo,cuda:nccl", 2), ("nccl", 2), ("nccl", 4)])
def test_ranks_with_gpus_hold_their_parts(folder, backend, world):
    """Without NCCL, ranks may share a GPU."""
    if "nccl" in backend and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    scenarios = ["values", "blocks", "stages", "missing", "small", "batches", "reversed", "memory", "unreadable"]
    if backend != "gloo":
        scenarios.append("dtensor")
    variables = {"RANKS_DEVICE": "cuda", "RANKS_BACKEND": backend, "RANKS_TIMEOUT": "100"}
    found, codes, errors = run(folder, world, *scenarios, **variables)
    assert codes == [0] * world, errors
    for way in ("small", "batches", "reversed", "missing"):
        assert found[way] == found["values"], way
    assert found["values"] == expected_parts(folder, world)
    assert found["blocks"] == expected_parts(folder, world, blocks=True)
    assert found["stages"] == expected_parts(folder, world, stages=2)
    for way, error in (("memory", "MemoryError: no memory is left"), ("unreadable", "ReadError: model.gguf")):
        assert f"DeviceError: rank 1 could not load its part: {error}" in found[way][0]
        assert found[way][1].startswith(error)
    if "dtensor" in scenarios and world == 2:
        assert all("blk.1.d.columns" in each for each in found["dtensor"])


def test_a_rank_without_the_file_receives(two, folder):
    assert two["missing"] == expected_parts(folder, 2)


@pytest.mark.parametrize(
    ("scenario", "sentences"),
    [
        ("nobody", ["MissingFileError", "MissingFileError"]),
        ("other", ["the files of rank 0 and rank 1 differ; use the same file on both"] * 2),
        ("damaged", ["GgufError", "DeviceError: rank 0 could not begin its load: GgufError"]),
        (
            "plan",
            [
                "OptionError: the plan is for 3 ranks, but the group has 2; pass 2 as world",
                "DeviceError: rank 0 could not begin its load: OptionError: the plan is for 3 ranks",
            ],
        ),
        (
            "memory",
            [
                "DeviceError: rank 1 could not load its part: MemoryError: no memory is left",
                "MemoryError: no memory is left",
            ],
        ),
        (
            "unreadable",
            ["DeviceError: rank 1 could not load its part: ReadError: model.gguf", "ReadError: model.gguf: tensor"],
        ),
        (
            "dtensor uneven",
            ["equally among 2 ranks, but a DTensor needs equal parts; pass plan instead of device_mesh"] * 2,
        ),
        ("dtensor wrong", ["OptionError: the placement of '*.rows' is 1; pass a Shard or a Replicate of torch"] * 2),
        (
            "dtensor dimension",
            ["ShapeError: 'blk.0.norm' of shape (7,) has no dimension 3; pass another dim in the placement for it"] * 2,
        ),
        (
            "dtensor list",
            [
                "DeviceError: rank 1 could not use its arguments: OptionError: placements must be a mapping",
                "OptionError: placements must be a mapping, glob -> Shard or Replicate, got [",
            ],
        ),
        ("dtensor mesh", ["OptionError: device_mesh must be a DeviceMesh of one dimension, got 2"] * 2),
        ("type", ["DeviceError: rank 1 could not load its part: TypeError", "TypeError"]),
        (
            "header",
            [
                "DeviceError: rank 1 could not begin its load: OSError: the disk has failed",
                "OSError: the disk has failed",
            ],
        ),
        (
            "no room",
            [
                "DeviceError: rank 1 could not load its part: RuntimeError: no memory is left",
                "RuntimeError: no memory is left",
            ],
        ),
        (
            "planner",
            [
                "DeviceError: rank 1 could not begin its load: FileNotFoundError: [Errno 2]",
                "FileNotFoundError: [Errno 2]",
            ],
        ),
        (
            "device",
            [
                "DeviceError: rank 1 could not begin its load: DeviceError: device 'gpu' cannot be used",
                "DeviceError: device 'gpu' cannot be used: RuntimeError",
            ],
        ),
        (
            "flag",
            [
                "DeviceError: rank 1 could not begin its load: OptionError: keep_quantized must be",
                "OptionError: keep_quantized must be True or False, got 'no'",
            ],
        ),
        ("silent", [f"DeviceError: rank {rank} of 2 cannot communicate with the other" for rank in range(2)]),
        ("nccl", [f"DeviceError: rank {rank} can use no GPU, but the backend nccl needs one; m" for rank in range(2)]),
        ("group", ["OptionError: group is passed without plan, so nothing says which rank holds what; pass plan"] * 2),
        ("wrong group", ["OptionError: group must be a process group to which this rank belongs, got 'gloo'"] * 2),
        (
            "other model",
            ["OptionError: the plan is for another model: it has 'blk.0.norm' as F32 of shape (8,); make it with"] * 2,
        ),
        ("dtype", ["DeviceError: rank 1 could not begin its load: DtypeError", "DtypeError"]),
        ("no plan", ["OptionError: plan must be a Plan or a function that returns one for a model, got {}"] * 2),
        (
            "not a plan",
            ["OptionError: the function that was passed as plan returned None, but must return a Plan"] * 2,
        ),
        ("select", ["OptionError: select cannot be combined with plan"] * 2),
        ("dead", ["DeviceError: rank 0 of 2 cannot communicate with the other ranks"]),
    ],
)
def test_a_fault_is_an_error_on_every_rank(two, scenario, sentences):
    assert len(two[scenario]) == len(sentences)
    for found, sentence in zip(two[scenario], sentences, strict=True):
        assert sentence in found


def test_divided_layers_compute_what_one_does(tmp_path):
    """Forward, gradients and compiled, with 768 inner elements in three units of 256."""
    outputs, codes = start(SUPPORT.with_name("parallel_layers.py"), tmp_path, 2)
    assert codes == [0, 0], outputs
    for rank, (out, errors) in enumerate(outputs):
        assert "FutureWarning" not in errors
        found = json.loads(out.splitlines()[-1])
        units = 2 - rank
        assert found["Q4_K"][0] == [[256 * units, 144], [40, 210 * units], rank == 1]
        assert found["Q8_0"][0] == [[256 * units, 272], [40, 144 * units], True]
        for name in ("Q4_K", "Q8_0"):
            assert max(found[name][1:]) < 1e-5
        assert max(found["alone"]) < 1e-5
        assert found["errors"] == [
            "this style is for a QuantizedLinear, but the layer is a Linear; use a style of PyTorch",
            "256 inputs (Q4_K has blocks of 256), in units of 256, are too few for 2 ranks; use fewer ranks",
        ]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_divided_layers_on_two_gpus_compute_what_one_does(tmp_path, backend):
    """Forward, gradients and compiled by Inductor, in FP16."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    variables = {"RANKS_DEVICE": "cuda", "RANKS_BACKEND": backend, "RANKS_COMPILER": "inductor"}
    outputs, codes = start(SUPPORT.with_name("parallel_layers.py"), tmp_path, 2, **variables)
    assert codes == [0, 0], outputs
    for out, _ in outputs:
        found = json.loads(out.splitlines()[-1])
        for name in ("Q4_K", "Q8_0"):
            assert max(found[name][1:]) < 2e-3
        assert max(found["alone"]) < 2e-3


@pytest.mark.parametrize(("style", "flag"), [("Colwise", "gather_output"), ("Rowwise", "split_input")])
def test_wrong_arguments_of_styles(style, flag):
    from numba_dequant import torch as nt

    made = getattr(nt, f"Quantized{style}Parallel")
    for unit in (0, 1.5, True, "a"):
        with pytest.raises(nd.OptionError, match=rf"unit must be a whole number, 1 or more, got {unit!r}"):
            made(unit=unit)
    with pytest.raises(nd.OptionError, match=rf"{flag} must be True or False, got 'no'"):
        made(**{flag: "no"})


def test_the_page_runs(tmp_path):
    """All pieces of Python on the page, with one rank."""
    shapes = {"token_embd.weight": ("Q8_0", (4, 64)), "blk.0.ffn_up.weight": ("Q4_K", (512, 256))}
    write(tmp_path / "model.gguf", shapes=shapes | {"blk.0.ffn_down.weight": ("Q4_K", (256, 512))})
    page = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    code += "assert tensors['blk.0.ffn_down.weight'].shape == (256, 512)\n"
    code += "assert blocks['token_embd.weight'].shape == (4, 68)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | rank, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "rank 1, stage 0: 3 tensors" in found.stdout


def test_a_plan_needs_a_group(folder):
    from numba_dequant import torch as nt

    with pytest.raises(nd.OptionError, match=r"call torch\.distributed\.init_process_group first"):
        nt.load_file(folder / "model.gguf", plan=ranks.planned(2))


@pytest.mark.parametrize(
    ("backends", "device", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:1", "cpu"),
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", "cuda:1", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda"),
        ("xpu:xccl", "cpu", "xpu"),
    ],
)
def test_ranks_communicate_through_a_device_of_the_backend(monkeypatch, backends, device, expected):
    from numba_dequant.torch import ranks as routes

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert routes.device_of(None, torch.device(device)) == torch.device(expected)
