"""Warnings that point to the line of the user's code that called this package."""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache

_PACKAGE = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Give a RuntimeWarning that points to the line of the user's code; in a thread of this package there is none."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (frame.f_globals.get("__package__") or "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Give a warning, once per process."""
    warn(message)
