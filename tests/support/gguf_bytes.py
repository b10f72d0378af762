"""GGUF files put together byte by byte, also such as no writer would write."""

import struct

import numpy as np

import numba_dequant as nd

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value, order="<"):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack(order + "Q", len(raw)) + raw


def entry(key, kind, payload, order="<"):
    return text(key, order) + struct.pack(order + "I", kind) + payload


def value(key, kind, content, order="<"):
    """A metadata entry: a number, a string, or a list of either."""
    if isinstance(content, (list, tuple)):
        head = struct.pack(order + "IQ", kind, len(content))
        return entry(key, ARRAY, head + b"".join(_raw(kind, item, order) for item in content), order)
    return entry(key, kind, _raw(kind, content, order), order)


def _raw(kind, content, order):
    return text(content, order) if kind == STRING else struct.pack(order + CODES[kind], content)


def gguf(tensors=(), entries=(), order="<", version=3, alignment=32):
    """A file of tensors (name, shape with rows first, format name, bytes) and metadata entries."""
    header = struct.pack(order + "4sIQQ", b"GGUF", version, len(tensors), len(entries)) + b"".join(entries)
    data = b""
    for name, shape, kind, raw in tensors:
        ggml_id = kind if isinstance(kind, int) else nd.FORMATS[kind].ggml_id
        header += text(name, order) + struct.pack(f"{order}I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack(order + "IQ", ggml_id, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return header + bytes(-len(header) % alignment) + data


def floats(*shape):
    """Shape, format and bytes of an F32 tensor that counts from 0."""
    return shape, "F32", np.arange(int(np.prod(shape)), dtype="<f4").tobytes()


def counted(*shape):
    """What such a tensor holds."""
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
