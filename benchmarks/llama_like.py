"""Decode with a model that is shaped like a llama of a billion parameters, whose weights are random blocks.

python benchmarks/llama_like.py                          # writes results/llama-like.json; needs a GPU
python benchmarks/llama_like.py --device cpu --small     # a few tokens of a small model

The types are those of Q4_K_M: Q4_K, with Q6_K for the output and for a part of the layers v and down. A token is one
CUDA graph: embedding, layers with a cache of keys and values of fixed size, logits, and the most likely token, which is
the input of the next one. "dequantize first" is the same model with `MOST_COLUMNS = 0`: each layer dequantizes its
weight, then multiplies. "FP16 weights" is dequantized once. The floor is the time to read the weights of all layers, at
the rate of a kernel of the same run that only reads.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from product_timing import blocks_like_weights, error
from tables import described
from torch import nn
from torch.nn import functional

from numba_dequant import torch as nt
from numba_dequant.torch import ops

RESULTS = Path(__file__).parent / "results" / "llama-like.json"
BATCHES = [1, 8]
N_TOKENS, ROUNDS = 64, 5


@dataclass(frozen=True)
class Sizes:
    width: int = 2048
    hidden: int = 8192
    n_layers: int = 16
    n_heads: int = 32
    n_kept_heads: int = 8
    vocabulary: int = 128256
    n_places: int = 128

    @property
    def head(self):
        return self.width // self.n_heads


SMALL = Sizes(256, 512, 2, 4, 2, 512, 16)


def has_more_bits(layer, n_layers):
    """Whether llama.cpp gives v and down of a layer Q6_K in the mix Q4_K_M."""
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def linear(n_rows, n_elements, name, device, seed):
    return nt.QuantizedLinear.from_blocks(blocks_like_weights(name, n_rows, n_elements, seed, device), name)


def rotated(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Layer(nn.Module):
    def __init__(self, sizes, number, device):
        super().__init__()
        kept, more = sizes.n_kept_heads * sizes.head, "Q6_K" if has_more_bits(number, sizes.n_layers) else "Q4_K"
        self.sizes, seed = sizes, 10 * number
        self.q = linear(sizes.width, sizes.width, "Q4_K", device, seed)
        self.k = linear(kept, sizes.width, "Q4_K", device, seed + 1)
        self.v = linear(kept, sizes.width, more, device, seed + 2)
        self.o = linear(sizes.width, sizes.width, "Q4_K", device, seed + 3)
        self.gate = linear(sizes.hidden, sizes.width, "Q4_K", device, seed + 4)
        self.up = linear(sizes.hidden, sizes.width, "Q4_K", device, seed + 5)
        self.down = linear(sizes.width, sizes.hidden, more, device, seed + 6)
        self.norms = nn.ParameterList(torch.ones(sizes.width, dtype=torch.float16, device=device) for _ in range(2))

    def forward(self, x, place, mask, turn, keys, values):
        sizes, n = self.sizes, x.shape[0]
        y = functional.rms_norm(x, (sizes.width,), self.norms[0], 1e-5)
        q, k, v = (each(y).view(n, -1, 1, sizes.head) for each in (self.q, self.k, self.v))
        keys.index_copy_(2, place, rotated(k, *turn))
        values.index_copy_(2, place, v)
        # The heads that share keys are one head with several queries.
        q = rotated(q, *turn).view(n, sizes.n_kept_heads, -1, sizes.head)
        y = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.o(y.reshape(n, sizes.width))
        y = functional.rms_norm(x, (sizes.width,), self.norms[1], 1e-5)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, sizes, device):
        super().__init__()
        self.sizes = sizes
        self.layers = nn.ModuleList(Layer(sizes, number, device) for number in range(sizes.n_layers))
        self.output = linear(sizes.vocabulary, sizes.width, "Q6_K", device, 9999)
        self.embedding = nt.QuantizedEmbedding.from_blocks(self.output.weight, "Q6_K", torch.float16)
        self.norm = nn.Parameter(torch.ones(sizes.width, dtype=torch.float16, device=device))
        speeds = 5e5 ** -(torch.arange(0, sizes.head, 2, dtype=torch.float32, device=device) / sizes.head)
        angles = torch.arange(sizes.n_places, dtype=torch.float32, device=device)[:, None] * speeds
        for name, table in (("cosine", angles.cos()), ("sine", angles.sin())):
            self.register_buffer(name, table.half())
        self.register_buffer("places", torch.arange(sizes.n_places, device=device))

    def forward(self, tokens, place, kept):
        x = self.embedding(tokens)
        turn = self.cosine[place], self.sine[place]
        mask = (self.places <= place).view(1, 1, 1, -1)
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            x = layer(x, place, mask, turn, keys, values)
        return self.output(functional.rms_norm(x, (self.sizes.width,), self.norm, 1e-5))

    def memory(self, n):
        """Empty keys and values of each layer, for n sequences."""
        shape = 2, n, self.sizes.n_kept_heads, self.sizes.n_places, self.sizes.head
        return [torch.zeros(shape, dtype=torch.float16, device=self.norm.device) for _ in self.layers]

    @property
    def linears(self):
        return [(owner, name) for owner in self.modules() for name, each in owner.named_children() if is_linear(each)]


def is_linear(module):
    return isinstance(module, nn.Linear)


class Decoder:
    """Decodes tokens of n sequences, on a GPU as a CUDA graph."""

    def __init__(self, model, n, is_compiled):
        device = model.norm.device
        self.model, self.kept = torch.compile(model) if is_compiled else model, model.memory(n)
        self.start = torch.arange(n, device=device) + 5
        self.tokens, self.place = self.start.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        self.logits, self.graph = None, None
        self.begin()
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            side.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            self.begin()

    def begin(self):
        self.tokens.copy_(self.start)
        self.place.zero_()

    def step(self):
        self.logits = self.model(self.tokens, self.place, self.kept)
        self.tokens.copy_(self.logits.argmax(-1))
        self.place += 1

    def seconds(self, n_tokens):
        """Seconds per token of all sequences, for one run."""
        self.begin()
        finish = torch.cuda.synchronize if self.graph else lambda: None
        finish()
        start = time.perf_counter()
        for _ in range(n_tokens):
            self.graph.replay() if self.graph else self.step()
        finish()
        return (time.perf_counter() - start) / n_tokens

    def first_logits(self):
        self.begin()
        self.graph.replay() if self.graph else self.step()
        return self.logits.float().clone()


def read_seconds(n_bytes):
    """The time to read so many bytes at the rate of one GiB."""
    from product_timing import Clock, Reader

    from numba_dequant.backends.gpu import gpu_at

    with gpu_at(0).active():
        return n_bytes * Reader(gpu_at(0), Clock()).seconds(1 << 30) / (1 << 30)


def measured(model, options, n_tokens):
    """For each batch: seconds per token, the spread, and the first logits."""
    found = {}
    for n in BATCHES:
        decoder = Decoder(model, n, options.compile)
        logits, _ = decoder.first_logits(), decoder.seconds(n_tokens)
        readings = sorted(decoder.seconds(n_tokens) for _ in range(ROUNDS))
        found[n] = statistics.median(readings), (readings[-1] - readings[0]) / readings[ROUNDS // 2], logits
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model; nothing is written")
    parser.add_argument("--compile", action="store_true", help="the model by torch.compile")
    options = parser.parse_args()
    sizes, n_tokens = (SMALL, 4) if options.small else (Sizes(), N_TOKENS)
    model = Llama(sizes, torch.device(options.device)).eval()
    linears = [getattr(*each) for each in model.linears]
    n_weights = sum(each.in_features * each.out_features for each in linears)
    n_bytes = sum(each.weight.numel() for each in linears)
    columns, found = ops.MOST_COLUMNS, {}
    with torch.inference_mode():
        found["ours"] = measured(model, options, n_tokens)
        ops.MOST_COLUMNS = 0
        found["dequantize first"] = measured(model, options, n_tokens)
        ops.MOST_COLUMNS = columns
        for owner, name in model.linears:
            setattr(owner, name, getattr(owner, name).dequantize(torch.float16))
        found["FP16 weights"] = measured(model, options, n_tokens)
    floor = 0.0 if options.device == "cpu" else read_seconds(n_bytes)
    rows = [
        {
            "way": way,
            "batch": n,
            "seconds": seconds,
            "spread": spread,
            "tokens per second": n / seconds,
            "share of the floor": floor / seconds,
            "difference of logits": error(logits, found["FP16 weights"][n][2]),
        }
        for way, each in found.items()
        for n, (seconds, spread, logits) in each.items()
    ]
    command = "python benchmarks/llama_like.py" + " --compile" * options.compile
    results = described(command, options.device) | {
        "weights": n_weights, "bytes": n_bytes, "floor s": floor, "tokens": n_tokens, "rows": rows
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    if not options.small:
        (RESULTS.with_stem("llama-like-compiled") if options.compile else RESULTS).write_text(
            json.dumps(results, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
