"""Damaged files: nothing but errors of ours leaves the reader, and what it takes is what gguf-py takes for it."""

import random
import struct
import warnings

import gguf
import numpy as np
import pytest
from blocks import DATA
from gguf_bytes import BOOL, FLOAT32, INT32, STRING, UINT32, UINT64, floats, value
from gguf_bytes import gguf as gguf_file

import numba_dequant as nd

SEEDS = [
    path.read_bytes()[:20_000] for path in sorted((DATA / "gguf").glob("*/*.gguf")) if path.stat().st_size < 60_000
]
SEEDS += [
    gguf_file(
        [("t", *floats(2, 3)), ("name", (2, 64), "Q8_0", bytes(136)), ("empty", (0, 4), "F32", b"")],
        [
            value("general.alignment", UINT32, 32, order),
            value("text", STRING, "text", order),
            value("tokens", STRING, ["a", "", "ü", "long" * 80] * 30, order),
            value("numbers", INT32, list(range(20)), order),
            value("floats", FLOAT32, [1.5, 2.5], order),
            value("bool", BOOL, 1, order),
        ],
        order,
    )
    for order in "<>"
]

WORDS = [0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 33, 255, 256, 65535, 65536, 1 << 20, (1 << 26) + 1, (1 << 31) - 1, 1 << 31]
WORDS += [(1 << 32) - 1, 1 << 32, 1 << 60, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1]


def damaged(content, random):
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(content)) if content else 0
        if random.random() < 0.7:
            at = min(at, random.randrange(400))
        kind = random.choice(["bit", "byte", "u32", "u64", "cut", "delete", "insert", "repeat", "zeros"])
        if kind == "bit" and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif kind == "byte" and at < len(content):
            content[at] = random.randrange(256)
        elif kind in ("u32", "u64"):
            order, size = random.choice("<>"), 4 if kind == "u32" else 8
            word = random.choice(WORDS) & ((1 << 8 * size) - 1)
            content[at : at + size] = struct.pack(order + ("I" if size == 4 else "Q"), word)
        elif kind == "cut":
            del content[at + random.randrange(200) :]
        elif kind == "delete":
            del content[at : at + random.randrange(1, 40)]
        elif kind == "insert":
            content[at:at] = random.randbytes(random.randrange(1, 40))
        elif kind == "repeat":
            content[at:at] = content[at : at + random.randrange(1, 200)]
        elif kind == "zeros":
            content[at:at] = bytes(random.randrange(1, 4000))
    return bytes(content)


def use(model):
    """Everything that can be done with a model, and what its tensors hold."""
    found = {}
    dict(model.metadata)
    model._repr_html_()
    repr(model.metadata)
    for name, tensor in model.tensors.items():
        if tensor.n_elements > 1 << 20:
            continue
        try:
            found[name] = model.load(name, "float32", device="reference")
        except nd.GgufError:
            assert tensor.offset + tensor.n_bytes > tensor.source.stamp.size
            continue
        assert found[name].shape == tensor.shape
        assert model.read(name).size == tensor.n_bytes
        if tensor.shape:
            model.load(name, "float32", device="reference", rows=slice(0, 0))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_errors_of_ours_or_load(tmp_path, seed):
    path, n_opened = tmp_path / "m.gguf", 0
    chance = random.Random(seed)
    for _ in range(400):
        content = damaged(chance.choice(SEEDS), chance)
        options = {"allow_truncated": chance.random() < 0.3, "orig_shapes": chance.random() < 0.3}
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        outcomes = []
        for source in (path, bytearray(content)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    outcomes.append(use(nd.open(source, **options)))
            except nd.GgufError as error:
                outcomes.append((error.field, error.offset, str(error.found), error.allowed))
        np.testing.assert_equal(outcomes[0], outcomes[1])
        n_opened += isinstance(outcomes[0], dict)
    assert 40 < n_opened < 360


def test_what_gguf_py_takes_too_has_the_same_values(tmp_path):
    """It believes more than we do; where both take a file, its bytes are ours."""
    path, n_compared = tmp_path / "m.gguf", 0
    chance = random.Random(7)
    seeds = [content for content in SEEDS if content[4:8] == struct.pack("<I", 3)]
    for _ in range(1500):
        path.unlink(missing_ok=True)
        path.write_bytes(damaged(chance.choice(seeds), chance))
        try:
            ours = nd.open(path)
        except nd.GgufError:
            continue
        if len(ours.tensors) > 50 or any("\0" in key for key in ours.metadata):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = gguf.GGUFReader(path)
        except Exception:
            continue
        if len(theirs.tensors) != len(ours.tensors):
            continue
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name.rstrip("\0")]
            if mine.format.name == "Q8_1":  # gguf-py thinks that its blocks have 40 bytes
                continue
            assert mine.offset == tensor.data_offset
            assert mine.shape == tuple(int(extent) for extent in reversed(tensor.shape))
            np.testing.assert_array_equal(
                ours.read(mine.name), np.ascontiguousarray(tensor.data).reshape(-1).view("u1")
            )
            n_compared += 1
    assert n_compared > 100


@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
def test_string_arrays_are_walked_as_one_string_after_the_other(order):
    """Whatever they look like: the shortcuts must not take one string for another."""
    chance = random.Random(11)
    pieces = [b"", b"\0", b"a", b"\0" * 8, b"\1" + bytes(7), bytes(7) + b"\1", b"x" * 255, b"y" * 256, bytes(300)]
    for _ in range(150):
        chosen = chance.sample(pieces, chance.randint(1, 4))
        strings = [chance.choice(chosen) for _ in range(chance.choice([1, 63, 64, 65, 200, 3000]))]
        content = gguf_file(
            entries=[value("a", STRING, strings, order), value("b", UINT64, 1 << 40, order)], order=order
        )
        metadata = nd.open(content).metadata
        assert metadata["b"] == 1 << 40
        assert metadata["a"] == [string.decode() for string in strings]
