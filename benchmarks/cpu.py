"""The CPU path beside gguf-py's NumPy code, on the same bytes: to FP16, long rows, GB/s of bytes read and written.

    python benchmarks/cpu.py [--formats Q4_K,Q6_K] [--elements 16777216] [--json results.json]

Blocks are realistic ones, quantized by GGML. Each result is compared with the reference before it is timed; medians.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import gguf
import numpy as np

import numba_dequant as nd
from numba_dequant.cpu import n_threads
from numba_dequant.verify import difference

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import DATA

TEN = "Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K"
ROWS = 64


def processor():
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "a CPU")


def seconds(work, readings):
    times = []
    for _ in range(readings):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=TEN)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    result = {
        "command": " ".join(["python benchmarks/cpu.py", *sys.argv[1:]]).partition(" --json")[0],
        "machine": {
            "cpu": processor(),
            "threads": n_threads(),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in ("numba", "llvmlite", "numpy", "gguf")},
        },
        "rows": [],
    }
    print(f"{result['machine']['cpu']}, {n_threads()} threads; gguf-py on one")
    print("format    GB/s  gguf-py  ratio")
    for name in options.formats.split(","):
        source = nd.FORMATS[name]
        with np.load(DATA / "golden" / f"{name}.npz") as file:
            realistic = file["bytes"][file["section"] == 0]
        picked = np.random.default_rng(0).integers(0, len(realistic), options.elements // source.block_size)
        data = realistic[picked].reshape(ROWS, -1)
        out = np.empty(options.elements, np.float16)
        nd.dequantize(data, source, device="cpu", out=out)
        assert difference(out, nd.dequantize(data, source, device="reference"))[0] == 0
        ours = seconds(lambda data=data, source=source, out=out: nd.dequantize(data, source, device="cpu", out=out), 9)
        kind = gguf.GGMLQuantizationType[name]
        theirs = seconds(lambda data=data, kind=kind: gguf.dequantize(data, kind).astype(np.float16), 3)
        moved = data.nbytes + out.nbytes
        row = {"format": name, "elements": options.elements, "cpu": moved / ours / 1e9, "gguf": moved / theirs / 1e9}
        row["ratio"] = theirs / ours
        result["rows"].append(row)
        print(f"{name:8} {row['cpu']:5.1f} {row['gguf']:8.2f} {row['ratio']:6.1f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
