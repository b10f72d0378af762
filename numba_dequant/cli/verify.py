"""`numba-dequant verify`: dequantize every tensor and compare with the reference."""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from typing import Any

import numba_dequant as nd
from numba_dequant import display, verify
from numba_dequant.cli.colour import painted
from numba_dequant.cli.common import add_command, named_device
from numba_dequant.dtypes import NAMES

SAMPLE = files("numba_dequant") / "sample" / "sample.gguf"


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "verify",
        run,
        help="dequantize every tensor and compare with the reference",
        description="Dequantize every tensor of a model on the best device and compare the result, bit for bit, with "
        "the NumPy reference.",
        examples=("verify", "verify model.gguf --device cpu --dtype bfloat16"),
        status_1="a value differs",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="a GGUF file; default: a small sample of all formats")
    parser.add_argument(
        "--device", metavar="DEVICE", help="reference, cpu, cuda, cuda:1, ...; default: the first GPU, or else the CPU"
    )
    parser.add_argument("--dtype", choices=NAMES, default="float16", help="output type (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if options.file is None:
        with as_file(SAMPLE) as path:
            return _verify_file(str(path), "the shipped sample", options)
    return _verify_file(options.file, display.printable(options.file), options)


def _verify_file(path: str, title: str, options: argparse.Namespace) -> int:
    from tqdm import tqdm  # every command would wait for the import

    device, problem = named_device(options.device)
    with nd.open(path) as model:
        reason = f" ({problem})" if problem else ""
        print(f"{title}: {len(model.tensors)} tensors to {options.dtype} on {device}{reason}")
        total = sum(tensor.n_bytes for tensor in model.tensors.values())
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False, delay=1) as bar:
            rows = verify.verify(model, device, options.dtype, bar.update)
    print(verify.table(rows))
    wrong = [row.format.name for row in rows if not row.is_exact]
    if wrong:
        print(painted(f"DIFFERENT from the reference: {', '.join(wrong)}", "red"))
    else:
        print(painted("Every bit agrees with the reference.", "green"))
    return 1 if wrong else 0
