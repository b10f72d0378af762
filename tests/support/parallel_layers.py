"""One rank of two with layers that are divided: `python parallel_layers.py <rank> <world> <folder>`.

On GPUs (RANKS_DEVICE is "cuda"), activations are FP16. RANKS_COMPILER is the backend of `torch.compile`.
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from finite_blocks import finite_blocks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import numba_dequant as nd
from numba_dequant import torch as nt

DEVICE = os.environ.get("RANKS_DEVICE", "cpu")
COMPILER = os.environ.get("RANKS_COMPILER", "aot_eager")
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16


def layer(name, n_rows, n_elements, seed, *, bias=True):
    blocks = torch.from_numpy(finite_blocks(name, n_rows, n_elements, seed).copy())
    values = nt.dequantize(blocks, name, torch.float32)
    size = 1 / float(values.abs().mean()) / n_elements**0.5
    added = torch.randn(n_rows, generator=torch.Generator().manual_seed(seed))
    added = added.to(DEVICE, DTYPE) if bias else None
    return nt.QuantizedLinear.from_blocks(blocks.to(DEVICE), name, added), size


def activations(n_rows, n_elements, seed):
    x = torch.randn(n_rows, n_elements, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, DTYPE).requires_grad_()


def network(first, second):
    torch.manual_seed(0)
    (up, one), (down, two) = layer(first, 768, 256, 1), layer(second, 40, 768, 2, bias=first == "Q4_K")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = up, down

        def forward(self, x):
            return self.down(torch.tanh(self.up(x) * one)) * two

    return Network()


def difference(found, expected):
    found, expected = (tensor.detach().double() for tensor in (found, expected))
    return float((found - expected).norm() / expected.norm())


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend, timeout = os.environ.get("RANKS_BACKEND", "gloo"), timedelta(seconds=30 if DEVICE == "cpu" else 200)
    dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=world, timeout=timeout)
    mesh, found = init_device_mesh(DEVICE, (world,)), {}
    styles = {"up": nt.QuantizedColwiseParallel(unit=256), "down": nt.QuantizedRowwiseParallel(unit=256)}
    for first, second in (("Q4_K", "Q6_K"), ("Q8_0", "Q4_0")):
        whole, divided = network(first, second), network(first, second)
        parallelize_module(divided, mesh, styles)
        x = activations(5, 256, 3)
        y = x.detach().clone().requires_grad_()
        expected, result = whole(x), divided(y)
        expected.square().sum().backward()
        result.square().sum().backward()
        shapes = [list(divided.up.weight.shape), list(divided.down.weight.shape), divided.down.bias is None]
        compiled = torch.compile(divided, backend=COMPILER, fullgraph=True)
        with torch.no_grad():
            of_compiled = difference(compiled(x), expected)
        found[first] = [shapes, difference(result, expected), difference(y.grad, x.grad), of_compiled]
    found["alone"] = []
    for style in (nt.QuantizedColwiseParallel(gather_output=True), nt.QuantizedRowwiseParallel(split_input=True)):
        whole = layer("Q8_0", 51, 64, 4)[0]
        divided = parallelize_module(layer("Q8_0", 51, 64, 4)[0], mesh, style)
        x = activations(3, 64, 5)
        expected = whole(x)
        expected.square().sum().backward()
        of_bias = whole.bias.grad.split(26)[rank] if divided.out_features < 51 else whole.bias.grad
        for module in (divided, torch.compile(divided, backend=COMPILER, fullgraph=True)):
            y = x.detach().clone().requires_grad_()
            divided.zero_grad()
            result = module(y)
            result.square().sum().backward()
            found["alone"] += [difference(result, expected), difference(y.grad, x.grad)]
            if divided.bias is not None:
                found["alone"].append(difference(divided.bias.grad, of_bias))
    found["errors"] = []
    for module, style in (
        (nn.Linear(4, 4), nt.QuantizedColwiseParallel()),
        (layer("Q4_K", 4, 256, 0)[0], nt.QuantizedRowwiseParallel()),
    ):
        try:
            parallelize_module(module, mesh, style)
        except nd.NumbaDequantError as error:
            found["errors"].append(str(error))
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
