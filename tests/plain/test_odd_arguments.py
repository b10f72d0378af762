"""Every kind of wrong thing as every argument of every function: it works, or is refused with a sentence."""

import enum
import math
import pathlib
import re
import sys
import threading
import warnings
from contextlib import suppress

import numpy as np
import pytest
from three_tensors import BLOCKS, open_model

import numba_dequant as nd

with suppress(ImportError):
    import torch


@pytest.fixture
def model(tmp_path):
    return open_model(tmp_path)


class Hostile:
    """An object that fails whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError("no")

    __repr__ = __str__ = __len__ = __iter__ = __index__ = __float__ = __eq__ = __hash__ = __bool__ = __getattr__


def freed_tensor():
    """PyTorch itself ends the process where its values are looked at."""
    tensor = torch.zeros(34, dtype=torch.uint8)
    tensor.untyped_storage().resize_(0)
    return tensor


def odd_things():
    """One of every kind, made anew for each call."""
    yield from {
        "None": None,
        "True": True,
        "an int": 3,
        "a negative int": -7,
        "a huge int": 10**5000,
        "a float": 2.5,
        "NaN": math.nan,
        "a complex": 1j,
        "a str": "odd",
        "an empty str": "",
        "a surrogate": "\ud800",
        "a NUL": "a\0b",
        "a long str": "x" * 100_000,
        "bytes": b"odd",
        "a bytearray": bytearray(34),
        "a memoryview": memoryview(bytes(68))[::2],
        "a list": [1, "a"],
        "a deep list": [[[]]],
        "a tuple": (1, 2),
        "a dict": {"a": 1},
        "a set": {1},
        "an object": object(),
        "a class": type("Class", (), {"__init__": lambda self, *given: None}),
        "a hostile object": Hostile(),
        "a function": lambda *given: None,
        "a generator": (n for n in range(3)),
        "a range": range(3),
        "a slice": slice(0, 2.0),
        "a path": pathlib.Path("odd"),
        "an expression": re.compile(b"odd"),
        "a member": enum.Enum("kinds", {"ODD": "odd"}).ODD,
        "an exception": ValueError("odd"),
        "0-d": np.array(5.0),
        "1-d": np.arange(3),
        "2-d": np.zeros((2, 2)),
        "a matrix": np.ones((1, 2)).view(np.matrix),
        "objects": np.array([None, 1]),
        "texts": np.array(["a"]),
        "masked": np.ma.masked_array([1, 2], [True, False]),
        "a scalar": np.float16(3),
        "a bool of NumPy": np.bool_(True),
        "a dtype": np.dtype("f8"),
        "a module": math,
        "a Format": nd.FORMATS["Q4_0"],
    }.items()
    if "torch" in sys.modules:
        yield from {
            "a tensor": torch.zeros(3),
            "a tensor of one": torch.tensor(5),
            "a bfloat16 tensor": torch.zeros(3, dtype=torch.bfloat16),
            "a meta tensor": torch.zeros(34, device="meta"),
            "a freed tensor": freed_tensor(),
            "freed tensors": [freed_tensor()],
            "a sparse tensor": torch.eye(3).to_sparse(),
            "a parameter": torch.nn.Parameter(torch.zeros(2)),
            "torch.float64": torch.float64,
            "torch.device": torch.device("meta"),
            "torch.Size": torch.Size([3]),
        }.items()


ODD = [label for label, _ in odd_things()]

LOADING = "dtype device stream keep_quantized threads"


def each(function, names, **right):
    """For every name a call that is right but for the argument of that name."""
    for name in names.split():
        yield f"{function.__name__} {name}", lambda odd, name=name: function(**(right | {name: odd}))


def calls(model, out):
    """Every argument of every function."""
    blocks = bytes(BLOCKS)
    yield from each(
        nd.dequantize, "data format dtype shape device out stream mapping", data=blocks, format=8, device="cpu", out=out
    )
    good, other = (blocks, "Q8_0"), np.empty(192, np.float16)
    right = {"tensors": {"a": good, "b": good}, "device": "cpu", "out": {"a": out, "b": other}}
    for function in (nd.dequantize_many, nd.prepare_many):
        yield from each(function, "tensors dtype device out stream", **right)
        for label, change in {
            "entry": lambda odd: {"tensors": {"a": good, "b": odd}},
            "data": lambda odd: {"tensors": {"a": good, "b": (odd, "Q8_0")}},
            "format": lambda odd: {"tensors": {"a": good, "b": (blocks, odd)}},
            "shape": lambda odd: {"tensors": {"a": good, "b": (blocks, "Q8_0", odd)}},
            "out": lambda odd: {"out": {"a": out, "b": odd}},
        }.items():
            yield (
                f"{function.__name__} {label} of a tensor",
                lambda odd, function=function, change=change: function(**(right | change(odd))),
            )
    name = "blk.0.attn_norm.weight"
    yield from each(model.load, f"name out rows {LOADING}", name=name, device="cpu", out=out[:5])
    right = {"device": "cpu", "out": {name: out[:5]}}
    yield from each(model.load_all, f"select out progress callback {LOADING}", **right)
    yield from each(nd.load, f"source select out progress callback {LOADING}", source=model.path, **right)
    yield "load_all select of several", lambda odd: model.load_all(["ids", odd], device="cpu")
    yield "load_all dtype of a pattern", lambda odd: model.load_all(dtype={"blk*": odd, "*": "fp16"}, **right)
    yield "load_all out of a tensor", lambda odd: model.load_all(device="cpu", out={name: out[:5], "ids": odd})

    def stream(**options):
        return list(model.stream(**options))

    yield from each(stream, f"select prefetch progress callback {LOADING}", device="cpu")
    yield from each(model.read, "name mmap", name="ids")
    yield from each(nd.open, "source offset allow_truncated orig_shapes", source=model.path)
    yield from each(nd.release_buffers, "device")
    yield from each(nd.explain, "data format block element", data=blocks, format="Q8_0")
    yield "register", nd.register
    source = nd.FORMATS["Q8_0"]
    fields = {"name": "OWN", "ggml_id": 911, "block_size": 32, "layout": source.layout, "summary": ""}
    fields |= {"dequantize": source.dequantize, "decode": source.decode}
    yield from each(nd.Format, " ".join(fields), **fields)
    yield from each(source.n_elements, "n_bytes")
    yield from each(source.n_bytes, "shape")
    yield from each(source.picture, "element raw", element=0)
    tensor = nd.QuantizedTensor(np.frombuffer(blocks, np.uint8), source, (192,))
    yield from each(tensor.dequantize, "dtype device out mapping", device="cpu")


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_argument_works_or_is_refused_with_a_sentence(model, kind):
    """Nothing is written to `out` then, and no thread is left."""
    threads = set(threading.enumerate())
    refused = taken = 0
    out = np.empty(192, np.float16)
    for name, call in calls(model, out):
        odd = dict(odd_things())[kind]
        out[:] = 7
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # no device given, and no GPU
                call(odd)
        except nd.NumbaDequantError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        else:
            taken += 1
            continue
        if not name.endswith(" source"):  # the path of a file is shown as it is
            assert 15 < len(said) < 800, (name, said)
            assert said.isprintable(), (name, said)
        assert (out == 7).all(), name
        refused += 1
    assert refused > taken or kind == "None"
    assert set(threading.enumerate()) <= threads
