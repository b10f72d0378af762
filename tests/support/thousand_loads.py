"""1000 loads of good and of hostile files by eight threads: `python thousand_loads.py <folder>`.

For test_many_loads.py. It prints a line of JSON: how many loads there were of each kind, and by how much memory,
handles and threads have grown.
"""

import ctypes
import gc
import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from blocks import QUANTIZED, assert_same_bits, random_blocks, write_model

import numba_dequant as nd

LOADS, WARM, THREADS = 1000, 200, 8
DEVICES = ("cpu", "cpu", "reference")


def good(folder):
    """Files of several formats, and what loading them gives: path -> name -> (values, bytes)."""
    found = {}
    for number, kind in enumerate(QUANTIZED):
        fmt = nd.FORMATS[kind]
        shape = (3 + number % 4, 4 * fmt.block_size)
        tensors = {
            "quantized": (kind, shape, random_blocks(kind, shape[0] * 4, seed=number)),
            "plain": ("F32", (5, 7), np.random.default_rng(number).standard_normal(35, np.float32).tobytes()),
        }
        path = write_model(folder / f"{kind}.gguf", tensors, [("general.architecture", kind)])
        values = {
            name: nd.dequantize(np.frombuffer(bytes(data), np.uint8), kind, shape=shape, device="reference")
            for name, (kind, shape, data) in tensors.items()
        }
        found[path] = {name: (values[name], bytes(data)) for name, (_, _, data) in tensors.items()}
    return found


def hostile(folder, paths):
    """Files that are cut off, or have other bytes in their header, and are no models."""
    found, chosen = [], random.Random(0)
    for number, path in enumerate(paths):
        data = path.read_bytes()
        broken = bytearray(data)
        if number % 3 == 0:
            broken = broken[: chosen.randrange(len(broken) - 4)]
        elif number % 3 == 1:
            broken[chosen.choice((0, 4, 8, 15, 16, 23))] ^= 0xFF  # magic, version, and the two counts
        else:
            at = data.index(b"quantized") + len("quantized")
            broken[at + chosen.randrange(4, 20)] ^= 0xF5  # the shape
        target = folder / f"hostile_{path.name}"
        target.write_bytes(broken)
        try:
            nd.load(target, device="reference")
        except nd.NumbaDequantError:
            found.append(target)
    return found


def load(path, expected, how):
    """Load a good file in one of several ways, and check what comes."""
    device = how.choice(DEVICES)
    way = how.randrange(5)
    if way == 0:
        found = nd.load(path, device=device)
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert_same_bits(tensor, expected[name][0])
    elif way == 1:
        for name, tensor in nd.load(path, device=device, keep_quantized=True).items():
            assert tensor.data.tobytes() == expected[name][1]
    elif way == 2:
        with nd.open(path) as model:
            for name, tensor in model.stream(device=device, prefetch=how.randrange(3)):
                assert_same_bits(tensor, expected[name][0])
                if how.random() < 0.3:
                    break
    elif way == 3:
        with nd.open(path.read_bytes()) as model:
            assert_same_bits(model.load("quantized", device=device), expected["quantized"][0])
    else:
        with nd.open(path) as model:
            for name in model.tensors:
                assert model.read(name, mmap=how.random() < 0.5).tobytes() == expected[name][1]


def state():
    """Memory, handles and threads of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "MB": int(status["VmRSS"].split()[0]) / 1024,
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def run(files, broken, numbers, counts, faults):
    for number in numbers:
        how = random.Random(number)
        try:
            if how.random() < 0.5:
                path = how.choice(list(files))
                load(path, files[path], how)
                counts["good"] += 1
            else:
                path = how.choice(broken)
                try:
                    nd.load(path.read_bytes() if how.random() < 0.3 else path, device=how.choice(DEVICES))
                except nd.NumbaDequantError:
                    counts["refused"] += 1
        except BaseException as error:
            faults.append(f"{number}: {type(error).__name__}: {error}")


def main():
    folder = Path(sys.argv[1])
    files = good(folder)
    broken = hostile(folder, files)
    for path in files:  # compiles
        nd.load(path, device="cpu")
    counts, faults = [Counter() for _ in range(THREADS)], []
    after = []
    for first, end in ((0, WARM), (WARM, LOADS)):
        threads = [
            threading.Thread(target=run, args=(files, broken, range(first + k, end, THREADS), counts[k], faults))
            for k in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after.append(state())
    growth = {name: after[1][name] - after[0][name] for name in after[0]}
    total = sum(counts, Counter())
    print(json.dumps({"files": [len(files), len(broken)], **total, "faults": faults[:5], "growth": growth}))


if __name__ == "__main__":
    main()
