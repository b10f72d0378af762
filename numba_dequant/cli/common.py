"""What the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

import numba_dequant as nd
from numba_dequant import display
from numba_dequant.backends import devices
from numba_dequant.cli import console
from numba_dequant.formats import format_named


class Parser(argparse.ArgumentParser):
    """Escapes control characters in error messages, because arguments may be file names."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        super().error(display.printable(message))


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, and keeps text of several lines as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: tuple[str, ...],
    status_1: str = "",
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: the subparsers of the main parser.
        name: the name of the command.
        run: runs the command; returns the exit status.
        help: what it does, in a few words.
        description: what it does, in a paragraph.
        examples: arguments of `numba-dequant`, each of which a test runs.
        status_1: the meaning of exit status 1, if there is one.
    """
    lines = ["examples:", *(f"  numba-dequant {example}" for example in examples), "", "exit status:", "  0    done"]
    if status_1:
        lines.append(f"  1    {status_1}")
    lines += ["  2    a file, an argument or a device cannot be used", "  See also numba-dequant --help."]
    epilog = "\n".join(lines)
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=HelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def fail(message: str) -> int:
    """Report what is wrong; the result is the exit status."""
    console.complain(message)
    return 2


def named_formats(names: str | None, default: list[nd.Format]) -> list[nd.Format]:
    """The formats in a list separated by commas.

    Raises:
        UnknownFormatError: there is no such format, or no code dequantizes it.
    """
    if names is None:
        return default
    formats = [format_named(name) for name in names.split(",")]
    for fmt in formats:
        if fmt.decode is None:
            raise nd.UnknownFormatError(f"{fmt.name} is stored as it is, so there is no code that dequantizes it")
    return formats


def named_device(name: str | None) -> tuple[devices.DeviceSpec, str | None]:
    """The device called `name`, and None. Without a name: the first GPU and None, or the CPU and why no GPU is used.

    Raises:
        DeviceError: there is no such device.
    """
    problem = devices.why_no_cuda() if name is None else None
    return devices.parse_device(("cpu" if problem else "cuda:0") if name is None else name), problem
