"""A small GGUF file in bytes, and whether a model has all of its values: what tests of sources of a model open."""

import numpy as np
from blocks import DATA
from gguf_bytes import INT32, counted, floats, gguf, value

GOOD = DATA / "gguf" / "good"
CONTENT = gguf([("t", *floats(4)), ("u", *floats(2, 3))], [value("a", INT32, [1, 2, 3])])
OTHER_HEADER = CONTENT.replace(b"\1\0\0\0\2\0\0\0\3\0\0\0", b"\4\0\0\0\5\0\0\0\6\0\0\0")


def assert_loads(model):
    for device in ("cpu", "reference"):
        found = model.load_all(dtype="float32", device=device)
        np.testing.assert_array_equal(found["t"], counted(4))
        np.testing.assert_array_equal(found["u"], counted(2, 3))
    np.testing.assert_array_equal(model.read("t").view("<f4"), counted(4))
    assert model.metadata["a"].to_list() == [1, 2, 3]
