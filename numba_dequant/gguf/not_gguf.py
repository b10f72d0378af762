"""What a file is that does not begin as a GGUF file does: by its first bytes, which are those of something else."""

from __future__ import annotations

import re

LOOKED_AT = 4096
"""Bytes from the start of a file that are looked at."""

CONVERT = "convert the model with llama.cpp's convert_hf_to_gguf.py"
OLD = "an old format of llama.cpp, from before GGUF: download the model as GGUF, or convert it"
UNPACK = "unpack it first"

STARTS = (
    (rb"version https://git-lfs", "a Git LFS pointer, which stands for the file: run git lfs pull, or download it"),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)",
        "a web page, such as one for logging in, or of an error: check the address of the download",
    ),
    (rb"\x00\x05\x16\x07", "a macOS ._ file (AppleDouble), which only accompanies another: open the one without ._"),
    (rb"PK\x03\x04", f"a zip archive, as PyTorch checkpoints are: {CONVERT}"),
    (rb"\x80[\x02-\x05]", f"a Python pickle, as old PyTorch checkpoints are: {CONVERT}"),
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes: {CONVERT}"),
    (rb"\x93NUMPY", "an array of NumPy: numpy.load reads it"),
    (rb"lmgg|ggml|GGML", f"a GGML file without a version, {OLD}"),
    (rb"fmgg|ggmf", f"a GGMF file, {OLD}"),
    (rb"tjgg|ggjt", f"a GGJT file, {OLD}"),
    (rb"algg|ggla", f"a GGLA file, a LoRA adapter in {OLD}"),
    (rb"nsgg|ggsn", "a saved session of llama.cpp, which holds no model"),
    (rb"FUGG", "a GGUF file whose bytes have been swapped in groups of four: download or convert it again"),
    (rb"\x1f\x8b", f"compressed by gzip: {UNPACK}"),
    (rb"\xfd7zXZ\x00", f"compressed by xz: {UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"compressed by zstd: {UNPACK}"),
    (rb"BZh[1-9]", f"compressed by bzip2: {UNPACK}"),
    (rb"7z\xbc\xaf\x27\x1c", f"a 7z archive: {UNPACK}"),
    (rb"Rar!", f"a rar archive: {UNPACK}"),
    (rb".{257}ustar", f"a tar archive: {UNPACK}"),
    (rb".{5}\x00{3}\{", f"a safetensors file: {CONVERT}"),
    (rb"\x7fELF|MZ|\xcf\xfa\xed\xfe", "a program; a llamafile holds its GGUF file within, where offset= finds it"),
)
"""A pattern of the first bytes, and what the file is then, with what to do."""


TEXTS = (
    (rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\]}\d].*", "JSON text, such as an index, a configuration or a server's answer"),
    (rb"[\t\n\r\x20-\x7e]+", "text"),
)
"""A pattern of the whole start, and what the file is then; its first words say more."""


def guess(start: bytes) -> str | None:
    """What a file is that begins so, and what to do; None if nothing is known of it."""
    if not start:
        return "an empty file: download it again"
    if not start.strip(b"\0"):
        return "zeros at its beginning, as a download has that has only reserved its space: wait for it, or try again"
    for pattern, what in STARTS:
        if re.match(pattern, start, re.DOTALL):
            return what
    for pattern, what in TEXTS:
        if re.fullmatch(pattern, start, re.DOTALL):
            return f"{what}: {start.strip()[:60].decode('ascii', 'replace')!r}"
    return None
