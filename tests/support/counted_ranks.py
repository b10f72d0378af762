"""One rank of a group of processes: `python counted_ranks.py <rank> <world> <folder> <scenario> ...`.

A scenario is the name of a file, and perhaps " missing", which means that only the first two ranks have the file. For
each scenario, it loads the file and prints a line of JSON with what `load_file` has read, sent and received.
"""

import json
import os
import sys
from collections import Counter
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from numba_dequant import torch as nt
from numba_dequant.parallel import Shard, plan, routes
from numba_dequant.torch import distributed, ranks

RULES = [("rows", Shard(0)), ("columns", Shard(-1)), ("stack", Shard(0))]
ALL_GATHER = ranks.ALL_GATHER.__name__
HOST = 2
"""Ranks of a host."""


def count_call(counts, function, arguments):
    """Count a collective, and its bytes as those of a ring. The bytes of objects are not counted."""
    name = function.__name__
    counts["calls"] += 1
    if name == ALL_GATHER:
        n_bytes = arguments[0].nbytes - arguments[1].nbytes
        counts["out"] += n_bytes
        counts["in"] += n_bytes
    elif name == "batch_isend_irecv":
        for transfer in arguments[0]:
            counts["out" if transfer.op is dist.isend else "in"] += transfer.tensor.nbytes


def watched(counts, patches):
    """Count what the functions of PyTorch and our reads move."""

    def wrapped(function):
        def call(*arguments, **options):
            count_call(counts, function, arguments)
            return function(*arguments, **options)

        return call

    patches.enter_context(mock.patch.object(ranks, "ALL_GATHER", wrapped(ranks.ALL_GATHER)))
    for name in ("all_gather", "all_reduce", "broadcast", "batch_isend_irecv"):
        replacement = wrapped(getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            patches.enter_context(mock.patch.object(module, name, replacement))

    def load(requests, *arguments, **options):
        counts["file"] += sum(request.tensor.n_bytes for request in requests)
        counts["bus"] = counts["file"]
        return really(requests, *arguments, **options)

    really = distributed.load_groups
    patches.enter_context(mock.patch.object(distributed, "load_groups", load))
    patches.enter_context(mock.patch.object(distributed, "_host", return_value=str(dist.get_rank() // HOST)))
    patches.enter_context(mock.patch.object(routes, "LEAST_DIVIDED", 1))


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world, timeout=timeout)
    for scenario in sys.argv[4:]:
        name, _, missing = scenario.partition(" ")
        path = folder / ("nothing.gguf" if missing and rank >= HOST else f"{name}.gguf")
        counts = Counter()
        with ExitStack() as patches:
            watched(counts, patches)
            nt.load_file(path, dtype=torch.float32, plan=lambda model: plan(model.tensors.values(), world, RULES))
        print(json.dumps([scenario, counts]), flush=True)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
