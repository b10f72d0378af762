"""What limits each product with 1 or 8 columns: counters of the profiler, for the table of docs/products.md.

python benchmarks/profile_products.py       # needs Nsight Compute (`ncu`) and the right to read counters

The profiler runs each kernel alone, with empty caches, several times. So it says nothing about launches that overlap.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

from tables import described

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "products-profile.json"

STALLS = {
    "long_scoreboard": "memory",
    "short_scoreboard": "shared memory",
    "mio_throttle": "queue of shared memory",
    "lg_throttle": "queue of memory",
    "math_pipe_throttle": "a busy pipe",
    "wait": "fixed latency",
    "barrier": "barrier",
    "no_instruction": "instruction cache",
    "branch_resolving": "branch",
    "dispatch_stall": "dispatch",
    "drain": "stores",
    "membar": "memory barrier",
    "not_selected": "another warp's turn",
    "sleeping": "sleep",
}
"""The profiler's names of what warps wait for, and ours."""

PIPES = {
    "sm__inst_executed_pipe_alu": "integers and logic",
    "sm__inst_executed_pipe_fma": "FP32",
    "sm__inst_executed_pipe_fp16": "FP16",
    "sm__inst_executed_pipe_lsu": "loads and stores",
    "sm__inst_executed_pipe_tensor": "tensor cores",
    "l1tex__data_pipe_lsu_wavefronts": "shared memory and L1",
}
"""The same, of what executes instructions."""

SHARES = {
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "busy": "sm__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
OTHERS = {"ns": "gpu__time_duration.sum", "instructions": "smsp__inst_executed.sum"}


def stall_metric(name):
    return f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"


def pipe_metric(name):
    return f"{name}.avg.pct_of_peak_sustained_active"


METRICS = [*SHARES.values(), *OTHERS.values(), *map(pipe_metric, PIPES), *map(stall_metric, STALLS)]


def cases(formats):
    """Name, rows, elements and columns of each product."""
    from product_timing import SHAPES

    import numba_dequant as nd
    from numba_dequant.kernels.product_shape import has_products

    names = formats or [name for name, fmt in nd.FORMATS.items() if has_products(fmt)]
    return [(name, *shape, n_columns) for name, shape, n_columns in product(names, SHAPES, (1, 8))]


def launch(formats, path):
    """Launch every product once in the profiler's range, and write how many kernels each launched."""
    import torch
    from product_timing import Product, blocks_like_weights

    import numba_dequant as nd
    from numba_dequant.backends.gpu import gpu_at

    gpu, counts, found = gpu_at(0), [0], []
    itself = gpu.launch

    def counted(*arguments, **options):
        counts[0] += 1
        return itself(*arguments, **options)

    stream = torch.cuda.Stream()
    for name, n_rows, n_elements, n_columns in cases(formats):
        print(name, n_rows, n_elements, n_columns, flush=True)
        weight = blocks_like_weights(name, n_rows, n_elements)
        x = torch.randn(n_columns, n_elements, dtype=torch.float16, device="cuda")
        work = Product(gpu, nd.FORMATS[name], [weight], x, stream.cuda_stream)
        with gpu.active():
            work()
            torch.cuda.synchronize()
            gpu.launch, counts[0] = counted, 0
            torch.cuda.profiler.start()
            work()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            gpu.launch = itself
        found.append({"case": [name, n_rows, n_elements, n_columns], "kernels": counts[0]})
    path.write_text(json.dumps({"found": found} | described("python benchmarks/profile_products.py", "cuda")))


def read(log):
    """The counters of each kernel, in order of launch."""
    lines = log.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith('"ID"'))
    kernels = defaultdict(dict)
    for row in csv.DictReader(lines[start:]):
        value = row["Metric Value"].replace(",", "")
        kernels[int(row["ID"])][row["Metric Name"]] = float(value) if value[:1].isdigit() else float("nan")
    return [kernels[each] for each in sorted(kernels)]


def summary(kernel):
    """Shares from 0 to 1 of one kernel, the busiest pipe, and what warps wait for most."""
    shares = {name: kernel[metric] / 100 for name, metric in SHARES.items()}
    pipes = {ours: kernel[pipe_metric(name)] / 100 for name, ours in PIPES.items()}
    stalls = {ours: kernel[stall_metric(name)] for name, ours in STALLS.items()}
    total = sum(stalls.values()) + 1  # the warp that issues
    return (
        shares
        | {name: kernel[metric] for name, metric in OTHERS.items()}
        | {"pipes": pipes, "stalls": {name: each / total for name, each in stalls.items()}}
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", default=[])
    parser.add_argument("--launch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        launch(arguments.formats, arguments.launch)
        return
    launches = RESULTS.with_suffix(".launches.json")
    command = ["ncu", "--csv", "--print-units", "base", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--launch", str(launches)]
    command += ["--formats", *arguments.formats] if arguments.formats else []
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode or '"ID"' not in done.stdout:
        sys.exit(f"The profiler failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    kernels, content = read(done.stdout), json.loads(launches.read_text())
    launches.unlink()
    rows = []
    for each in content.pop("found"):
        mine, kernels = kernels[: each["kernels"]], kernels[each["kernels"] :]
        name, n_rows, n_elements, n_columns = each["case"]
        longest = max(mine, key=lambda kernel: kernel[OTHERS["ns"]])
        row = {"name": name, "n_rows": n_rows, "n_elements": n_elements, "n_columns": n_columns}
        rows.append(row | {"kernels": len(mine)} | summary(longest))
    assert not kernels, f"{len(kernels)} kernels too many"
    text = json.dumps(content | {"rows": []}, indent=1).removesuffix("]\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)  # a line for each product
    RESULTS.write_text(f"{text}\n{lines}\n]}}\n")
    print(f"{len(rows)} products, {RESULTS}")


if __name__ == "__main__":
    main()
