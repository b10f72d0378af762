"""Reads safetensors files without the package, so that tests of what we write do not depend on it."""

import json
import math

import numpy as np

from numba_dequant.dtypes import numpy_dtype

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPES |= {"F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}


def read(path):
    """The metadata and the arrays of a file, which keeps to the rules of the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    data = content[8 + length :]
    metadata = header.pop("__metadata__")
    assert all(isinstance(each, str) for pair in metadata.items() for each in pair)
    arrays, end = {}, 0
    for name, entry in header.items():  # data without gaps, in the order of the header
        name_of_dtype = DTYPES[entry["dtype"]]
        dtype = numpy_dtype(name_of_dtype) if name_of_dtype == "bfloat16" else np.dtype(name_of_dtype)
        start, stop = entry["data_offsets"]
        assert start == end
        assert start % dtype.itemsize == 0
        assert stop - start == math.prod(entry["shape"]) * dtype.itemsize
        arrays[name] = np.frombuffer(data[start:stop], dtype).reshape(entry["shape"])
        end = stop
    assert end == len(data)
    return metadata, arrays
