"""Guesses, from its first bytes, what a file is that is not GGUF."""

from __future__ import annotations

import re

LOOKED_AT = 4096
"""Bytes from the start of a file that are examined."""

CONVERT = "convert the model with llama.cpp's convert_hf_to_gguf.py"
OLD = "an old format of llama.cpp, from before GGUF: download the model as GGUF, or convert it"
UNPACK = "unpack it first"

STARTS = (
    (rb"version https://git-lfs", "a Git LFS pointer instead of the file: run git lfs pull, or download the file"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)",
        "a web page, perhaps a login or error page: check the address of the download",
    ),
    (rb"\x00\x05\x16\x07", "a macOS ._ file (AppleDouble) without data: open the file without ._ in its name"),
    (rb"PK\x03\x04", f"a zip archive, as PyTorch checkpoints are: {CONVERT}"),
    (rb"\x80[\x02-\x05]", f"a Python pickle, as old PyTorch checkpoints are: {CONVERT}"),
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes: {CONVERT}"),
    (rb"\x93NUMPY", "a NumPy array: read it with numpy.load"),
    (rb"lmgg|ggml|GGML", f"a GGML file without a version, {OLD}"),
    (rb"fmgg|ggmf", f"a GGMF file, {OLD}"),
    (rb"tjgg|ggjt", f"a GGJT file, {OLD}"),
    (rb"algg|ggla", f"a GGLA file, a LoRA adapter in {OLD}"),
    (rb"nsgg|ggsn", "a saved session of llama.cpp, without a model"),
    (rb"FUGG", "a GGUF file whose bytes have been swapped in groups of four: download or convert it again"),
    (rb"\x1f\x8b", f"compressed by gzip: {UNPACK}"),
    (rb"\xfd7zXZ\x00", f"compressed by xz: {UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"compressed by zstd: {UNPACK}"),
    (rb"BZh[1-9]", f"compressed by bzip2: {UNPACK}"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive: {UNPACK}"),
    (rb"Rar!", f"a rar archive: {UNPACK}"),
    (rb".{257}ustar", f"a tar archive: {UNPACK}"),
    (rb".{5}\x00{3}\{", f"a safetensors file: {CONVERT}"),
    (rb"\x7fELF|MZ|\xcf\xfa\xed\xfe", "a program; for a llamafile, pass the position of its GGUF file as offset="),
)
"""A pattern of the first bytes, what the file is, and what to do."""


TEXTS = (
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}\d].*", "JSON text, such as an index, a configuration or a server response"),
    (rb"[\t\n\r\x20-\x7e]+", "text"),
)
"""A pattern of all examined bytes, and what the file is. The error also shows the first words."""


def guess(start: bytes) -> str | None:
    """What a file with these first bytes is, and what to do; None if unknown."""
    if not start:
        return "an empty file: download it again"
    if not start.strip(b"\0"):
        return "a download that has only reserved its space (it begins with zeros): wait for it, or download again"
    for pattern, what in STARTS:
        if re.match(pattern, start, re.DOTALL):
            return what
    for pattern, what in TEXTS:
        if re.fullmatch(pattern, start, re.DOTALL):
            return f"{what}: {start.strip()[:60].decode('ascii', 'replace')!r}"
    return None
