"""The safetensors format: which tensor is where in which file, and the headers of the files.

A file is the length of the header in 8 bytes, the header in JSON, and the data of the tensors without gaps. A model may
be divided into shards; Hugging Face's index file then says which tensor is in which shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_dequant.cli import json_text
from numba_dequant.errors import DtypeError, GgufError, OptionError, shown, warn
from numba_dequant.gguf.metadata import Metadata
from numba_dequant.gguf.tensors import TensorInfo

SUFFIX = ".safetensors"

INDEX_SUFFIX = ".index.json"
"""What the name of the index file adds to the name of the model."""

METADATA = "__metadata__"
"""The key of the header that is no tensor."""

PREFIX = "gguf."
"""The prefix of the keys of the GGUF file in `__metadata__`, where programs look for keys of their own."""

MAX_HEADER = 100_000_000
"""Maximum bytes of a header, as in the package safetensors."""

MAX_METADATA = 32 << 20
"""Maximum bytes of the metadata in a header. That of a model with the largest tokenizer known is a fourth of it."""

DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip
"""The names of NumPy's dtypes in safetensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype there, and where its data is, counted from the end of the header."""

    tensor: TensorInfo
    dtype: np.dtype[Any]
    start: int

    @property
    def n_bytes(self) -> int:
        """The bytes of its values."""
        return self.tensor.n_elements * self.dtype.itemsize

    def described(self) -> dict[str, Any]:
        """What the header says of it."""
        ends = [self.start, self.start + self.n_bytes]
        return {"dtype": DTYPES[self.dtype.name], "shape": list(self.tensor.shape), "data_offsets": ends}


@dataclass(frozen=True)
class Shard:
    """A file of the model: its name and its tensors, in the order of the GGUF file."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def n_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(entry.n_bytes for entry in self.entries)


def plan_shards(tensors: Sequence[TensorInfo], dtype: str, name: str, shard_bytes: int | None) -> list[Shard]:
    """The files of a model that is called `name`, which ends in `SUFFIX`.

    A shard has at most `shard_bytes` of data, or one tensor. None means one file.

    Raises:
        DtypeError: safetensors lacks the type of a tensor.
        GgufError: the name of a tensor is `METADATA`.
    """
    groups: list[list[TensorInfo]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        n_bytes = tensor.n_elements * _dtype_of(tensor, dtype).itemsize
        if room is not None and shard_bytes is not None:
            if n_bytes > room and groups[-1]:
                groups.append([])
                room = shard_bytes
            room = max(room - n_bytes, 0)
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [Shard(name, _entries(groups[0], dtype))]
    stem = name.removesuffix(SUFFIX)
    names = [f"{stem}-{number:05}-of-{len(groups):05}{SUFFIX}" for number in range(1, len(groups) + 1)]
    return [Shard(each, _entries(group, dtype)) for each, group in zip(names, groups, strict=True)]


def _dtype_of(tensor: TensorInfo, dtype: str) -> np.dtype[Any]:
    found = tensor.format.result_dtype(dtype)
    if found.name not in DTYPES:
        raise DtypeError(f"tensor {shown(tensor.name)} holds {found.name}, which safetensors lacks; leave it out")
    if tensor.name == METADATA:
        reason = f"a tensor is called {METADATA}, which safetensors files use otherwise; leave it out with --select"
        raise GgufError(tensor.path, "tensor name", None, METADATA, "any other name", reason)
    return found


def _entries(tensors: Sequence[TensorInfo], dtype: str) -> tuple[Entry, ...]:
    # Data without gaps is aligned if the largest elements come first.
    dtypes = [_dtype_of(tensor, dtype) for tensor in tensors]
    starts, start = [0] * len(tensors), 0
    for index in sorted(range(len(tensors)), key=lambda index: -dtypes[index].itemsize):
        starts[index] = start
        start += tensors[index].n_elements * dtypes[index].itemsize
    return tuple(map(Entry, tensors, dtypes, starts))


def header(shard: Shard, metadata: dict[str, str]) -> bytes:
    """The start of a file, up to the data.

    Raises:
        OptionError: it would be longer than safetensors allows.
    """
    described: dict[str, Any] = {METADATA: metadata}
    for entry in sorted(shard.entries, key=lambda entry: entry.start):
        described[entry.tensor.name] = entry.described()
    content = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    if len(content) > MAX_HEADER:
        raise OptionError(
            f"the header of {shard.name} would have {len(content):,} bytes, and safetensors allows {MAX_HEADER:,}; "
            "pass a smaller --shard-size"
        )
    return len(content).to_bytes(8, "little") + content


def metadata_texts(metadata: Metadata) -> dict[str, str]:
    """The metadata of a GGUF file for `__metadata__`, which has strings only: each value is JSON.

    A warning names what is left out because it is too long.

    Raises:
        NumbaDequantError: the file cannot be read.
    """
    texts = {"format": "pt"}  # what transformers expects
    room = MAX_METADATA
    for key, value in metadata.unread():
        found = json_text.value_text(value, room)
        n_bytes = None if found is None else len(json.dumps([key, found], ensure_ascii=False).encode())
        if found is None or n_bytes is None or n_bytes > room:
            warn(f"metadata {shown(key)} is left out, because the header would be too long")
            continue
        room -= n_bytes
        texts[PREFIX + key] = found
    return texts


def index(shards: Iterable[Shard]) -> bytes:
    """The contents of the index file."""
    places = {entry.tensor.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(shard.n_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode() + b"\n"
