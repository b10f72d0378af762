"""The command `numba-dequant`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import numba_dequant as nd
from numba_dequant.cli import console
from numba_dequant.cli.common import HelpFormatter, Parser, fail

COMMANDS = ("verify", "info", "show", "convert", "diff", "bench", "cache", "warm", "doctor", "completion")
"""Modules of this folder with `add_to`, which adds a command's arguments, and `run`."""

EXIT_STATUS = """\
exit status:
  0    done
  1    verify or diff found a difference, or doctor something that does not work
  2    a file, an argument or a device cannot be used; the message says why
  70   an internal error of numba-dequant; the traceback helps to fix it
  130  Ctrl-C
  141  the reader of the output closed the pipe
"""
EXAMPLES = """\
examples:
  numba-dequant info model.gguf
  numba-dequant convert model.gguf model.safetensors --dtype fp16
  numba-dequant diff --help

"""
CRASHED, INTERRUPTED, PIPE_CLOSED = 70, 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    with console.safe_streams(), console.noticed_interrupts() as interrupts:
        try:
            status = _run(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BrokenPipeError:
            status = PIPE_CLOSED
        except (nd.NumbaDequantError, OSError, MemoryError) as error:
            status = fail(_message(error))
        except Exception:
            status = INTERRUPTED if interrupts.pressed else _crash(traceback.format_exc())
        return INTERRUPTED if interrupts.pressed else status


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, nd.NumbaDequantError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        return f"{name}: {error.strerror}" if name else str(error.strerror or error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error)


def _run(arguments: list[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    try:
        # One command does not wait for the import of the others.
        options = command_parser(given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS).parse_args(given)
    except SystemExit as end:  # --help, --version, or wrong arguments
        return int(end.code or 0)
    return int(options.run(options))


def _crash(lines: str) -> int:
    for line in lines.splitlines():
        console.complain(line)
    console.complain(
        "this is an internal error of numba-dequant; please report it with the lines above and the "
        "output of numba-dequant doctor --json"
    )
    return CRASHED


def command_parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of all commands, or of some."""
    parser = Parser(
        "numba-dequant",
        description="Dequantize GGUF files on an NVIDIA GPU or the CPU.",
        epilog=EXAMPLES + EXIT_STATUS,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"numba-dequant {nd.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in names:
        import_module(f"numba_dequant.cli.{name}").add_to(commands)
    return parser
