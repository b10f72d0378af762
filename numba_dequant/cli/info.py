"""`numba-dequant info`: the metadata and the tensor table of a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.cli import json_text
from numba_dequant.cli.colour import painted
from numba_dequant.cli.common import add_command

SHOWN_SHARDS = 10
"""Maximum number of missing shards whose names are shown. A small file can say that there are 65535."""


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "info",
        run,
        help="show metadata and tensors",
        description="Show the metadata and the tensor table of a GGUF file. The file may be incomplete. With "
        f"--json, arrays have up to {json_text.SHOWN_ITEMS} items, and strings up to {json_text.SHOWN_CHARACTERS:,} "
        'characters; a value that is cut is an object: "first" is its beginning, and "items", "characters" or "bytes" '
        "its length.",
        examples=("info model.gguf", "info model.gguf --json"),
    )
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or the first shard of a split")
    parser.add_argument("--json", action="store_true", help="show it as JSON, for programs")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with nd.open(options.file, allow_truncated=True) as model:
        (_print_json if options.json else _print_table)(model)
    return 0


def _print_table(model: nd.Model) -> None:
    path, (here, needed) = display.printable(model.path), model.n_bytes
    print(f"{path}: {len(model.metadata)} metadata entries, {len(model.tensors)} tensors")
    if here < needed:
        print(painted(f"{here:,} of {needed:,} bytes are here; the file looks incomplete", "yellow"))
    if model.missing_shards:
        first = ", ".join(map(display.printable, model.missing_shards[:SHOWN_SHARDS]))
        more = len(model.missing_shards) - SHOWN_SHARDS
        print(f"missing: {first}{f' and {more:,} more' if more > 0 else ''}; tensors of the other shards:")
    entries = display.metadata_rows(model.metadata.shown())
    width = max((len(key) for key, _ in entries), default=0)
    for key, value in entries:
        print(f"  {key.ljust(width)}  {value}")
    rows = display.tensor_rows(model.tensors.values())
    head, *lines = display.text(display.TENSOR_HEAD, rows, display.TENSOR_SIDES).splitlines()
    print(painted(head, "bold"))
    for line in lines:
        print(line)


def _print_json(model: nd.Model) -> None:
    here, needed = model.n_bytes
    missing: Any = list(model.missing_shards[:SHOWN_SHARDS])
    if len(missing) < len(model.missing_shards):
        missing = {"first": missing, "items": len(model.missing_shards)}
    head = {"path": model.path, "bytes": needed, "bytes_here": here, "missing_shards": missing}
    print("{")
    for name, value in head.items():
        print(f'  "{name}": {json_text.text(value)},')
    # A line for each value and each tensor: there may be a million, which are never in memory together.
    _print_list(
        "metadata", "{}", (f"{json_text.text(key)}: {text}" for key, text in json_text.shortened(model.metadata))
    )
    print(end=",\n")
    _print_list("tensors", "[]", (json_text.text(_described(tensor)) for tensor in model.tensors.values()))
    print("\n}")


def _print_list(name: str, brackets: str, lines: Iterator[str]) -> None:
    print(end=f'  "{name}": {brackets[0]}')
    separator = "\n"
    for line in lines:
        print(end=f"{separator}    {line}")
        separator = ",\n"
    print(end=f"\n  {brackets[1]}")


def _described(tensor: Any) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "format": tensor.format.name,
        "shape": tensor.shape,
        "bytes": tensor.n_bytes,
        "path": tensor.path,
        "offset": tensor.offset,
    }
