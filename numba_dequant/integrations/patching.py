"""Replacing functions of other packages, and restoring them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from numba_dequant.errors import OptionError

_PACKAGE = __name__.partition(".")[0]

LOGGER = logging.getLogger(_PACKAGE)


class Replacement(NamedTuple):
    """A function or class of a program, and ours.

    Attributes:
        owner: the module or class that has the attribute.
        name: the attribute.
        new: the object to put in its place.
        everywhere: also replace the object in all modules that have imported it by name.
    """

    owner: Any
    name: str
    new: Any
    everywhere: bool = True

    @property
    def path(self) -> str:
        """The dotted name, for messages."""
        prefix = (
            self.owner.__name__
            if isinstance(self.owner, ModuleType)
            else f"{self.owner.__module__}.{self.owner.__qualname__}"
        )
        return f"{prefix}.{self.name}"


def require_version(package: str, first: str, last: str) -> None:
    """Check that a known version of a package is installed.

    Args:
        package: name of the distribution.
        first: the first known version, such as "5.20".
        last: the last known version; versions that begin with it are known too.

    Raises:
        OptionError: it is not installed, or its version is unknown.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise OptionError(f"{package} is not installed; install it with: pip install {package}") from None
    number, upper = _number(installed), _number(last)
    if not _number(first) <= number or number[: len(upper)] > upper:
        raise OptionError(
            f"{package} {installed} is unknown to numba_dequant, which knows {first} to {last}; "
            "install one of these versions, or a newer numba_dequant"
        )


def _number(text: str) -> tuple[int, ...]:
    """The leading whole numbers of a version."""
    number = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        number.append(int(digits))
        if digits != part:
            break
    return tuple(number)


@dataclass
class Replaced:
    """What `accelerate` has replaced. It is also a context manager: leaving it calls `undo`."""

    _places: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    _paths: list[str] = field(default_factory=list)

    def undo(self) -> None:
        """Restore the functions.

        A function that someone else has replaced since is left alone. A module that has imported our function by name
        since keeps it.
        """
        while self._places:
            owner, name, old, new = self._places.pop()
            if vars(owner).get(name) is new:
                setattr(owner, name, old)

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        return f"numba_dequant replaces {', '.join(self._paths) or 'nothing, because everything was replaced before'}"

    def _replace(self, replacement: Replacement) -> None:
        old = vars(replacement.owner)[replacement.name]
        places = [(replacement.owner, replacement.name)]
        if replacement.everywhere:
            # A None or a number may be in any place, so `everywhere` is for functions, classes and tables.
            places += [(each, name) for each in _modules() for name, value in list(vars(each).items()) if value is old]
        for owner, name in places:
            if vars(owner)[name] is old:
                setattr(owner, name, replacement.new)
                self._places.append((owner, name, old, replacement.new))


def _modules() -> list[ModuleType]:
    # The modules of this package keep the originals.
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] != _PACKAGE
    ]


def replace_all(replacements: Sequence[Replacement]) -> Replaced:
    """Replace functions, all or none, and say so in one message.

    Raises:
        OptionError: a program has no such function.
    """
    for replacement in replacements:
        if replacement.name not in vars(replacement.owner):
            raise OptionError(f"{replacement.path} does not exist; install a version that numba_dequant knows")
    replaced = Replaced()
    try:
        for replacement in replacements:
            if vars(replacement.owner)[replacement.name] is not replacement.new:  # it is not replaced already
                replaced._replace(replacement)
                replaced._paths.append(replacement.path)
    except BaseException:
        replaced.undo()
        raise
    LOGGER.warning("%s", replaced)
    return replaced
