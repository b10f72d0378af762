"""Measure loads by several GPUs of one host, and check their values. Predictions are made before.

python benchmarks/ranks.py [--gpus 1 2 4] [--models 8B 70B] [--rounds 7]     # writes results/ranks.json
python benchmarks/ranks.py --small --cpu --gpus 1 2                            # tries the script on a CPU, with Gloo

The files are like Llama in Q4_K_M, and in the page cache. 8B is Llama-3.1-8B with 56 layers (8 GB), whose values become
FP16. 70B is Llama-3.1-70B (42 GB), whose blocks stay compressed, because one GPU could not hold its values. For each
number of GPUs, there are as many processes:

- alone: one process loads the whole file to its GPU with `nd.load`, while the others wait.
- together: each process does that at the same time.
- apart: each process loads every n-th tensor with `nd.load`. There is no plan and no exchange, so this is a floor.
- sharded: `load_file(plan=...)` by `llama_rules`.
- replicated: each rank holds the whole model, and the ranks exchange compressed pieces.
- one process: `nd.load(device=[...], plan=...)`, while the others wait.

All ways keep their memory for the next round, so each GPU needs more than 80 GB.

Before them, each process copies pinned memory to its GPU, and copies the file from the page cache to pinned memory with
threads: first one process alone, then all at the same time. These are the roofs of the run.

A time is that from the first start to the last end, after a barrier. The ways take turns in each round. "host MB" is
the memory that a first load adds to its process at its peak, with the buffers that the process keeps for the next load.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import models
import report_ranks
import torch
import torch.distributed as dist
from tables import described

import numba_dequant as nd
from numba_dequant import torch as nt
from numba_dequant.loading import gpu_buffers
from numba_dequant.parallel import llama_rules, plan, predict

RESULTS = Path(__file__).parent / "results" / "ranks.json"
PIECE, PIECES, READERS = 1 << 20, 4096, gpu_buffers.TUNING.threads
"""For the roofs: bytes of a read, their number for each process, and the threads of a process that read the file."""
COPY, COPIES = gpu_buffers.TUNING.chunk_bytes, 512
"""For the roofs: bytes of a copy to a GPU, and their number."""
METADATA = {"general.architecture": "llama", "llama.attention.key_length": 128}
MODELS = dict(zip(("8B", "70B"), report_ranks.MODELS.values(), strict=True))
SMALL = {"n_layers": 2, "n_vocab": 4096}


def divided(model, world):
    return plan(model.tensors.values(), world, llama_rules(METADATA))


def replicated(model, world):
    return plan(model.tensors.values(), world, [])


def of_one_process(path, devices, planner, kept):
    return nd.load(path, device=devices, plan=planner, keep_quantized=kept)


def ways(path, rank, world, kind, kept):
    """Name -> (the ranks that take part, or all of them; what each does)."""
    devices = [f"cuda:{index}" for index in range(world)] if kind == "cuda" else ["cpu"] * world
    whole = partial(nd.load, path, device=devices[rank], keep_quantized=kept)
    found = {"alone": ([0], whole)}
    if world == 1:
        return found
    found["together"] = None, whole
    with nd.open(path) as model:
        own = list(model.tensors)[rank::world]
    found["apart"] = None, partial(whole, select=own)
    for way, planned in (("sharded", divided), ("replicated", replicated)):
        planner = partial(planned, world=world)
        found[way] = None, partial(nt.load_file, path, devices[rank], torch.float16, plan=planner, keep_quantized=kept)
        if not kept:
            found[f"one process, {way}"] = [0], partial(of_one_process, path, devices, planner, kept)
    return found


def synchronize(world, kind):
    for index in range(world if kind == "cuda" else 0):
        torch.cuda.synchronize(index)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def part_of(whole, part, n_columns):
    """What a rank holds of the values or of the blocks of a tensor. `n_columns` are those of the values."""
    if part.dim is None:
        return whole
    scale = whole.shape[-1] / n_columns if part.dim == whole.ndim - 1 else 1
    return whole.narrow(part.dim, int(part.start * scale), int((part.stop - part.start) * scale))


def as_tensor(found, kept):
    """A result of ours or of PyTorch as a tensor; blocks in the shape (..., bytes per row)."""
    if isinstance(found, nd.QuantizedTensor):
        data = torch.from_dlpack(found.data)
        return data.view(*found.shape[:-1], -1) if kept else data
    return found if isinstance(found, torch.Tensor) else torch.from_dlpack(found)


def check(path, rank, world, way, load, kind, kept):
    """Compare what was loaded with parts of the whole tensors, bit by bit."""
    with nd.open(path) as model:
        planned = (replicated if "replicated" in way else divided)(model, world).ranks
        found = load()
        by_rank = dict(enumerate(found)) if isinstance(found, list) else {rank: found}
        for owner, tensors in by_rank.items():
            assert list(tensors) == list(planned[owner].parts), way
            device = f"cuda:{owner}" if kind == "cuda" else "cpu"
            for name, whole in model.stream(device=device, keep_quantized=kept):
                tensor, values = model.tensors[name], as_tensor(tensors[name], kept)
                expected = as_tensor(whole, kept)
                if kept and tensor.format.name == "F32":  # `load_file` makes values of it
                    expected = expected.view(torch.float32).to(values.dtype)
                expected = part_of(expected, planned[owner].parts[name], tensor.shape[-1])
                assert str(values.device) == device
                assert torch.equal(bits(values), bits(expected)), (way, owner, name)


class HostMemory:
    """The memory of this process at its peak, beyond what it had before, in MB."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        self._before = self._of("VmRSS")
        return self

    def __exit__(self, *_):
        self.n_bytes = self._of("VmHWM") - self._before

    @staticmethod
    def _of(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])


def copy_to_gpu(pinned, on_gpu):
    for _ in range(COPIES):
        on_gpu.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()


def copy_from_file(path, rank, buffers):
    """Each thread reads pieces that no other thread or process reads, to a buffer of its own."""
    n_pieces = path.stat().st_size // PIECE
    file = os.open(path, os.O_RDONLY)

    def read(reader):
        for number in range(reader, PIECES, READERS):
            os.preadv(file, [buffers[reader]], (rank * PIECES + number) % n_pieces * PIECE)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    os.close(file)


def roofs(path, rank, world):
    """Bytes per second that one process alone and all processes together copy: to the GPUs, and from the page cache."""
    pinned = torch.empty(max(COPY, READERS * PIECE), dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty(COPY, dtype=torch.uint8, device=f"cuda:{rank}")
    buffers, found = [part.numpy() for part in pinned.split(PIECE)[:READERS]], {}
    works = {
        "bus": (partial(copy_to_gpu, pinned[:COPY], on_gpu), COPY * COPIES),
        "page cache": (partial(copy_from_file, path, rank, buffers), PIECE * PIECES),
    }
    for name, (work, n_bytes) in works.items():
        for way, n_ranks in (("alone", 1), ("together", world)):
            seconds = []
            for _ in range(4):
                dist.all_reduce(torch.zeros(1))
                start = time.perf_counter()
                if rank < n_ranks:
                    work()
                spans = [None] * world
                dist.all_gather_object(spans, (start, time.perf_counter()))
                seconds.append(max(end for _, end in spans[:n_ranks]) - min(start for start, _ in spans[:n_ranks]))
            found[f"{name}, {way}"] = n_ranks * n_bytes / statistics.median(seconds[1:])
    return found


def measure(path, arguments, kept):
    """Way -> seconds of each round, and the most host memory of a process, on the first rank."""
    rank, world, kind = arguments.rank, arguments.gpus[0], "cpu" if arguments.cpu else "cuda"
    seconds, memory = {}, {}
    for number in range(-1, arguments.rounds):
        for way, (members, load) in ways(path, rank, world, kind, kept).items():
            takes_part = members is None or rank in members
            dist.all_reduce(torch.zeros(1))  # by Gloo: a barrier of NCCL would keep the GPUs of those who wait busy
            start = end = used = None
            if takes_part:
                with HostMemory() as host:
                    start = time.perf_counter()
                    found = load()
                    synchronize(world, kind)
                    end = time.perf_counter()
                used = host.n_bytes
                del found
            spans = [None] * world
            dist.all_gather_object(spans, (start, end, used))
            spans = [span for span in spans if span[0] is not None]
            if number >= 0:
                seconds.setdefault(way, []).append(max(end for _, end, _ in spans) - min(start for start, *_ in spans))
                continue
            # The first round allocates memory, makes connections and checks values.
            memory[way] = max(used for *_, used in spans) / 1e6
            if takes_part and way not in ("alone", "together", "apart"):
                check(path, rank, world, way, load, kind, kept)
                if kind == "cuda":
                    torch.cuda.empty_cache()
    return seconds, memory


def of_rank(arguments):
    world = arguments.gpus[0]
    options = {}
    if not arguments.cpu:
        torch.cuda.set_device(arguments.rank)
        options["device_id"] = torch.device("cuda", arguments.rank)
    dist.init_process_group(
        "gloo" if arguments.cpu else "cpu:gloo,cuda:nccl",
        init_method=f"file://{arguments.folder}/group{world}",
        rank=arguments.rank,
        world_size=world,
        **options,
    )
    files = {name: arguments.folder / f"{name}.gguf" for name in arguments.models}
    found = {"loads": {name: measure(path, arguments, name == "70B") for name, path in files.items()}}
    if not arguments.cpu:
        found["roofs"] = roofs(next(iter(files.values())), arguments.rank, world)
    if arguments.rank == 0:
        (arguments.folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def predicted(path, world, kept):
    """Way -> seconds, predicted with the rates of docs/ranks-cost.md: all stages overlap, or the exchange is last."""
    machine, _ = report_ranks.machine_of(
        json.loads((RESULTS.parent / "ranks-machine.json").read_text()), RESULTS.parent
    )
    with nd.open(path) as model:
        plans = {"sharded": divided(model, world), "replicated": replicated(model, world)}
        plans["together"] = report_ranks.whole_reads(world, list(model.tensors.values()))
        plans["apart"] = plans["sharded"]
        plans["alone"] = report_ranks.whole_reads(1, list(model.tensors.values()))
    found = {}
    for way, of_way in plans.items():
        prediction = predict(of_way, machine, value_bytes=0 if kept else 2)
        found[way] = {"overlapped": prediction.overlapped_seconds, "exchanged last": prediction.seconds}
    return found


def result_of(script, folder, world, options):
    """What the first of `world` processes of a script writes to result.json in a folder."""
    command = [sys.executable, script, "--folder", folder, "--gpus", str(world), *options]
    processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a process of {world} has failed")
    return json.loads((Path(folder) / "result.json").read_text())


def run(folder, arguments):
    """The loads of all models and numbers of GPUs, and the roofs."""
    loads, by_world = [], {}
    predictions = {
        (world, name): predicted(folder / f"{name}.gguf", world, name == "70B")
        for world in arguments.gpus
        for name in arguments.models
    }
    for world in arguments.gpus:
        options = ["--rounds", str(arguments.rounds), "--models", *arguments.models, *["--cpu"] * arguments.cpu]
        found = result_of(__file__, folder, world, options)
        by_world[world] = found.get("roofs")
        print(world, "roofs", by_world[world], flush=True)
        for name, (seconds, memory) in found["loads"].items():
            n_bytes = (folder / f"{name}.gguf").stat().st_size
            for way, of_way in seconds.items():
                one = {"model": name, "file bytes": n_bytes, "gpus": world, "way": way, "seconds": of_way}
                one |= {"blocks": name == "70B", "host MB": memory[way]}
                one["predicted"] = predictions[world, name].get(way.removeprefix("one process, "))
                loads.append(one)
                print({**one, "seconds": statistics.median(of_way)}, flush=True)
    return loads, by_world


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a tiny file; nothing is written to results")
    parser.add_argument("--cpu", action="store_true", help="processes that load to the CPU, with Gloo")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        of_rank(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in arguments.models:
            content = models.tensors("Llama-3.1-8B", "Q4_K_M", **(SMALL if arguments.small else MODELS[model]))
            models.write(folder / f"{model}.gguf", content, 0 if arguments.small else 128_256)
        loads, rates = run(folder, arguments)
    result = described("python benchmarks/ranks.py " + " ".join(sys.argv[1:]), "cpu" if arguments.cpu else "cuda")
    if not arguments.cpu:
        names = sorted({torch.cuda.get_device_name(index) for index in range(max(arguments.gpus))})
        result["machine"] = f"{max(arguments.gpus)} GPUs of one host, {' and '.join(names)}"
    result |= {
        "cores": len(os.sched_getaffinity(0)),
        "bytes per second": rates,
        "loads": loads,
        "bytes of a copy": COPY,
    }
    if not arguments.small:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
