"""One rank of a group of processes: `python ranks.py <rank> <world> <folder> <scenario> ...`, for test_ranks.py.

It prints a line of JSON for each scenario.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import numba_dequant as nd
from numba_dequant import parallel
from numba_dequant import torch as nt
from numba_dequant.backends.nvlink import Links
from numba_dequant.loading.parts import PartReader
from numba_dequant.parallel import plan, routes
from numba_dequant.torch import distributed
from numba_dequant.torch.ranks import Exchange

RULES = [("*.rows", parallel.Shard(0)), ("*.columns", parallel.Shard(-1)), ("*.experts", parallel.Shard(0))]

FAULTS = {
    "memory": (distributed, "dequantize_own", MemoryError("no memory is left")),
    "type": (distributed, "dequantize_own", TypeError()),
    "unreadable": (PartReader, "finish", nd.ReadError("model.gguf", "b.rows", 0, "the disk has failed", 5)),
    "header": (distributed, "_digest", OSError("the disk has failed")),
    "no room": (Exchange, "memory", RuntimeError("no memory is left\non this GPU")),
}
"""What fails on rank 1, and its error."""


def described(tensors):
    """Of each tensor: the shape, the dtype and its bytes as one number."""
    found = {}
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
        number = int(np.dot(data.astype(np.uint64), np.arange(1, data.size + 1, dtype=np.uint64)) % (1 << 53))
        found[name] = [list(tensor.shape), str(tensor.dtype), number]
    return found


def planned(world, stages=1):
    return lambda model: plan(model.tensors.values(), world, RULES, stages=stages)


def with_last_reversed(given):
    *others, last = given.ranks
    return replace(given, ranks=(*others, replace(last, parts=dict(reversed(last.parts.items())))))


def device_of(rank):
    """The device of a rank, by the variable RANKS_DEVICE: "cpu", or "cuda", of which several ranks may share one."""
    kind = os.environ.get("RANKS_DEVICE", "cpu")
    return kind if kind == "cpu" else f"{kind}:{rank % torch.cuda.device_count()}"


def load(rank, world, folder, scenario):  # noqa: PLR0912, PLR0915 one branch per scenario
    path, options = folder / "model.gguf", {"plan": planned(world), "device": device_of(rank)}
    if scenario in ("blocks", "linked blocks"):
        options["keep_quantized"] = True
    elif scenario in ("stages", "linked stages"):
        options["plan"] = planned(world, 2)
    elif scenario == "empty":  # one rank holds all
        options["plan"] = lambda model: plan(
            model.tensors.values(), world, [("*.rows", parallel.Shard(0, unit=13)), *RULES]
        )
    elif scenario == "reversed":  # made by hand: the last rank has its parts in another order
        options["plan"] = lambda model: with_last_reversed(planned(world)(model))
    elif scenario == "memory file":
        path = path.read_bytes()
    elif scenario == "no plan":
        options["plan"] = {}
    elif scenario == "not a plan":
        options["plan"] = lambda model: None
    elif scenario == "missing":  # the last rank has no file
        path = path if rank < world - 1 else folder / "nothing.gguf"
    elif scenario == "nobody":
        path = folder / "nothing.gguf"
    elif scenario == "other":
        path = path if rank else folder / "other.gguf"
    elif scenario == "damaged":
        path = path if rank else folder / "damaged.gguf"
    elif scenario == "plan":
        options["plan"] = planned(world + (rank == 0))
    elif scenario == "planner" and rank == 1:
        options["plan"] = lambda model: (folder / "rules.txt").read_text()
    elif scenario == "device" and rank == 1:
        options["device"] = "gpu"
    elif scenario == "flag" and rank == 1:
        options["keep_quantized"] = "no"
    elif scenario == "group":
        options = {"group": dist.group.WORLD}
    elif scenario == "wrong group":
        options["group"] = "gloo"
    elif scenario == "other model":
        options["plan"] = planned(world)(nd.open(folder / "other.gguf"))
    elif scenario == "dead" and rank == 1:
        os._exit(3)
    elif scenario == "cable" and rank == 2:  # all ranks are connected by now
        subprocess.run(["ip", "link", "set", os.environ["RANKS_CABLE"], "down"], check=True)
    elif scenario == "select":
        options["select"] = "*"
    dtype = torch.int8 if scenario == "dtype" and rank == 1 else torch.float32
    with ExitStack() as patches:
        # The tensors of this file are small.
        patches.enter_context(mock.patch.object(routes, "LEAST_DIVIDED", 1 << 20 if scenario == "small" else 1))
        if scenario.startswith("linked"):  # as if each rank had a GPU, all connected by NVLink
            links = Links(str(rank), frozenset(map(str, range(world))))
            patches.enter_context(mock.patch.object(distributed, "_links", return_value=links))
        if "batches" in scenario:
            patches.enter_context(mock.patch.object(routes, "BATCH_BYTES", 2000))
        elif scenario in FAULTS and rank == 1:
            owner, name, error = FAULTS[scenario]
            patches.enter_context(mock.patch.object(owner, name, side_effect=error))
        elif scenario == "silent":
            patches.enter_context(mock.patch.object(dist, "all_gather_object", side_effect=RuntimeError))
        elif scenario == "nccl":
            patches.enter_context(mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"))
            patches.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=False))
        return nt.load_file(path, dtype=dtype, **options)


def of_mesh(scenario, folder, mesh):
    """DTensors: of each its placement and the whole tensor."""
    placements = {"*.b.columns": Replicate(), "*.d.columns": [Shard(-1)], "*.experts": Shard(0), "*.c": Replicate()}
    if scenario == "dtensor uneven":
        placements = {"*.rows": Shard(0)}
    elif scenario == "dtensor wrong":
        placements = {"*.rows": 1}
    elif scenario == "dtensor dimension":
        placements = {"blk.0.norm": Shard(3)}
    elif scenario == "dtensor list":
        placements = [("*.rows", Shard(0))] if mesh.get_local_rank() else {}
    elif scenario == "dtensor mesh":
        mesh = mesh.size()
    shapes = Path(folder) / "even.gguf" if scenario == "dtensor" else Path(folder) / "model.gguf"
    found = nt.load_file(shapes, dtype=torch.float32, device_mesh=mesh, placements=placements)
    assert all(isinstance(tensor, DTensor) for tensor in found.values())
    whole = described({name: tensor.full_tensor() for name, tensor in found.items()})
    return {name: [str(tensor.placements), *whole[name]] for name, tensor in found.items()}


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    group = os.environ.get("RANKS_GROUP", f"file://{folder}/group")
    if device_of(rank) != "cpu":
        torch.cuda.set_device(device_of(rank))
    timeout = timedelta(seconds=int(os.environ.get("RANKS_TIMEOUT", "20")))
    backend = os.environ.get("RANKS_BACKEND", "gloo")
    dist.init_process_group(backend, init_method=group, rank=rank, world_size=world, timeout=timeout)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])] if world == 4 else []
    if world == 4 and rank in (0, 2):  # loads must not depend on how many groups a rank has
        dist.new_group([0, 2], use_local_synchronization=True)
    mesh = init_device_mesh(os.environ.get("RANKS_DEVICE", "cpu"), (world,))
    for scenario in sys.argv[4:]:
        try:
            if scenario.startswith("dtensor"):
                found = of_mesh(scenario, folder, mesh)
            elif scenario in ("pairs", "strangers"):
                path, group = folder / "model.gguf", pairs[rank // 2 if scenario == "pairs" else 0]
                found = described(nt.load_file(path, device_of(rank), torch.float32, plan=planned(2, 2), group=group))
            else:
                found = described(load(rank, world, folder, scenario))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(json.dumps([scenario, found]), flush=True)
    if "dead" not in sys.argv:
        dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
