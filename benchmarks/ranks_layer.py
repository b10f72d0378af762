"""Measure the matrices of a layer of Llama-3.1-70B, divided among the GPUs of one host. Predictions are made before.

python benchmarks/ranks_layer.py [--gpus 1 2 4]          # writes results/ranks-layer.json
python benchmarks/ranks_layer.py --small --cpu            # tries the script on a CPU, with Gloo

The layer has the seven matrices of attention and feed-forward network in Q4_K and Q6_K, but not the attention itself.
Three matrices are divided by rows and then one by columns, twice, so a token costs two all-reduces. On GPUs, a CUDA
graph replays the layer. The prediction is the time to read the blocks of a rank, and to move the bytes of the
all-reduces. The results are compared with those of one GPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import report_ranks
import torch
import torch.distributed as dist
from models import blocks
from ranks import result_of
from tables import described
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import numba_dequant as nd
from numba_dequant import torch as nt

RESULTS = Path(__file__).parent / "results" / "ranks-layer.json"
SIZES, SMALL = (8192, 1024, 28_672), (1024, 512, 2048)
TOKENS = (1, 8, 64, 512)
REPLAYS, READINGS = 20, 9


class Layer(nn.Module):
    """The matrices of a layer. Of each pair of names, the first is divided by rows, the second by columns."""

    def __init__(self, n_embd, n_kv, n_ff):
        super().__init__()
        self.q, self.k, self.v = (self._linear("Q4_K", rows, n_embd, rows) for rows in (n_embd, n_kv, n_kv))
        self.o = self._linear("Q4_K", n_embd, n_embd, 1)
        self.gate, self.up = (self._linear("Q4_K", n_ff, n_embd, seed) for seed in (2, 3))
        self.down = self._linear("Q6_K", n_embd, n_ff, 4)

    @staticmethod
    def _linear(kind, n_rows, n_elements, seed):
        n_bytes = nd.FORMATS[kind].n_bytes((n_rows, n_elements))
        data = torch.from_numpy(blocks(kind, n_bytes, seed).copy()).view(n_rows, -1)
        return nt.QuantizedLinear.from_blocks(data, kind)

    def forward(self, x):
        # Random weights make large numbers, which must not overflow.
        mixed = torch.tanh(self.o(torch.tanh(self.q(x) / 512)) / 512)
        hidden = torch.tanh(self.gate(mixed) / 512) * torch.tanh(self.up(mixed) / 512)
        return self.down(hidden), self.k(x), self.v(x)

    def n_bytes(self):
        return sum(layer.weight.numel() for layer in self.children())


def styles():
    rows = dict.fromkeys(("q", "k", "v", "gate", "up"), nt.QuantizedColwiseParallel(unit=256))
    return rows | dict.fromkeys(("o", "down"), nt.QuantizedRowwiseParallel(unit=256))


def replay(layer, x):
    """A function that computes the layer once."""
    if not x.is_cuda:
        return lambda: layer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    return graph.replay


def seconds_of(run, is_cuda):
    """Seconds of a run, of several readings."""
    found = []
    for _ in range(READINGS):
        dist.all_reduce(torch.zeros(1))
        if is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            begin.record()
            for _ in range(REPLAYS):
                run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / REPLAYS)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return found


@torch.inference_mode()
def of_rank(arguments):
    world, rank, is_cuda = arguments.gpus[0], arguments.rank, not arguments.cpu
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    options = {}
    if is_cuda:
        torch.cuda.set_device(device)
        options["device_id"] = device
    group = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    where = f"file://{arguments.folder}/layer{world}"
    dist.init_process_group(group, init_method=where, rank=rank, world_size=world, **options)
    torch.manual_seed(0)
    layer = Layer(*(SMALL if arguments.small else SIZES)).to(device)
    dtype = torch.float16 if is_cuda else torch.float32
    inputs = {tokens: torch.randn(tokens, layer.q.in_features).to(device, dtype) for tokens in TOKENS}
    whole = {tokens: layer(x)[0].float() for tokens, x in inputs.items()}
    if world > 1:
        parallelize_module(layer, init_device_mesh(device.type, (world,)), styles())
    found = []
    for tokens, x in inputs.items():
        result = layer(x)[0].float()
        error = float((result - whole[tokens]).norm() / whole[tokens].norm())
        assert error < 2e-3, (tokens, error)
        of_ranks = [None] * world
        dist.all_gather_object(of_ranks, seconds_of(replay(layer, x), is_cuda))
        found.append({"tokens": tokens, "error": error, "seconds": [max(each) for each in zip(*of_ranks, strict=True)]})
    if rank == 0:
        (arguments.folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def predicted(world, tokens, sizes):
    """Seconds of a layer on a rank, by the rates of docs/ranks-cost.md."""
    folder = RESULTS.parent
    machine, _ = report_ranks.machine_of(json.loads((folder / "ranks-machine.json").read_text()), folder)
    n_embd, n_kv, n_ff = sizes
    n_bytes = nd.FORMATS["Q4_K"].n_bytes((2 * (n_embd + n_kv + n_ff), n_embd))
    n_bytes += nd.FORMATS["Q6_K"].n_bytes((n_embd, n_ff))
    moved = 2 * 2 * (world - 1) / world * 2 * tokens * n_embd
    return n_bytes / world / machine.memory + moved / machine.nvlink + 2 * (world > 1) * machine.latency


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", action="store_true", help="a tiny layer; nothing is written to results")
    parser.add_argument("--cpu", action="store_true", help="processes that compute on the CPU, with Gloo")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        of_rank(arguments)
        return
    sizes, layers = SMALL if arguments.small else SIZES, []
    predictions = {(world, tokens): predicted(world, tokens, sizes) for world in arguments.gpus for tokens in TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.gpus:
            options = ["--small"] * arguments.small + ["--cpu"] * arguments.cpu
            for one in result_of(__file__, folder, world, options):
                one |= {"gpus": world, "predicted": predictions[world, one["tokens"]]}
                layers.append(one)
                print({**one, "seconds": statistics.median(one["seconds"])}, flush=True)
    result = described("python benchmarks/ranks_layer.py " + " ".join(sys.argv[1:]), "cpu" if arguments.cpu else "cuda")
    if not arguments.small:
        RESULTS.write_text(json.dumps(result | {"layers": layers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
