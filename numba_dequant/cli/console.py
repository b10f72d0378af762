"""Safe standard streams and Ctrl-C handling for the command."""

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
"""ASCII replacements of the same width for pictures and bars, if the encoding lacks a character."""

RETRY_SECONDS = 0.05
"""Seconds after which a lost Ctrl-C is sent again."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(LOOKALIKES)
    return lacking.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("numba_dequant", _replace)


class _AnyText:
    """A stream that accepts any text; characters that its encoding lacks are replaced."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None)
        if getattr(stream, "errors", None) not in (None, "strict", "surrogateescape"):
            self._encoding = None  # the user has chosen another error handler

    def write(self, text: str) -> int:
        if self._encoding is not None:
            text = text.encode(self._encoding, "numba_dequant").decode(self._encoding)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """A context in which stdout and stderr exist and accept any text, and a warning is one line without a path."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None or stream.closed:
                # The caller closed it, so output is discarded.
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
    """Print a message to standard error; errors are ignored."""
    with suppress(OSError):
        sys.stderr.write(f"numba-dequant: {printable(message)}\n")


def discard_unwritten() -> None:
    """Flush, and discard output that cannot be written; otherwise Python changes the exit status at exit."""
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
    """A context in which Ctrl-C is noticed even if the KeyboardInterrupt is lost.

    Numba compiles through C code that calls Python. An exception raised there is reported and dropped, and the compiler
    then fails differently, or succeeds.
    """
    interrupts = Interrupts()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupts  # keep the Ctrl-C handler of the calling program
        return
    retries: list[threading.Timer] = []
    report = sys.unraisablehook

    def note(number: int, frame: Any) -> None:
        interrupts.pressed = True
        raise KeyboardInterrupt

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            retries.append(threading.Timer(RETRY_SECONDS, _interrupt_main_thread))
            retries[-1].start()
        elif not interrupts.pressed:  # errors after an interrupt are not reported
            report(lost)

    signal.signal(signal.SIGINT, note)
    sys.unraisablehook = raise_again
    try:
        yield interrupts
    finally:
        for retry in retries:
            retry.cancel()
        sys.unraisablehook = report
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt_main_thread() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:  # also interrupts a system call of the main thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
