"""Colours on terminals."""

from __future__ import annotations

import os
import sys

CODES = {"red": 31, "green": 32, "yellow": 33, "bold": 1}


def has_colours() -> bool:
    """Whether standard output shows colours: on a terminal, unless NO_COLOR is set; elsewhere if FORCE_COLOR is set."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    try:
        is_terminal = sys.stdout.isatty()
    except (AttributeError, ValueError):  # there is no standard output, or it is closed
        return False
    if sys.platform == "win32" and "WT_SESSION" not in os.environ:
        return False  # older consoles show the codes
    return is_terminal and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str) -> str:
    """The text in one of `CODES`, if standard output shows colours."""
    return f"\x1b[{CODES[colour]}m{text}\x1b[0m" if has_colours() else text
