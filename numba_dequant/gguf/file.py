"""Reads and checks the header and the tensor table of a GGUF file, or of all shards of a split file.

Source of the format: ggml's docs/gguf.md and src/gguf.cpp. Where they leave a choice, these rules apply:

* Tensor names may have 65535 bytes, and tensors 8 dimensions. GGML usually allows 63 bytes and 4 dimensions, but files
  of image and video models exceed this.
* NULs at the end of a key, a tensor name or a string value are removed (files of August 2023 have them). Elsewhere in a
  key or a string they are kept; elsewhere in a tensor name they are an error. Array items keep all their NULs, because
  InternLM2 has a token that is a NUL.
* A bool is False if it is 0, and otherwise True, also in arrays.
* Invalid UTF-8 in a string value is replaced by U+FFFD.
* Only three keys with the prefix "split." are used, and must be integers: split.no, split.count, split.tensors.count.
* Accepted: a scalar (no dimensions), an empty tensor name, a dimension of 0, no padding after the last tensor.
* Refused: an empty key, keys and tensor names that are not UTF-8, duplicate keys or tensor names (after NULs are
  removed), arrays of arrays, arrays of more than 64 Mi items, an alignment of more than 1 MiB, a shape of 2**60
  elements or more, where a dimension of 0 counts as 1, and what exceeds the `Limits`.
* No path in the metadata is ever opened. The names of other shards come from the path of the first one, so they are in
  its folder. Symbolic links are followed, because download caches consist of them.
* A GGUF file that begins inside another file (`offset`) is aligned relative to its own start.

This module imports no CUDA package and no Numba, and reads only headers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from numba_dequant.arguments import flag_option, whole_option
from numba_dequant.errors import GgufError, MissingFileError, OptionError, shown
from numba_dequant.gguf.limits import Allowance, Limits, checked_limits
from numba_dequant.gguf.metadata import MetadataArray
from numba_dequant.gguf.reader import read_file
from numba_dequant.gguf.source import source_of
from numba_dequant.gguf.table import MAX_DIMENSIONS, MAX_ELEMENTS
from numba_dequant.gguf.tensors import GgufFile, TensorInfo, TensorTable, truncated

__all__ = ["GgufFile", "TensorInfo", "TensorTable", "open_gguf", "truncated"]

MAX_SHARDS = 65535
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF stores the original shape of a reshaped tensor under this prefix plus the tensor name."""


def open_gguf(
    source: Any,
    *,
    offset: int = 0,
    allow_truncated: bool = False,
    orig_shapes: bool = False,
    limits: Limits | None = None,
) -> GgufFile:
    """Read the header of a GGUF file. If it is the first shard of a split, read those of the other shards too.

    Args:
        source: a path, the contents of a file, or all shards of a split as a list of either, in any order.
        offset: byte position where the GGUF file begins.
        allow_truncated: accept a file without all of its tensor data, and a split without its later shards.
        orig_shapes: restore the original shapes of tensors that ComfyUI-GGUF reshaped.
        limits: what the header may have at most; None means the default limits.

    Raises:
        GgufError: the file is not a GGUF file, violates the format, exceeds a limit or is not the first shard, or a
            shard is missing.
        MissingFileError: the file does not exist.
        ReadError: the file cannot be read.
        OptionError: an argument has a wrong type or value.
        DataError: the contents of a file are not contiguous bytes.
    """
    offset = whole_option("offset", offset, 0)
    allow_truncated = flag_option("allow_truncated", allow_truncated)
    orig_shapes = flag_option("orig_shapes", orig_shapes)
    allowance = Allowance(checked_limits(limits))
    if isinstance(source, (list, tuple)):
        file = _join_given(source, offset, allowance, allow_truncated=allow_truncated)
    else:
        origin = source_of(source)
        file = read_file(origin, offset, allow_truncated=allow_truncated, allowance=allowance)
        count = _split_number(file, "split.count", 0)
        if count > 1:
            paths = _shard_paths(file, count, "" if offset else origin.path)
            if count > allowance.limits.shards:
                raise allowance.limits.exceeded("shards", file.path, None, count, f"the model has {count:,} shards")
            file = _join_found(file, paths, allowance, allow_truncated=allow_truncated)
    return _with_original_shapes(file) if orig_shapes else file


def _join_given(sources: Sequence[Any], offset: int, allowance: Allowance, *, allow_truncated: bool) -> GgufFile:
    """Join the shards in a list, given in any order."""
    if not sources or offset:
        raise OptionError(
            "offset is for one file, not for a list; omit offset"
            if offset
            else "the list of shards is empty; pass the paths or the contents of all shards"
        )
    for each in sources:
        if isinstance(each, (list, tuple)):
            raise OptionError("a list of shards holds paths or bytes, not lists")
    origins = [source_of(each, number) for number, each in enumerate(sources, 1)]
    shards = [read_file(origin, allow_truncated=allow_truncated, allowance=allowance) for origin in origins]
    if len(shards) == 1 and _split_number(shards[0], "split.count", 0) <= 1:
        return shards[0]
    by_number: dict[int, GgufFile] = {}
    for shard in shards:
        _expect(shard, "split.count", len(shards), "the number of files in the list")
        number = _split_number(shard, "split.no", -1)
        if not 0 <= number < len(shards) or number in by_number:
            other = f"; {by_number[number].path} has the same number" if number in by_number else ""
            raise _split_error(shard, "split.no", f"0 to {len(shards) - 1}, different in each file{other}")
        by_number[number] = shard
    return _joined([by_number[number] for number in range(len(shards))])


def _join_found(first: GgufFile, paths: Sequence[str], allowance: Allowance, *, allow_truncated: bool) -> GgufFile:
    """Join the first shard, which is already read, with the other shards at `paths`."""
    shards, missing = [first], []
    for number, path in enumerate(paths[1:], 1):
        if allow_truncated and not os.path.lexists(path):  # 65,534 errors would take more than a second
            missing.append(path)
            continue
        try:
            shard = read_file(source_of(path), allow_truncated=allow_truncated, allowance=allowance)
        except MissingFileError:
            if not allow_truncated:
                reason = f"shard {path} is missing (split.count is {len(paths)})"
                raise GgufError(first.path, "metadata 'split.count'", None, len(paths), "all shards", reason) from None
            missing.append(path)
            continue
        _expect(shard, "split.no", number, "the number in the file name")
        _expect(shard, "split.count", len(paths), "the count in the file name")
        shards.append(shard)
    return _joined(shards, tuple(missing))


def _joined(shards: Sequence[GgufFile], missing: tuple[str, ...] = ()) -> GgufFile:
    first = shards[0]
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                reason = f"tensor {shown(name)} appears both in this shard and in {tensors[name].path}"
                raise GgufError(shard.path, f"tensor {shown(name)} name", None, tensors[name].path, "one shard", reason)
            tensors[name] = tensor
    total = _split_number(first, "split.tensors.count", len(tensors))
    if total != len(tensors) and not missing:
        raise _split_error(first, "split.tensors.count", f"{len(tensors)}, the number of tensors in all shards")
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
        raise _split_error(file, key, f"0 to {MAX_SHARDS}")
    return int(value)


def _expect(shard: GgufFile, key: str, expected: int, why: str) -> None:
    if shard.metadata.get(key) != expected:
        raise _split_error(shard, key, f"{expected}, {why}")


def _split_error(shard: GgufFile, key: str, allowed: str) -> GgufError:
    value = shard.metadata.get(key)
    reason = f"{key} is {'missing' if value is None else value}; it must be {allowed}"
    return GgufError(shard.path, f"metadata {shown(key)}", None, value, allowed, reason)


def _shard_paths(first: GgufFile, count: int, path: str) -> list[str]:
    """The paths of all shards, derived from the path of the first or, if that is a link, from its target.

    If `path` is empty, no other shard can be found.
    """
    pattern = rf"(.*)-(\d{{5}})-of-{count:05}(\.gguf)"
    names = [first.path, os.path.realpath(path)] if path else []
    match = next(filter(None, (re.fullmatch(pattern, name, re.DOTALL) for name in names)), None)
    if match is None:
        suffix = f"-00001-of-{count:05}.gguf"
        reason = (
            f"this is one of {count} shards, but its name does not end in {suffix}, so the others cannot be found. "
            "Rename it, or pass all shards as a list: open([...])"
        )
        raise GgufError(first.path, "metadata 'split.count'", None, count, f"a file name that ends in {suffix}", reason)
    paths = [f"{match[1]}-{number:05}-of-{count:05}{match[3]}" for number in range(1, count + 1)]
    if int(match[2]) != 1 or first.metadata.get("split.no") != 0:
        number = first.metadata.get("split.no")
        reason = f"this is shard {match[2]} of the split (split.no is {number}); open the first shard, {paths[0]}"
        raise GgufError(first.path, "metadata 'split.no'", None, number, "0", reason)
    return paths


def _with_original_shapes(file: GgufFile) -> GgufFile:
    """The file with the shapes that tensors had before ComfyUI-GGUF reshaped them into rows of whole blocks."""
    tensors = dict(file.tensors)
    for key in file.metadata:
        name = key[len(ORIGINAL_SHAPE) :]
        if key.startswith(ORIGINAL_SHAPE) and name in tensors:
            tensors[name] = tensors[name]._replace(shape=_original_shape(file, key, tensors[name]))
    return replace(file, tensors=TensorTable(tensors))


def _original_shape(file: GgufFile, key: str, tensor: TensorInfo) -> tuple[int, ...]:
    """The shape in the metadata `key`, rows first."""

    def fail(value: object) -> NoReturn:
        allowed = f"up to {MAX_DIMENSIONS} integers whose product is {tensor.n_elements}"
        reason = f"metadata {shown(key)} is {value}; it must be {allowed}"
        raise GgufError(file.path, f"metadata {shown(key)}", getattr(stored, "offset", None), value, allowed, reason)

    stored = file.metadata[key]
    if not isinstance(stored, MetadataArray) or not stored.is_of_integers or len(stored) > MAX_DIMENSIONS:
        fail(
            f"an array of {len(stored):,} items"
            if isinstance(stored, MetadataArray)
            else f"a value of type {type(stored).__name__}"
        )
    shape = tuple(stored.to_list())
    if any(extent < 0 for extent in shape) or math.prod(shape) != tensor.n_elements:
        fail(shape)
    if math.prod(extent or 1 for extent in shape) >= MAX_ELEMENTS:
        fail(shape)
    return shape
