"""Progress of a load: a progress bar and a callback."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba_dequant.errors import OptionError, shown

DELAY = 1.0
"""Seconds before the bar is shown."""

INTERVAL = 0.1
"""Minimum seconds between two reports; the last report is always made."""


@dataclass(frozen=True)
class Progress:
    """Progress of a load.

    Attributes:
        bytes_done: number of bytes of the files that have been loaded.
        bytes_total: number of bytes to load.
        seconds: seconds since the start.
    """

    bytes_done: int
    bytes_total: int
    seconds: float

    @property
    def speed(self) -> float:
        """Average bytes per second since the start."""
        return self.bytes_done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left at this speed; None before the first bytes."""
        return (self.bytes_total - self.bytes_done) / self.speed if self.speed else None


class Reporter:
    """Shows the bar and calls the callback, in the thread of the caller."""

    def __init__(self, bytes_total: int, show: bool | None, callback: Callable[[Progress], object] | None) -> None:
        """Start the clock.

        Args:
            bytes_total: number of bytes to load.
            show: whether to show a bar; None means only on a terminal and in a notebook.
            callback: function to call with each `Progress`, or None.

        Raises:
            OptionError: `show` or `callback` has a wrong type.
        """
        if show is not None and not isinstance(show, bool):
            raise OptionError(f"progress must be True, False or None, got {shown(show)}")
        if callback is not None and not callable(callback):
            raise OptionError(f"callback must be a function that takes a Progress, got {shown(callback)}")
        self._total = bytes_total
        self._callback = callback
        self._is_shown = is_watched() if show is None else show
        self._start = self._reported = time.perf_counter()
        self._is_over = False
        self._bar: Any = None

    def __call__(self, bytes_done: int) -> None:
        """Report, unless the last report was less than `INTERVAL` ago."""
        now = time.perf_counter()
        is_last = bytes_done == self._total
        if self._is_over or (now - self._reported < INTERVAL and not is_last):
            return
        self._reported, self._is_over = now, is_last
        if self._bar is None and self._is_shown and now - self._start >= DELAY:
            self._bar = _bar_class()(total=self._total, unit="B", unit_scale=True)
            self._bar.start_t -= now - self._start
        if self._bar is not None:
            self._bar.update(bytes_done - self._bar.n)
        if self._callback is not None:
            self._callback(Progress(bytes_done, self._total, now - self._start))

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def _bar_class() -> Any:
    # The import is slow, and most loads end before a bar is shown.
    if _is_notebook() and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm
    return tqdm


def _is_notebook() -> bool:
    # An imported ipykernel is no proof: programs that run notebooks import it, too.
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def is_watched() -> bool:
    """Whether stderr is a terminal, or the program is a notebook."""
    if _is_notebook():
        return True
    return sys.stderr is not None and sys.stderr.isatty()
