"""The standard streams and Ctrl-C, made safe for the command: however they are set up, and whoever calls it."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from numba_dequant.display import printable

LOOKALIKES = str.maketrans("·…█▉▊▋▌▍▎▏", "..####....")
"""What stands for the characters of pictures and bars where an encoding lacks them: as wide as they are."""

RETRY_SECONDS = 0.05
"""Time after which a Ctrl-C that was lost on its way is sent again."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(LOOKALIKES)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("numba_dequant", _replace)


class _AnyText:
    """A stream to which any text can be written: what its encoding lacks is replaced."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None)
        if getattr(stream, "errors", None) not in (None, "strict", "surrogateescape"):
            self._encoding = None  # the user has chosen another way

    def write(self, text: str) -> int:
        if self._encoding is not None:
            text = text.encode(self._encoding, "numba_dequant").decode(self._encoding)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside, standard output and standard error exist and take any text, and warnings are one line without a path."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None or stream.closed:
                # Whoever closed it does not want to see what is written to it.
                stack.enter_context(redirect(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            else:
                stack.enter_context(redirect(cast("TextIO", _AnyText(stream))))
        stack.enter_context(_short_warnings())
        yield


@contextmanager
def _short_warnings() -> Iterator[None]:
    before = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        complain(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def complain(message: str) -> None:
    """Print a message to standard error, if that is possible."""
    with suppress(OSError):
        sys.stderr.write(f"numba-dequant: {printable(message)}\n")


def discard_unwritten() -> None:
    """Discard what cannot be written when the process ends: Python would complain, with an exit status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


class Interrupts:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def noticed_interrupts() -> Iterator[Interrupts]:
    """Inside, Ctrl-C is noticed also where the KeyboardInterrupt is lost.

    Numba compiles through C code that calls back into Python. What is raised there is reported and dropped; then the
    compiler fails in some other way, or does not fail at all.
    """
    found = Interrupts()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield found  # a program that handles Ctrl-C in its own way keeps doing so
        return
    retries: list[threading.Timer] = []
    report = sys.unraisablehook

    def note(number: int, frame: Any) -> None:
        found.pressed = True
        raise KeyboardInterrupt

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            retries.append(threading.Timer(RETRY_SECONDS, _interrupt_main_thread))
            retries[-1].start()
        elif not found.pressed:  # what is half done after an interrupt is of no interest
            report(lost)

    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = raise_again
    try:
        yield found
    finally:
        for retry in retries:
            retry.cancel()
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt_main_thread() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # which a system call of the main thread notices too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
