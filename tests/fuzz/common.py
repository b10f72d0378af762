"""What several targets use: a folder for files, and the check of an error's message."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba_dequant as nd


@cache
def folder() -> Path:
    """A folder for files of this process, in memory if the system has such."""
    place = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def check_said(error: nd.NumbaDequantError) -> None:
    """An error is a sentence on one line that can be printed."""
    said = str(error)
    assert said.isprintable(), said
    assert len(said) > 15, said
    if isinstance(error, nd.GgufError):
        assert error.reason, said
        assert error.field, said
        assert error.allowed, said


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Give attributes of objects other values within a block. `unittest.mock` takes longer than opening a file."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
