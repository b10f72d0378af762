"""The header and the tensor table of a GGUF file, or of all shards of a split one, with all checks.

Source of the format: ggml's docs/gguf.md and src/gguf.cpp. Where they leave room, this is what we do:

* names of tensors may be as long as keys, 65535 bytes, and tensors have up to 8 dimensions: files of image and video
  models have names of over 63 bytes and 5 dimensions, which ggml refuses as it is usually built;
* NULs at the end of a key, a name or a string value are cut off (files of August 2023 have them); within a key or a
  string they stay, within a name they are refused. Items of arrays of strings stay as they are: InternLM2 has a token
  that is a NUL;
* a bool is True unless it is 0, alone and in arrays;
* a string value that is not UTF-8 does not make the file unreadable: what is wrong in it becomes U+FFFD;
* of the keys that begin with "split." only split.no, split.count and split.tensors.count mean anything, and must be
  integers;
* taken: a tensor without dimensions (a scalar), an empty tensor name, a dimension of 0, missing padding after the last
  tensor;
* refused: an empty key, keys and names that are not UTF-8, equal keys or names (once NULs are cut off), arrays within
  arrays, arrays of more than 64 Mi items, strings of more than 64 MiB, an alignment of more than 1 MiB, a shape that
  NumPy could not hold as float64, where a dimension of 0 counts as 1;
* a GGUF file that begins within another (`offset`) is aligned from its own beginning.

Nothing here imports CUDA packages or Numba, and nothing but the header is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from numba_dequant.arguments import flag_option, whole_option
from numba_dequant.errors import GgufError, MissingFileError, OptionError
from numba_dequant.gguf.metadata import MetadataArray
from numba_dequant.gguf.reader import MAX_DIMENSIONS, MAX_ELEMENTS, read_file
from numba_dequant.gguf.source import source_of
from numba_dequant.gguf.tensors import GgufFile, TensorInfo, TensorTable, truncated

__all__ = ["GgufFile", "TensorInfo", "TensorTable", "open_gguf", "truncated"]

MAX_SHARDS = 65535
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""What ComfyUI-GGUF puts before the name of a tensor that it has reshaped, to make the key of the shape it had."""


def open_gguf(source: Any, *, offset: int = 0, allow_truncated: bool = False, orig_shapes: bool = False) -> GgufFile:
    """Read the header of a GGUF file, and of the other shards if it is the first of a split.

    Args:
        source: a path, the contents of a file, or all shards of a split as a list of either, in any order.
        offset: byte at which the GGUF file begins.
        allow_truncated: take a file whose tensors' data is not all there, and a split that lacks later shards.
        orig_shapes: give tensors that ComfyUI-GGUF has reshaped the shapes that they had.

    Raises:
        GgufError: it is no GGUF file, breaks a rule of the format, is a later shard, or a shard is missing.
        MissingFileError: there is no such file.
        ReadError: it cannot be read.
        OptionError: an argument is of a wrong kind.
    """
    offset = whole_option("offset", offset, 0)
    allow_truncated = flag_option("allow_truncated", allow_truncated)
    orig_shapes = flag_option("orig_shapes", orig_shapes)
    if isinstance(source, (list, tuple)):
        file = _join_given(source, offset, allow_truncated=allow_truncated)
    else:
        origin = source_of(source)
        file = read_file(origin, offset, allow_truncated=allow_truncated)
        count = _split_number(file, "split.count", 0)
        if count > 1:
            paths = _shard_paths(file, count, None if offset or origin.data is not None else origin.path)
            file = _join_found(file, paths, allow_truncated=allow_truncated)
    return _with_original_shapes(file) if orig_shapes else file


def _join_given(sources: Sequence[Any], offset: int, *, allow_truncated: bool) -> GgufFile:
    """The model whose shards have been named, in any order."""
    if not sources or offset:
        raise OptionError("offset is for one file, not for a list" if offset else "the list of shards is empty")
    for each in sources:
        if isinstance(each, (list, tuple)):
            raise OptionError("a list of shards holds paths or bytes, not lists")
    origins = [source_of(each, number) for number, each in enumerate(sources, 1)]
    shards = [read_file(origin, allow_truncated=allow_truncated) for origin in origins]
    if len(shards) == 1 and _split_number(shards[0], "split.count", 0) <= 1:
        return shards[0]
    by_number: dict[int, GgufFile] = {}
    for shard in shards:
        _expect(shard, "split.count", len(shards), "the number of files in the list")
        number = _split_number(shard, "split.no", -1)
        if not 0 <= number < len(shards) or number in by_number:
            other = f" and in {by_number[number].path}" if number in by_number else ""
            found = f"{number}{other}" if number >= 0 else "none"
            raise GgufError(shard.path, "metadata 'split.no'", None, found, f"0 to {len(shards) - 1}, each in one file")
        by_number[number] = shard
    return _joined([by_number[number] for number in range(len(shards))])


def _join_found(first: GgufFile, paths: Sequence[str], *, allow_truncated: bool) -> GgufFile:
    """The model whose first shard has been read, and whose shards have these paths."""
    shards, missing = [first], []
    for number, path in enumerate(paths[1:], 1):
        try:
            shard = read_file(source_of(path), allow_truncated=allow_truncated)
        except MissingFileError:
            if not allow_truncated:
                found = f"{len(paths)}, but no file {path}"
                raise GgufError(first.path, "metadata 'split.count'", None, found, "all shards") from None
            missing.append(path)
            continue
        _expect(shard, "split.no", number, "as in its name")
        _expect(shard, "split.count", len(paths), "as in its name")
        shards.append(shard)
    return _joined(shards, tuple(missing))


def _joined(shards: Sequence[GgufFile], missing: tuple[str, ...] = ()) -> GgufFile:
    first = shards[0]
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise GgufError(shard.path, f"tensor {name!r} name", None, f"it in {tensors[name].path} too", "one")
            tensors[name] = tensor
    total = _split_number(first, "split.tensors.count", len(tensors))
    if total != len(tensors) and not missing:
        raise GgufError(first.path, "metadata 'split.tensors.count'", None, total, f"{len(tensors)}, as in the shards")
    return replace(
        first,
        tensors=TensorTable(tensors),
        shards=tuple(shard.path for shard in shards),
        n_bytes=sum(shard.n_bytes for shard in shards),
        n_bytes_here=sum(shard.n_bytes_here for shard in shards),
        missing_shards=missing,
    )


def _split_number(file: GgufFile, key: str, missing: int) -> int:
    value = file.metadata.get(key, missing)
    if key == "split.count" and not 0 <= value <= MAX_SHARDS:
        raise GgufError(file.path, f"metadata {key!r}", None, value, f"a number up to {MAX_SHARDS}")
    return int(value)


def _expect(shard: GgufFile, key: str, expected: int, why: str) -> None:
    found = shard.metadata.get(key)
    if found != expected:
        raise GgufError(shard.path, f"metadata {key!r}", None, found, f"{expected}, {why}")


def _shard_paths(first: GgufFile, count: int, path: str | None) -> list[str]:
    """The names of all shards, which follow from that of the first; if it is a link, perhaps from what it leads to."""
    wanted = rf"(.*)-(\d{{5}})-of-{count:05}(\.gguf)"
    names = [] if path is None else [first.path, os.path.realpath(path)]
    match = next(filter(None, (re.fullmatch(wanted, name, re.DOTALL) for name in names)), None)
    if match is None:
        allowed = f"a file name that ends in -00001-of-{count:05}.gguf, or all shards in a list: open([...])"
        raise GgufError(first.path, "metadata 'split.count'", None, count, allowed)
    paths = [f"{match[1]}-{number:05}-of-{count:05}{match[3]}" for number in range(1, count + 1)]
    if int(match[2]) != 1 or first.metadata.get("split.no") != 0:
        found = first.metadata.get("split.no")
        raise GgufError(first.path, "metadata 'split.no'", None, found, f"0: open the first shard, {paths[0]}")
    return paths


def _with_original_shapes(file: GgufFile) -> GgufFile:
    """The file with the shapes that tensors had before ComfyUI-GGUF reshaped them so that rows were whole blocks."""
    tensors = dict(file.tensors)
    for key in file.metadata:
        name = key[len(ORIGINAL_SHAPE) :]
        if key.startswith(ORIGINAL_SHAPE) and name in tensors:
            tensors[name] = tensors[name]._replace(shape=_original_shape(file, key, tensors[name]))
    return replace(file, tensors=TensorTable(tensors))


def _original_shape(file: GgufFile, key: str, tensor: TensorInfo) -> tuple[int, ...]:
    """The shape that a key holds, rows first."""

    def fail(found: object) -> NoReturn:
        allowed = f"up to {MAX_DIMENSIONS} integers whose product is {tensor.n_elements}"
        raise GgufError(file.path, f"metadata {key!r}", getattr(stored, "offset", None), found, allowed)

    stored = file.metadata[key]
    if not isinstance(stored, MetadataArray) or not stored.is_of_integers or len(stored) > MAX_DIMENSIONS:
        fail(f"{len(stored):,} items" if isinstance(stored, MetadataArray) else f"a {type(stored).__name__}")
    shape = tuple(stored.to_list())
    if any(extent < 0 for extent in shape) or math.prod(shape) != tensor.n_elements:
        fail(shape)
    if math.prod(extent or 1 for extent in shape) >= MAX_ELEMENTS:
        fail(shape)
    return shape
