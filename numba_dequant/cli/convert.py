"""`numba-dequant convert`: a GGUF file to safetensors."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.cli import safetensors_format as st
from numba_dequant.cli.common import add_command, named_device
from numba_dequant.cli.new_files import NewFiles, explained
from numba_dequant.cli.slices import stream_slices
from numba_dequant.dtypes import dtype_name
from numba_dequant.errors import OptionError, shown
from numba_dequant.gguf.tensors import TensorInfo
from numba_dequant.loading.requests import cut, select_tensors

SLICE_BYTES = 8 << 20
"""Bytes of values that are computed and written at once. Up to four slices are in memory."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "convert",
        run,
        help="dequantize to safetensors",
        description="Dequantize a GGUF file to a safetensors file, or to several with Hugging Face's index file. The "
        "names of the tensors stay those of the GGUF file. Its metadata is kept in the header: each key with the "
        f"prefix {st.PREFIX}, each value as JSON. Integers and F64 keep their type. Memory does not grow with the "
        "model. No file appears under its name before all of them are complete.",
        examples=(
            "convert model.gguf model.safetensors",
            "convert model.gguf model.safetensors --dtype fp16 --shard-size 5GB",
            'convert model.gguf attention.safetensors --select "blk.*.attn_*" --select output.weight',
        ),
    )
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or the first shard of a split")
    parser.add_argument(
        "out", metavar="OUT", help="the safetensors file, or a folder, in which it is called model.safetensors"
    )
    parser.add_argument("--dtype", metavar="DTYPE", default="bfloat16", help="output type (%(default)s)")
    parser.add_argument("--select", action="append", metavar="GLOB", help="convert these tensors only; may be repeated")
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        help="maximum bytes of tensors in a file, such as 5GB or 500MiB; default: one file",
    )
    parser.add_argument(
        "--orig-shapes",
        action="store_true",
        help="restore the shapes that tensors had before ComfyUI-GGUF reshaped them",
    )
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    start = time.perf_counter()
    dtype = dtype_name(options.dtype)
    shard_bytes = None if options.shard_size is None else number_of_bytes(options.shard_size)
    named_device(options.device)
    folder, name = _place(options.out)
    with nd.open(options.file, orig_shapes=options.orig_shapes) as model:
        shards = st.plan_shards(select_tensors(model.tensors, options.select), dtype, name, shard_bytes)
        names = [shard.name for shard in shards]
        if len(shards) > 1:
            names.append(name + st.INDEX_SUFFIX)
        # A program that finds a file of either kind would take it for the model.
        others = [each for each in (name, name + st.INDEX_SUFFIX) if each not in names]
        _check_names(folder, [*names, *others], model, is_forced=options.force)
        total = sum(shard.n_bytes for shard in shards)
        with explained(options.out):
            _check_room(folder, total)
        _write(model, shards, dtype, options, folder, names, others)
    count = sum(len(shard.entries) for shard in shards)
    seconds = time.perf_counter() - start
    where = os.path.join(folder, names[-1])
    files = "" if len(shards) == 1 else f" in {len(shards):,} files"
    print(f"{display.printable(where)}: {count:,} tensors, {total:,} bytes of {dtype}{files}, {seconds:.1f} s")
    return 0


def number_of_bytes(text: str) -> int:
    """The number of bytes that is written as 5GB, 500 MiB or 1000000.

    Raises:
        OptionError: it is not written like that, or is less than 1.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?I?)B?", text.strip().upper(), re.ASCII)
    unit = UNITS.get(match[2]) if match else None
    found = int(float(match[1]) * unit) if match and unit else 0
    if found < 1:
        raise OptionError(f"a size is written like 5GB, 500MiB or 1000000, got {shown(text)}")
    return found


def _place(out: str) -> tuple[str, str]:
    """The folder and the name of the model."""
    if "\0" in out:
        raise OptionError(f"{out}: a file name cannot have a NUL")
    if os.path.isdir(out):
        return out, f"model{st.SUFFIX}"
    folder, name = os.path.split(out)
    if not name.endswith(st.SUFFIX) or name == st.SUFFIX:
        raise OptionError(f"{out}: the name must end in {st.SUFFIX}, or be that of a folder that exists")
    return folder, name


def _check_names(folder: str, names: list[str], model: nd.Model, *, is_forced: bool) -> None:
    """Refuse to overwrite a file, and above all the one that is read."""
    sources = {model.path, *(tensor.source.path for tensor in model.tensors.values())}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            continue
        if not is_forced:
            raise OptionError(f"{path} exists; pass --force to replace it, or another name")
        if any(os.path.exists(path) and os.path.samefile(path, source) for source in sources if os.path.exists(source)):
            raise OptionError(f"{path} is the file to convert; pass another name")
        if os.path.isdir(path):
            raise OptionError(f"{path} is a folder; pass another name")


def _check_room(folder: str, n_bytes: int) -> None:
    free = shutil.disk_usage(folder or os.curdir).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"{n_bytes:,} bytes are needed, and {free:,} are free")


def _write(
    model: nd.Model,
    shards: list[st.Shard],
    dtype: str,
    options: argparse.Namespace,
    folder: str,
    names: list[str],
    others: list[str],
) -> None:
    """Write all files, and then give them their names."""
    metadata = st.metadata_texts(model.metadata)
    slices = [part for shard in shards for entry in shard.entries for part in _slices(entry)]
    stream = stream_slices(model, slices, dtype, options.device)
    with closing(stream) as values, explained(options.out), NewFiles(folder) as new:
        for number, shard in enumerate(shards):
            _write_shard(new, shard, metadata if not number else {"format": metadata["format"]}, values)
        if len(shards) > 1:
            with new.writing(names[-1]) as file:
                file.write(st.index(shards))
        _check_names(folder, [*names, *others], model, is_forced=options.force)
        new.publish(names, others)


def _slices(entry: st.Entry) -> list[TensorInfo]:
    block = entry.tensor.format.block_size
    return cut(entry.tensor, max(SLICE_BYTES // entry.dtype.itemsize // block, 1) * block)


def _write_shard(
    new: NewFiles, shard: st.Shard, metadata: dict[str, str], values: Iterator[np.ndarray[Any, Any]]
) -> None:
    start = st.header(shard, metadata)
    with new.writing(shard.name) as file:
        file.write(start)
        for entry in shard.entries:
            file.seek(len(start) + entry.start)
            left = entry.n_bytes
            while left:
                data = next(values).reshape(-1).view(np.uint8)
                file.write(data.data)
                left -= data.size
