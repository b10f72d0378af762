"""`numba-dequant show`: what the bits of a block mean."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.cli.common import add_command, fail
from numba_dequant.formats import format_named


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "show",
        run,
        help="show what the bits of a block mean",
        description="Show the layout of a format, or how the values of one block of a tensor are computed.",
        examples=("show Q4_K", "show Q4_K --element 37", "show model.gguf blk.0.attn_q.weight --block 1 --element 37"),
    )
    parser.add_argument("what", metavar="FORMAT|FILE", help="a format, such as Q4_K, or a GGUF file")
    parser.add_argument("tensor", nargs="?", metavar="TENSOR", help="a tensor of the file; default: the first")
    parser.add_argument("--block", type=int, metavar="N", help="the block of the tensor (0)")
    parser.add_argument("--element", type=int, metavar="N", help="an element of the block; its bits are shown")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if _is_format(options.what):
        fmt = format_named(options.what)
        if options.tensor is not None or options.block is not None:
            return fail(f"TENSOR and --block need a file, but {options.what} is a format")
        print(fmt if options.element is None else fmt.picture(options.element))
        return 0
    with nd.open(options.what) as model:
        name = next(iter(model.tensors), None) if options.tensor is None else options.tensor
        if name is None:
            return fail(f"{options.what} has no tensors")
        tensor = model.tensors[name]
        explanation = nd.explain(model.read(name), tensor.format, options.block or 0, options.element or 0)
        print(f"{display.cell(tensor.name)}: {tensor.format.summary}\n{explanation}")
    return 0


def _is_format(what: str) -> bool:
    """Whether `what` names a format rather than a file."""
    if what in nd.FORMATS:
        return not os.path.isfile(what)
    return not (os.path.lexists(what) or os.path.dirname(what) or what.endswith(".gguf"))
