"""The errors that this package raises, and its warnings."""

from __future__ import annotations

import reprlib
import sys
import warnings
from functools import lru_cache
from typing import Any

from numba_dequant.display import printable


class NumbaDequantError(Exception):
    """Base class of all errors of `numba_dequant`.

    Control characters in a message are escaped, because names in a file or in a path may contain them.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in parts))


class UnknownFormatError(NumbaDequantError, LookupError):
    """An unknown format name or ggml id."""


class DataError(NumbaDequantError, ValueError):
    """Data that cannot be read as bytes or as numbers, or that is not a whole number of blocks."""


class ShapeError(NumbaDequantError, ValueError):
    """A shape, a slice of rows or an index that does not fit the data."""


class DtypeError(NumbaDequantError, TypeError):
    """An output type that does not exist or that the GPU does not support, or an array of a wrong type."""


class OutputError(NumbaDequantError, ValueError):
    """An `out` array with the wrong size, type, memory order or device, or one that overlaps other memory in use."""


class DeviceError(NumbaDequantError, RuntimeError):
    """A device that does not exist, cannot be used, is out of memory or computes wrongly, or an invalid stream."""


class OptionError(NumbaDequantError, ValueError, TypeError):
    """An argument with a wrong type or value, for which there is no other error class."""


class TensorNotFoundError(NumbaDequantError, KeyError):
    """A tensor name that is not in the file, or a pattern that matches no name."""

    __str__ = Exception.__str__  # KeyError would put the message in quotes


class ReadError(NumbaDequantError, OSError):
    """A file that cannot be opened or read, or that has changed since it was opened.

    Attributes:
        path: the file; `filename` is the same.
        tensor: the tensor that was being read, or None.
        offset: byte position in the file, or None.
        reason: what happened, and what to do.
        errno: the errno of the system, or None.
    """

    def __init__(
        self, path: str, tensor: str | None, offset: int | None, reason: str, number: int | None = None
    ) -> None:
        self.path = path
        self.tensor = tensor
        self.offset = offset
        self.reason = printable(reason)
        what = f"tensor {shown(tensor)}" if tensor is not None else ""
        location = " ".join(filter(None, (what, f"at byte {offset}" if offset is not None else "")))
        self._message = printable(f"{path}: {location}: {reason}" if location else f"{path}: {reason}")
        super().__init__(self._message)
        self.errno, self.filename, self.strerror = number, path, self.reason

    def __str__(self) -> str:
        return self._message  # OSError would show the errno and the path again

    def __reduce__(self) -> tuple[type[ReadError], tuple[str, str | None, int | None, str, int | None]]:
        return type(self), (self.path, self.tensor, self.offset, self.reason, self.errno)


class MissingFileError(ReadError, FileNotFoundError):
    """A file that does not exist."""


class GgufError(NumbaDequantError, ValueError):
    """A file that is not a GGUF file, or that violates the format.

    Attributes:
        path: the file.
        field: what was being read, for example ``"tensor 'a.weight' offset"``.
        offset: byte position of that field in the file, or None.
        found: what the file holds there.
        allowed: what it may hold.
        reason: what is wrong, and what is allowed or what to do.
    """

    def __init__(self, path: str, field: str, offset: int | None, found: object, allowed: str, reason: str) -> None:
        self.path = path
        self.field = field
        self.offset = offset
        self.found = found
        self.allowed = allowed
        self.reason = printable(reason)
        super().__init__(f"{path}: {reason}" if offset is None else f"{path}: at byte {offset}: {reason}")

    def __reduce__(self) -> tuple[type[GgufError], tuple[str, str, int | None, object, str, str]]:
        return type(self), (self.path, self.field, self.offset, self.found, self.allowed, self.reason)


MAX_SHOWN = 120
"""Maximum characters of a wrong argument in an error message."""


class _Repr(reprlib.Repr):
    """A `repr` of limited length. Arrays are shown by their shape: their values may be many, or in freed memory."""

    def repr_instance(self, thing: Any, level: int) -> str:
        if hasattr(thing, "shape") and hasattr(thing, "dtype") and not isinstance(thing, type):
            return f"{type(thing).__name__} of shape {tuple(thing.shape)}"
        return super().repr_instance(thing, level)


_repr = _Repr()
_repr.maxother = _repr.maxstring = _repr.maxlong = MAX_SHOWN


def shown(thing: Any) -> str:
    """A wrong argument for an error message: on one line, shortened, and safe for any object."""
    try:
        if isinstance(thing, int) and not -(10**40) < thing < 10**40:
            return f"an int of {thing.bit_length()} bits"
        if isinstance(thing, (str, bytes, bytearray)):
            text = repr(thing[:MAX_SHOWN])
            return text if len(thing) <= MAX_SHOWN else f"{text}..."
        text = " ".join(_repr.repr(thing).split())
    except Exception:  # a foreign object may raise any exception
        return f"an object of type {type(thing).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


_PACKAGE = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Issue a RuntimeWarning that points to the line of the caller outside this package.

    Control characters are escaped.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and (frame.f_globals.get("__package__") or "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message), RuntimeWarning, stacklevel=level)


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    """Issue a warning once per process."""
    warn(message)
