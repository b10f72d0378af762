"""Several threads and processes at once: on one folder of compiled code, and on the same files."""

import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import structured
from choices import Choices
from computing import FEW, same_bits
from loading import expected_of, ids_of

import numba_dequant as nd
from numba_dequant import disk_cache

AT_WORK = """
import contextlib, hashlib, os, random, sys, threading, warnings
from numba_dequant import disk_cache

warnings.simplefilter("error")
disk_cache.MAX_BYTES = 60_000
found, wrong = [0], []

def payload(name, size):
    return f"{size:8}".encode() + hashlib.sha256(f"{name}{size}".encode()).digest() * size

def step(chance):
    name = disk_cache.cache_key("shared", str(chance.randrange(12)))
    way = chance.random()
    if way < 0.4:
        disk_cache.write(name, payload(name, chance.randrange(600)))
    elif way < 0.9:
        raw = disk_cache.read(name)
        assert raw is None or raw == payload(name, int(raw[:8])), name
        found[0] += raw is not None
    elif way < 0.95:
        disk_cache.entries()
        assert disk_cache.problem() is None
    elif way < 0.97:
        disk_cache.clear()
    else:  # a disk that was full has kept half of an entry
        with contextlib.suppress(FileNotFoundError):
            os.truncate(disk_cache.directory() / name, chance.randrange(40))

def work(seed):
    chance = random.Random(seed)
    try:
        for _ in range(400):
            step(chance)
    except BaseException as error:
        wrong.append(error)

threads = [threading.Thread(target=work, args=(f"{sys.argv[1]} {number}",)) for number in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found[0])
sys.exit(repr(wrong) if wrong else 0)
"""


def test_processes_and_threads_write_read_clear_and_damage_one_cache(tmp_path, monkeypatch):
    """What is read is what was written under the name, or nothing."""
    monkeypatch.setenv("NUMBA_DEQUANT_CACHE_DIR", str(tmp_path / "cache"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", AT_WORK]
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(3)]
    for process in processes:
        said, complaint = process.communicate(timeout=60)
        assert process.returncode == 0, complaint
        assert int(said) > 20, said
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert not [name for name in left if not disk_cache.ENTRY_NAME.fullmatch(name)]
    disk_cache.clear()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_threads_load_the_same_and_other_files_at_once(tmp_path, device):
    """Good files have their values, and broken ones their error, as if each were alone."""
    files: list[tuple[Path, bytes]] = []
    for number in range(6):
        content = structured.valid(Choices(f"file {number}".encode()), ids_of(FEW)).content()
        files.append((tmp_path / f"{number}.gguf", content))
    files.append((tmp_path / "short.gguf", files[0][1][:40]))
    for path, content in files:
        path.write_bytes(content)
    models = {path: nd.open(path) for path, _ in files[:-1]}
    wrong, count = [], [0]

    def work(seed):
        chance = random.Random(seed)
        try:
            for _ in range(30):
                path, content = chance.choice(files)
                if path.name == "short.gguf":
                    with pytest.raises(nd.GgufError):
                        nd.open(path)
                    continue
                model = models[path] if chance.random() < 0.5 else nd.open(path)
                ways = [model.load_all, lambda model=model, **options: dict(model.stream(**options))]
                found = chance.choice(ways)(dtype="float32", device=device, threads=chance.choice([1, 2, None]))
                for name, values in found.items():
                    same_bits(values, expected_of(content, model.tensors[name], "float32"))
                count[0] += 1
        except BaseException as error:
            wrong.append(error)

    before = threading.active_count()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert count[0] > 60
    assert threading.active_count() <= before + 8  # those of the pool that computes stay


def test_one_batch_and_one_weight_serve_several_threads():
    """A run of a batch writes to its own results; products share the weight."""
    raw = np.random.default_rng(0).integers(0, 60, 34 * 64, np.uint8)
    expected = nd.dequantize(raw, "Q8_0", "float32", device="reference")
    weight = nd.QuantizedTensor(raw, nd.FORMATS["Q8_0"], (64, 32))
    x = np.ones((3, 32), np.float32)
    with np.errstate(all="ignore"):
        product = nd.matmul(x, weight, device="cpu")
    wrong = []

    def work():
        try:
            for _ in range(40):
                batch = nd.prepare_many({"a": (raw, "Q8_0")}, "float32", device="cpu")
                same_bits(batch.run()["a"], expected)
                same_bits(nd.matmul(x, weight, device="cpu"), product)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
