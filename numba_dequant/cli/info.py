"""`numba-dequant info`: the metadata and the tensor table of a file."""

from __future__ import annotations

import argparse
from typing import Any

import numba_dequant as nd
from numba_dequant import display

SHOWN_SHARDS = 10
"""Maximum number of missing shards whose names are shown. A small file can say that there are 65535."""


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser(
        "info", help="show metadata and tensors", description="Show the metadata and the tensor table of a GGUF file."
    )
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or the first shard of a split")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    with nd.open(options.file, allow_truncated=True) as model:
        path, (here, needed) = display.printable(model.path), model.n_bytes
        print(f"{path}: {len(model.metadata)} metadata entries, {len(model.tensors)} tensors")
        if here < needed:
            print(f"{here:,} of {needed:,} bytes are here; the file looks incomplete")
        if model.missing_shards:
            first = ", ".join(map(display.printable, model.missing_shards[:SHOWN_SHARDS]))
            more = len(model.missing_shards) - SHOWN_SHARDS
            print(f"missing: {first}{f' and {more:,} more' if more > 0 else ''}; tensors of the other shards:")
        entries = display.metadata_rows(model.metadata.shown())
        width = max((len(key) for key, _ in entries), default=0)
        for key, value in entries:
            print(f"  {key.ljust(width)}  {value}")
        rows = display.tensor_rows(model.tensors.values())
        print(display.text(display.TENSOR_HEAD, rows, display.TENSOR_SIDES))
    return 0
