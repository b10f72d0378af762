"""Measure loads by several GPUs of one host, each with a process of its own, and check their values.

python benchmarks/ranks.py [--gpus 2] [--rounds 7] [--small]     # writes results/ranks.json; needs the GPUs and 10 GB

The file is like Llama-3.1-8B with 56 layers in Q4_K_M, in the page cache. All values become FP16.

- alone: one process loads the whole file to its GPU with `nd.load`, while the others wait.
- together: each process does that at the same time.
- sharded: `load_file(plan=...)` by `llama_rules`.
- sharded, compressed: the same, but the blocks stay compressed.
- replicated: each rank holds the whole model, and the ranks exchange compressed pieces.
- one process: `nd.load(device=[...], plan=...)`, while the others wait.

A time is that from the first start to the last end, after a barrier. The ways take turns in each round, and the table
has the median of the rounds. With --small, a tiny file is loaded, to try the script.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import models
import torch
import torch.distributed as dist
from tables import described

import numba_dequant as nd
from numba_dequant import torch as nt
from numba_dequant.parallel import llama_rules, plan

RESULTS = Path(__file__).parent / "results" / "ranks.json"
METADATA = {"general.architecture": "llama", "llama.attention.key_length": 128}
LAYERS, SMALL = {"n_layers": 56}, {"n_layers": 2, "n_vocab": 4096}


def divided(model, world):
    return plan(model.tensors.values(), world, llama_rules(METADATA))


def replicated(model, world):
    return plan(model.tensors.values(), world, [])


def of_one_process(path, world, planner):
    return nd.load(path, device=[f"cuda:{index}" for index in range(world)], plan=planner)


def ways(path, rank, world):
    """Name -> (the ranks that take part, or all of them; what each does)."""
    device = f"cuda:{rank}"
    whole = partial(nd.load, path, device=device)
    sharded = partial(nt.load_file, path, device, torch.float16, plan=lambda model: divided(model, world))
    return {
        "alone": ([0], whole),
        "together": (None, whole),
        "sharded": (None, sharded),
        "sharded, compressed": (None, partial(sharded, keep_quantized=True)),
        "replicated": (
            None, partial(nt.load_file, path, device, torch.float16, plan=lambda model: replicated(model, world))
        ),
        "one process, sharded": ([0], partial(of_one_process, path, world, lambda model: divided(model, world))),
        "one process, replicated": ([0], partial(of_one_process, path, world, lambda model: replicated(model, world))),
    }  # fmt: skip


def synchronize(world):
    for index in range(world):
        torch.cuda.synchronize(index)


def bits(tensor):
    return tensor.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def part_of(whole, part):
    return whole if part.dim is None else whole.narrow(part.dim, part.start, part.stop - part.start)


def check(path, rank, world, way, load):
    """Compare what was loaded with parts of the whole tensors, bit by bit."""
    with nd.open(path) as model:
        planned = (replicated if "replicated" in way else divided)(model, world).ranks
    found = load()
    by_rank = dict(enumerate(found)) if isinstance(found, list) else {rank: found}
    whole = {}
    for owner, tensors in by_rank.items():
        device = torch.device("cuda", owner)
        whole = {name: torch.from_dlpack(each) for name, each in nd.load(path, device=f"cuda:{owner}").items()}
        assert list(tensors) == list(planned[owner].parts), way
        for name, tensor in tensors.items():
            expected = part_of(whole[name], planned[owner].parts[name]).contiguous()
            values = torch.from_dlpack(tensor)
            assert values.device == device
            assert torch.equal(bits(values), bits(expected)), (way, owner, name)


def measure(path, rank, world, rounds):
    """Way -> seconds of each round, on the first rank."""
    seconds = {}
    for number in range(-1, rounds):
        for way, (members, load) in ways(path, rank, world).items():
            dist.barrier()
            start = end = None
            if members is None or rank in members:
                start = time.perf_counter()
                kept = load()
                synchronize(world)
                end = time.perf_counter()
                del kept
            spans = [None] * world
            dist.all_gather_object(spans, (start, end))
            spans = [span for span in spans if span[0] is not None]
            if number >= 0:  # the first round allocates memory and makes connections
                seconds.setdefault(way, []).append(max(end for _, end in spans) - min(start for start, _ in spans))
            if number < 0 and (members is None or rank in members) and way not in ("alone", "together"):
                if "compressed" not in way:
                    check(path, rank, world, way, load)
                torch.cuda.empty_cache()
    return seconds


def of_rank(arguments):
    torch.cuda.set_device(arguments.rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{arguments.folder}/group",
        rank=arguments.rank,
        world_size=arguments.gpus,
        device_id=torch.device("cuda", arguments.rank),
    )
    path = arguments.folder / "model.gguf"
    found = measure(path, arguments.rank, arguments.gpus, arguments.rounds)
    if arguments.rank == 0:
        names = {torch.cuda.get_device_name(index) for index in range(arguments.gpus)}
        result = described(f"python benchmarks/ranks.py --gpus {arguments.gpus}", "cuda")
        result |= {"machine": f"{arguments.gpus} GPUs of one host, {' and '.join(names)}"}
        result |= {"file bytes": path.stat().st_size, "cores": len(os.sched_getaffinity(0)), "rounds": found}
        result["seconds"] = {
            f"{'two' if arguments.gpus == 2 else arguments.gpus} GPUs, {way}": statistics.median(each)
            for way, each in found.items()
        }
        (arguments.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        of_rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        changes = SMALL if arguments.small else LAYERS
        models.write(Path(folder) / "model.gguf", models.tensors("Llama-3.1-8B", "Q4_K_M", **changes), 128_256)
        command = [sys.executable, __file__, "--gpus", str(arguments.gpus), "--rounds", str(arguments.rounds)]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank), "--folder", folder]) for rank in range(arguments.gpus)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit("a process has failed")
        result = (Path(folder) / "result.json").read_text()
    if not arguments.small:
        RESULTS.write_text(result)
    found = json.loads(result)
    for way, of_way in found["rounds"].items():
        median, least, most = statistics.median(of_way), min(of_way), max(of_way)
        print(f"{way}: {1e3 * median:.1f} ms ({1e3 * least:.1f} to {1e3 * most:.1f})")


if __name__ == "__main__":
    main()
