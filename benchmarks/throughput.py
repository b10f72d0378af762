"""How fast the kernels are, per format, beside the roof of the same run.

    python benchmarks/throughput.py [--formats Q4_K,Q6_K] [--dtypes float16] [--json results.json]

For each format: effective bandwidth (bytes read + bytes written, over time) of the tile mapping and of the literal
mapping, one thread block per quant block. The roof is a kernel that does nothing but move the same number of bytes in
and out, 16 bytes an access: the best of several shapes. Each result is compared with the reference before it is timed.

Times are the GPU's: launches are queued behind a long copy, so that the host is never waited for; several launches per
reading, over buffers in turn; the median of the readings.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys

import numpy as np
from cuda.core import EventOptions, LaunchConfig, ObjectCode, Stream, launch

import numba_dequant as nd
from numba_dequant import compiler, gpu, runtime
from numba_dequant.bits import copy_16_bytes
from numba_dequant.dtypes import numpy_dtype
from numba_dequant.verify import difference

READINGS, LAUNCHES, BUFFERS = 9, 4, 2
ROOF_SHAPES = [(1, 256), (2, 256), (4, 256), (2, 128), (4, 128)]
"""Stores per thread, and threads per thread block."""


class Bench:
    """A GPU, with memory to keep it busy."""

    def __init__(self, index):
        with runtime.current(index) as self.device:
            self.stream = Stream.from_handle(0)
            self.padding = [runtime.allocate(1 << 30, self.device, 0) for _ in range(2)]
        capability = self.device.compute_capability
        self.capability = (capability.major, capability.minor)

    def event(self):
        return self.stream.record(options=EventOptions(timing_enabled=True))

    def seconds(self, work):
        for turn in range(BUFFERS):
            work(turn)
        self.stream.sync()
        readings = []
        for _ in range(READINGS):
            runtime.copy_on_device(self.padding[0].pointer, self.padding[1].pointer, 1 << 30, 0)
            start = self.event()
            for turn in range(LAUNCHES):
                work(turn % BUFFERS)
            end = self.event()
            end.sync()
            readings.append((end - start) / 1e3 / LAUNCHES)
        return statistics.median(readings)

    def device_copy(self):
        first, second = self.padding
        return 2**31 / self.seconds(lambda _: runtime.copy_on_device(first.pointer, second.pointer, 1 << 30, 0))

    def roof(self, source, itemsize, n_elements, sources, targets):
        best = 0.0
        n_bytes = n_elements // source.block_size * source.type_size
        for stores, threads in ROOF_SHAPES:
            tile = stores * threads * 16 // itemsize
            tile_bytes = tile * source.type_size // source.block_size
            if tile % source.block_size or tile_bytes % 16:
                continue
            kernel = roof_kernel(tile_bytes // 16, stores, threads, self.capability)
            config = LaunchConfig(grid=n_elements // tile, block=threads)
            seconds = self.seconds(
                lambda turn, config=config, kernel=kernel: launch(
                    self.stream, config, kernel, sources[turn].pointer, n_elements, targets[turn].pointer
                )
            )
            best = max(best, (n_bytes + n_elements * itemsize) / seconds)
        return best


def roof_kernel(n_loads, stores, threads, capability):
    from numba import cuda

    n_stores = stores * threads

    def move(data, _, out):
        tile = np.int64(cuda.blockIdx.x)
        for step in range(stores):
            index = np.int32(cuda.threadIdx.x) + np.int32(step * threads)
            start = tile * n_loads + np.int64(index) * n_loads // n_stores
            copy_16_bytes(out, (tile * n_stores + index) * 16, data, start * 16)

    text = compiler.function_ptx(move, capability)
    return ObjectCode.from_cubin(compiler.assemble(text, capability)).get_kernel(compiler.entry_point(text))


def measure(bench, source, dtype, n_elements):
    itemsize = numpy_dtype(dtype).itemsize
    n_bytes = n_elements // source.block_size * source.type_size
    moved = n_bytes + n_elements * itemsize
    generator = np.random.default_rng(0)
    piece = generator.integers(0, 256, n_bytes // 64, np.uint8)
    sources = [runtime.allocate(n_bytes, bench.device, 0) for _ in range(BUFFERS)]
    targets = [runtime.allocate(n_elements * itemsize, bench.device, 0) for _ in range(BUFFERS)]
    for memory in sources:
        for part in range(64):
            runtime.copy_to_device(memory.pointer + part * piece.size, piece, 0)
    row = {"format": source.name, "dtype": dtype, "elements": n_elements, "bytes": moved}
    expected = nd.dequantize(piece, source, dtype, device="reference")
    for mapping in ("tile", "block"):

        def work(turn, mapping=mapping):
            gpu.dequantize_into(sources[turn], source, dtype, n_elements, targets[turn], 0, mapping)

        targets[0].owner.fill(0xA5, stream=bench.stream)
        work(0)
        for part in (0, 31, 63):
            found = np.empty(expected.size, expected.dtype)
            runtime.copy_to_host(found, targets[0].pointer + part * found.nbytes, 0)
            assert difference(found, expected)[0] == 0, f"{source.name} to {dtype} by {mapping} is wrong"
        row[mapping] = moved / bench.seconds(work) / 1e9
    row["roof"] = bench.roof(source, itemsize, n_elements, sources, targets) / 1e9
    row["share"] = row["tile"] / row["roof"]
    return row


def machine(bench):
    packages = ("numba-dequant", "numba", "numba-cuda", "cuda-core", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = nd.__version__
    return {"gpu": bench.device.name, "python": platform.python_version(), "versions": versions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(n for n, f in nd.FORMATS.items() if f.block_size > 1))
    parser.add_argument("--dtypes", default="float16")
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    bench = Bench(0)
    with runtime.current(0):
        result = {
            "command": " ".join(["python benchmarks/throughput.py", *sys.argv[1:]]).partition(" --json")[0],
            "machine": machine(bench),
            "device_copy": bench.device_copy() / 1e9,
            "rows": [],
        }
        print(f"{bench.device.name}, device copy {result['device_copy']:.0f} GB/s")
        print("format   dtype       GB/s  roof  share  literal mapping")
        for name in options.formats.split(","):
            for dtype in options.dtypes.split(","):
                row = measure(bench, nd.FORMATS[name], dtype, options.elements)
                result["rows"].append(row)
                print(
                    f"{name:8} {dtype:9} {row['tile']:6.0f} {row['roof']:5.0f} {row['share']:6.1%} {row['block']:6.0f}",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
