"""Write numba_dequant/sample/sample.gguf: a tensor of every format, for `numba-dequant verify` without a file.

Run it after adding a format: python tests/make_sample.py
"""

import struct
from pathlib import Path

import numpy as np

from numba_dequant import FORMATS

ROWS, COLUMNS = 16, 1024
ALIGNMENT = 32
TARGET = Path(__file__).parents[1] / "numba_dequant" / "sample" / "sample.gguf"


def blocks(source, generator):
    """Random bytes, with the scales of most blocks made ordinary numbers; all others mean something as they are."""
    n_blocks = ROWS * COLUMNS // source.block_size
    data = generator.integers(0, 256, (n_blocks, source.type_size), np.uint8).view(source.layout)[:, 0]
    for name in source.layout.names:
        kind = data[name].dtype
        if kind.kind == "f" and data[name].ndim == 1:
            ordinary = generator.normal(0, 0.02, n_blocks).astype(kind)
            data[name] = np.where(np.arange(n_blocks) % 16 == 15, data[name], ordinary)
    return data.tobytes()


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def main():
    generator = np.random.default_rng(20261124)
    metadata = [("general.architecture", "sample"), ("general.name", "one tensor of every format")]
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(FORMATS), len(metadata))
    for key, value in metadata:
        header += string(key) + struct.pack("<I", 8) + string(value)
    data = b""
    for source in FORMATS.values():
        header += string(f"sample.{source.name.lower()}")
        header += struct.pack("<IQQIQ", 2, COLUMNS, ROWS, source.ggml_id, len(data))
        data += blocks(source, generator)
        data += bytes(-len(data) % ALIGNMENT)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(header + bytes(-len(header) % ALIGNMENT) + data)
    print(f"{TARGET}: {len(FORMATS)} tensors, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
