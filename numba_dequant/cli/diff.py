"""`numba-dequant diff`: what differs between two GGUF files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.cli import comparison
from numba_dequant.cli.colour import painted
from numba_dequant.cli.common import add_command, named_device

HEAD, SIDES = ("tensor", "format", "shape", "what differs", "relative error", "largest"), "<<<<>>"


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "diff",
        run,
        help="show what differs between two files",
        description="Show the metadata and the tensors that differ between two GGUF files, A and B. If a tensor has "
        "the same shape in both, its values are compared: the relative error is the root of the sum of the squared "
        "differences, divided by that of the squared values of A; the last column is the largest difference. The "
        "values are read in slices, so memory does not grow with the model.",
        examples=("diff model.gguf other.gguf", 'diff model.gguf other.gguf --select "blk.0.*"'),
        status_1="the files differ",
    )
    parser.add_argument("file", metavar="FILE", help="the GGUF file A")
    parser.add_argument("other", metavar="FILE", help="the GGUF file B")
    parser.add_argument("--select", action="append", metavar="GLOB", help="compare these tensors only; may be repeated")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    named_device(options.device)
    with nd.open(options.file) as a, nd.open(options.other) as b:
        names = comparison.selected_names(a, b, options.select)
        entries = comparison.metadata(a, b)
        with closing(comparison.tensors(a, b, names, options.device)) as found:
            differences = list(found)
        for model, sign in ((a, "-"), (b, "+")):
            path = display.printable(model.path)
            print(f"{sign} {path}: {len(model.metadata)} metadata entries, {len(model.tensors)} tensors")
        for line in _metadata_lines(entries):
            print(line)
        for line in _tensor_lines(differences):
            print(line)
    if not entries and not differences:
        print("No difference." if options.select is None else "No difference in these tensors and in the metadata.")
    return 1 if entries or differences else 0


def _metadata_lines(entries: list[comparison.Entry]) -> Iterator[str]:
    for entry in entries:
        key = display.cell(entry.key)
        if entry.first_item is not None:
            yield painted(f"~ {key}: item {entry.first_item:,} is the first that differs", "yellow")
        if entry.a is not None:
            yield painted(f"- {key}: {display.printable(entry.a)}", "red")
        if entry.b is not None:
            yield painted(f"+ {key}: {display.printable(entry.b)}", "green")


def _tensor_lines(differences: list[comparison.Difference]) -> Iterator[str]:
    if not differences:
        return
    rows = [_row(each) for each in differences]
    head, *lines = display.text(HEAD, rows, SIDES).splitlines()
    yield painted(f"  {head}", "bold")
    for line, each in zip(lines, differences, strict=True):
        sign, colour = ("+", "green") if each.a is None else ("-", "red") if each.b is None else ("~", "yellow")
        yield painted(f"{sign} {line}", colour)


def _row(each: comparison.Difference) -> tuple[str, ...]:
    pair = [tensor for tensor in (each.a, each.b) if tensor is not None]
    formats = " -> ".join(dict.fromkeys(tensor.format.name for tensor in pair))
    shapes = " -> ".join(dict.fromkeys(" x ".join(map(str, tensor.shape)) or "scalar" for tensor in pair))
    numbers = ("", "") if each.error is None else (f"{each.error:.3g}", f"{each.largest:.3g}")
    return display.cell(each.name), formats, shapes, each.what, *numbers
