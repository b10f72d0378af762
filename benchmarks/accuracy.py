"""Measure the errors of dequantizing in float16 or bfloat16 arithmetic, as image programs do.

python benchmarks/accuracy.py                # writes results/accuracy.json, and the table of docs/programs.md
python benchmarks/accuracy.py model.gguf     # prints the same table for the weights of a file

ComfyUI-GGUF and diffusers compute with PyTorch operations, in float16 by default, and convert the result; ComfyUI-GGUF
can also compute in the type of the model ("target"). Their formulas are those of eager_torch.py with another type of
arithmetic. The random blocks have random quants and scales; the scales are such that the root mean square of the values
is 0.02, which is about that of the weights of a model. It needs PyTorch and no GPU.
"""

import json
import platform
import sys

import numpy as np
import report
import torch
from eager_torch import VALUES, dequantizer

import numba_dequant as nd

N_VALUES = 1 << 20
ROOT_MEAN_SQUARE = 0.02
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The formats that both programs compute with PyTorch operations in float16."""

WAYS = {
    "FP16, exact": (None, torch.float16),
    "FP16 by FP16": (torch.float16, torch.float16),
    "BF16, exact": (None, torch.bfloat16),
    "BF16 by exact FP16": ("exact", torch.bfloat16),
    "BF16 by FP16": (torch.float16, torch.bfloat16),
    "BF16 by BF16": (torch.bfloat16, torch.bfloat16),
}
"""Way -> arithmetic and type of the result; None is float32 by this package, rounded once; "exact" is
this, rounded to float16 first."""


def random_blocks(name):
    """Blocks of 2**20 values."""
    fmt = nd.FORMATS[name]
    random = np.random.default_rng(fmt.ggml_id)
    blocks = random.integers(0, 256, (N_VALUES // fmt.block_size, fmt.type_size), dtype=np.uint8)
    fields = blocks.view(fmt.layout)
    scales = [field for field in fmt.layout.names if fmt.layout[field].base == np.float16]
    for field in scales:
        fields[field] = random.uniform(0.5, 1.5, fields[field].shape)
    if "m" in scales:  # the smallest value of a block
        fields["m"] *= -(1 << (int(name[1]) - 1))
    values = nd.dequantize(blocks, name, "float32", device="cpu").astype(np.float64)
    factor = ROOT_MEAN_SQUARE / np.sqrt(np.mean(values**2))
    for field in scales:
        fields[field] = fields[field].astype(np.float64) * factor
    return torch.from_numpy(blocks)


def blocks_in(path, name):
    """The first blocks of a format in a file, of 2**20 values or fewer; None if there are none."""
    fmt = nd.FORMATS[name]
    with nd.open(path) as model:
        found = [model.read(tensor.name) for tensor in model.tensors.values() if tensor.format is fmt]
    if not found:
        return None
    blocks = np.concatenate([np.frombuffer(each, np.uint8).reshape(-1, fmt.type_size) for each in found])
    return torch.from_numpy(blocks[: N_VALUES // fmt.block_size])


def errors(name, blocks):
    """For each way: the relative root mean square error, and the share of values that are not rounded correctly."""
    data = blocks.numpy()
    reference = torch.from_numpy(np.array(nd.dequantize(data, name, "float32", device="cpu"))).double().flatten()
    found = {}
    for way, (arithmetic, dtype) in WAYS.items():
        exact = reference.to(dtype)  # a float32 in double precision: it is rounded once
        if arithmetic is None:
            ours = nd.dequantize(data, name, dtype, device="cpu")
            values = torch.from_dlpack(ours).flatten()
        elif arithmetic == "exact":
            values = reference.half().to(dtype)
        else:
            values = dequantizer(name, VALUES[name], arithmetic)(blocks, dtype).flatten()
        error = ((values.double() - reference) ** 2).mean().sqrt() / (reference**2).mean().sqrt()
        found[way] = [float(f"{error:.2e}"), round((values != exact).double().mean().item(), 3)]
    return found


def main():
    if len(sys.argv) > 1:
        blocks = {name: blocks_in(sys.argv[1], name) for name in FORMATS}
    else:
        blocks = {name: random_blocks(name) for name in FORMATS}
    found = {name: errors(name, data) for name, data in blocks.items() if data is not None}
    versions = {"Python": platform.python_version(), "numba-dequant": nd.__version__}
    versions |= {"numpy": np.__version__, "torch": torch.__version__}
    results = {"versions": versions, "command": "python benchmarks/accuracy.py", "errors": found}
    print(report.accuracy_table(results))
    if len(sys.argv) == 1:
        report.ACCURACY.write_text(json.dumps(results, indent=1) + "\n")
        report.PROGRAMS.write_text(report.filled(report.PROGRAMS, report.RESULTS))


if __name__ == "__main__":
    main()
