"""Files that are no GGUF files: each says what it probably is."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from gguf_bytes import gguf

import numba_dequant as nd


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return file.getvalue()


def numpy_array():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def safetensors():
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(4)


GOOD = gguf()
FILES = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(100_000), "a download that has only reserved its space"),
    "HTML": (b"<!DOCTYPE html><html><head>", "a web page"),
    "lower-case HTML": (b"\n  <html lang=en>", "a web page"),
    "HTML with a mark": (b"\xef\xbb\xbf<!doctype HTML>", "a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n", "a Git LFS pointer"),
    "safetensors": (safetensors(), "a safetensors file"),
    "zip": (zipped(), "a zip archive, as PyTorch checkpoints are"),
    "pickle": (pickle.dumps({"w": 1}, protocol=2), "a Python pickle"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "a macOS ._ file"),
    "GGML": (struct.pack("<I", 0x67676D6C) + bytes(60), "a GGML file"),
    "GGMF": (struct.pack("<II", 0x67676D66, 1) + bytes(60), "a GGMF file"),
    "GGJT": (struct.pack("<II", 0x67676A74, 3) + bytes(60), "a GGJT file"),
    "GGLA": (struct.pack("<II", 0x67676C61, 1) + bytes(60), "a GGLA file, a LoRA adapter"),
    "gzip": (gzip.compress(GOOD), "compressed by gzip"),
    "xz": (lzma.compress(GOOD), "compressed by xz"),
    "bzip2": (bz2.compress(GOOD), "compressed by bzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24\x00", "compressed by zstd"),
    "tar": (tarred(), "a tar archive"),
    "NumPy": (numpy_array(), "a NumPy array"),
    "JSON": (b'{"error": "Entry not found"}', "JSON text, .*Entry not found"),
    "JSON in lines": (b'[\n  {"a": 1},', "JSON text"),
    "text": (b"Invalid username or password.", "text: 'Invalid username or password.'"),
    "a program": (b"\x7fELF\2\1\1" + bytes(60), "a program; for a llamafile"),
    "a llamafile": (b"MZqFpD='\n", "a program; for a llamafile"),
    "Mach-O": (b"\xcf\xfa\xed\xfe\7\0\0\1" + bytes(60), "a program; for a llamafile"),
    "GGML as text": (b"GGML" + bytes(60), "a GGML file"),
    **{f"{name} as text": (name.lower().encode() + bytes(60), f"a {name} file") for name in ("GGMF", "GGJT", "GGLA")},
    "a session": (struct.pack("<II", 0x6767736E, 1) + bytes(60), "a saved session of llama.cpp"),
    "a session as text": (b"ggsn" + bytes(60), "a saved session of llama.cpp"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "rar": (b"Rar!\x1a\7\1\0", "a rar archive"),
    "one letter": (b"X" * 100, "text: 'XXX"),
    "swapped": (b"FUGG" + bytes(60), "a GGUF file whose bytes have been swapped"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("offset", [0, 3])
def test_a_file_that_is_something_else_says_what(tmp_path, kind, offset):
    content, expected = FILES[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc"[:offset] + content)
    with pytest.raises(nd.GgufError, match=f"at byte {offset}: this is not a GGUF file") as caught:
        nd.open(path, offset=offset)
    if content or not offset:
        caught.match(f"it looks like {expected}")


def test_what_is_not_known_is_not_guessed():
    for content in (b"\xaa" * 100, b"\1\2\3\4", b"GGUG\3\0\0\0", b"X\0\0\0", b"\xff"):
        with pytest.raises(
            nd.GgufError, match=r"this is not a GGUF file: it (begins with b'.*', not b'GGUF'|has only 1 bytes)$"
        ):
            nd.open(bytearray(content))


def test_only_the_first_bytes_are_looked_at():
    for content, what in ((b"a" * 4096 + b"\xff", "it looks like text: 'a"), (b"a" * 4095 + b"\xff", "not b'GGUF'$")):
        with pytest.raises(nd.GgufError, match=what):
            nd.open(bytearray(content))


def test_version_1_is_said_to_be_old():
    with pytest.raises(nd.GgufError, match="at byte 4: GGUF version 1, used in August 2023 only"):
        nd.open(gguf(version=1))


@pytest.mark.parametrize("kind", sorted(FILES))
def test_what_is_guessed_does_not_steer_the_terminal(kind):
    content = FILES[kind][0] + b"\x1b[31m"
    with pytest.raises(nd.GgufError) as caught:
        nd.open(bytearray(content))
    assert str(caught.value).isprintable()
