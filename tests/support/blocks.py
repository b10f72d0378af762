"""Blocks, the values that they stand for, and files of them."""

import struct
from pathlib import Path

import numpy as np

import numba_dequant as nd
from numba_dequant import FORMATS, Format
from numba_dequant.bits import half, load_8_bytes, load_u16, signed_bytes
from numba_dequant.dtypes import NAMES, numpy_dtype
from numba_dequant.format import block_layout

DATA = Path(__file__).parents[1] / "data"

QUANTIZED = [name for name, source in FORMATS.items() if source.block_size > 1]
DECODED = [name for name, source in FORMATS.items() if source.decode is not None]
GOLDEN = sorted(path.stem for path in (DATA / "golden").glob("*.npz"))
DTYPES = list(NAMES)


def bytes_format(block_size):
    """A format of one's own: a scale, and a signed byte for each element."""
    layout = block_layout(d="f2", qs=("i1", block_size))

    def dequantize(blocks):
        return blocks["d"].astype(np.float32)[:, None] * blocks["qs"].astype(np.float32)

    def decode(block, at, run):
        quants = load_8_bytes(block, at + 2 + 8 * run)
        return half(load_u16(block, at)) * signed_bytes(quants)

    return Format(f"BYTES_{block_size}", 9000 + block_size, block_size, layout, "bytes", dequantize, decode)


def assert_all_values(block_size, device, mapping="tile", dtype="float16"):
    """All values of blocks of that many bytes are right, and nothing keeps what was in the memory."""
    fmt = bytes_format(block_size)
    blocks = np.zeros(max(4500 // block_size, 3), fmt.layout)
    blocks["d"], blocks["qs"] = 2, np.random.default_rng(0).integers(-64, 64, blocks["qs"].shape)
    out = np.full(blocks.size * block_size, 7, numpy_dtype(dtype))
    options = {"mapping": mapping} if device == "cuda" else {"out": out}
    found = nd.dequantize(blocks.view(np.uint8), fmt, dtype, device=device, **options)
    values = found if isinstance(found, np.ndarray) else found.copy_to_host()
    np.testing.assert_array_equal(values.astype(np.float32), 2.0 * blocks["qs"].reshape(-1))


def golden(name):
    """Bytes and GGML's float32 values, both (n_blocks, ...)."""
    with np.load(DATA / "golden" / f"{name}.npz") as file:
        return file["bytes"], file["f32"]


def shifted(array, n_bytes=1):
    """A copy of an array at an address that is `n_bytes` beyond a multiple of 16."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 16 + n_bytes
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def rounded(values, dtype):
    with np.errstate(all="ignore"):
        return values.astype(numpy_dtype(dtype))


def assert_same_bits(found, expected):
    """Equal bit for bit; a NaN need only be a NaN."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = f"u{found.itemsize}"
    with np.errstate(all="ignore"):
        missing = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), missing)
    np.testing.assert_array_equal(found.view(bits)[~missing], expected.view(bits)[~missing])


def random_blocks(name, n_blocks, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n_blocks * FORMATS[name].type_size, np.uint8)


def write_model(path, tensors, metadata=()):
    """A GGUF file of name -> (format name, shape, bytes); gguf-py's writer does not know every format."""

    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata:
        header += string(key) + struct.pack("<I", 8) + string(value)
    data = b""
    for name, (kind, shape, values) in tensors.items():
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", FORMATS[kind].ggml_id, len(data))
        data += bytes(values) + bytes(-len(bytes(values)) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


SCALES_OF_ONE_BYTE = {"MXFP4": "e", "NVFP4": "d"}
"""The field of the scales."""


def every_scale(name):
    """Random blocks that have each byte as a scale."""
    layout = nd.FORMATS[name].layout
    scales = np.arange(256, dtype=np.uint8).reshape(-1, *layout[SCALES_OF_ONE_BYTE[name]].shape)
    data = random_blocks(name, len(scales))
    data.view(layout)[SCALES_OF_ONE_BYTE[name]] = scales
    return data
