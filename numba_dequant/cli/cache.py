"""`numba-dequant cache`: the compiled code that is kept on disk."""

from __future__ import annotations

import argparse
from typing import Any

from numba_dequant import disk_cache, display
from numba_dequant.cli.common import add_command


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "cache",
        run,
        help="show or clear the cache of compiled code",
        description="Show the folder and the size of the cache of compiled code. "
        f"The environment variable {disk_cache.VARIABLE} selects the folder.",
        examples=("cache", "cache --clear"),
    )
    parser.add_argument("--clear", action="store_true", help="remove all entries")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    folder = display.printable(str(disk_cache.directory()))
    if options.clear:
        print(f"{folder}: {disk_cache.clear()} entries removed")
        return 0
    entries = disk_cache.entries()
    print(f"{folder}: {len(entries)} entries, {sum(entries.values()):,} bytes")
    for name, size in sorted(entries.items()):
        print(f"  {size:>9,}  {name.rpartition('-')[0]}")
    if problem := disk_cache.problem():
        print(f"The cache cannot be used: {problem}")
    return 0
