"""Measure `numba_dequant.torch.ggml.mul_mat_id`: each token times the weights of the experts that were chosen for it.

python benchmarks/moe_products.py                          # writes results/moe-products.json; needs a GPU
python benchmarks/moe_products.py --device cpu --small     # checks small ones

The first two sizes are those of Qwen3-30B-A3B, with half of its experts. Each launch uses other experts of other
buffers. The floor is a kernel of the same run that only reads the bytes of the distinct experts.
"""

import argparse
import json
import statistics
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from product_timing import Clock, Reader, blocks_like_weights, error, turns_of
from tables import described

import numba_dequant as nd
from numba_dequant import torch as nt

RESULTS = Path(__file__).parent / "results" / "moe-products.json"
SIZES = [(768, 2048), (2048, 768), (2048, 4096)]
"""Rows and elements of an expert."""

FORMATS = ["Q4_K", "Q6_K", "Q8_0"]
N_TOKENS = [1, 8, 64]
N_EXPERTS, N_CHOSEN = 64, 8
MOST_ERROR = 2e-3


class Case:
    """Experts and tokens; each call computes the next buffer."""

    def __init__(self, name, n_rows, n_elements, n_tokens, device, n_experts=N_EXPERTS):
        self.fmt, self.n_rows, random = nd.FORMATS[name], n_rows, np.random.default_rng(n_tokens)
        first = blocks_like_weights(name, n_experts * n_rows, n_elements, device=device).view(n_experts, n_rows, -1)
        n_buffers = turns_of(first.numel()) if first.is_cuda else 2
        self.blocks = [first, *(first.clone() for _ in range(n_buffers - 1))]
        chosen = [
            np.stack([random.permutation(n_experts)[:N_CHOSEN] for _ in range(n_tokens)]) for _ in range(n_buffers)
        ]
        self.ids = [torch.from_numpy(each).to(device) for each in chosen]
        self.x = torch.randn(n_tokens, n_elements, dtype=torch.float16, device=device)
        self.expert_bytes = first[0].numel()
        self.n_distinct = statistics.mean(len(np.unique(each)) for each in chosen)
        self._turns = cycle(zip(self.blocks, self.ids, strict=True))

    def __call__(self):
        blocks, ids = next(self._turns)
        return nt.ggml.mul_mat_id(blocks, self.x, ids, self.fmt.ggml_id, self.n_rows)

    def error(self):
        """The error of the first token with the next buffer, against float64."""
        blocks, ids = next(self._turns)
        found = nt.ggml.mul_mat_id(blocks, self.x, ids, self.fmt.ggml_id, self.n_rows)[0]
        values = nt.dequantize(blocks[ids[0]], self.fmt, torch.float32).double()
        return error(found, torch.einsum("kro,o->kr", values, self.x[0].double()))


def measured(case, clock, reader):
    """Seconds per call, its spread, and the floor of the distinct experts."""
    readings = sorted(clock.readings(case))
    n_bytes = round(case.n_distinct) * case.expert_bytes
    seconds = statistics.median(readings)
    return {
        "seconds": seconds,
        "spread": (readings[-1] - readings[0]) / seconds,
        "late": clock.late,
        "distinct experts": case.n_distinct,
        "bytes": n_bytes,
        "floor s": reader.seconds(n_bytes),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="check small products; nothing is written")
    options = parser.parse_args()
    rows, clock, reader = [], None, None
    if not options.small:
        from numba_dequant.backends.gpu import gpu_at

        clock = Clock()
        reader = Reader(gpu_at(0), clock)
    for name in FORMATS:
        for n_rows, n_elements in [(32, 256)] if options.small else SIZES:
            for n_tokens in N_TOKENS:
                case = Case(name, n_rows, n_elements, n_tokens, options.device, 16 if options.small else N_EXPERTS)
                row = {"format": name, "rows": n_rows, "elements": n_elements, "tokens": n_tokens}
                with torch.inference_mode():
                    row["error"] = case.error()
                    assert row["error"] < MOST_ERROR, row
                    if not options.small:
                        row |= measured(case, clock, reader)
                rows.append(row)
                print(row, flush=True)
    if not options.small:
        found = described("python benchmarks/moe_products.py", options.device)
        found |= {"experts": N_EXPERTS, "chosen": N_CHOSEN, "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
