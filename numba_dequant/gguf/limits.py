"""Limits on what the header of a model may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from numba_dequant.arguments import whole_option
from numba_dequant.errors import GgufError, OptionError, shown

LONGEST_STRING = 1 << 30
"""Maximum of `Limits.string_bytes`: positions within a part of the header that is in memory are 32-bit integers."""


@dataclass(frozen=True)
class Limits:
    """What the header of a model may have at most. `open` refuses a file that has more.

    The time and the memory that `open` needs are proportional to the size of the header. The default limits are far
    above those of any published model. Set lower ones for files of strangers, for example in a server.

    >>> limits = numba_dequant.Limits(header_bytes=32 << 20, tensors=20_000)           # doctest: +SKIP

    Attributes:
        header_bytes: bytes of metadata and tensor table, of all shards together.
        metadata_entries: keys with their values, of all shards together.
        tensors: tensors, of all shards together.
        string_bytes: bytes of one string, at most 2**30. Strings of less than 1 MiB in arrays are checked when they are
            read.
        shards: files that are opened because the first one names their number. A list of files has no limit.

    Raises:
        OptionError: a limit is not a whole number, is less than 1, or `string_bytes` is more than 2**30.
    """

    header_bytes: int = 256 << 20
    metadata_entries: int = 100_000
    tensors: int = 1_000_000
    string_bytes: int = 64 << 20
    shards: int = 1_000

    def __post_init__(self) -> None:
        for field in fields(self):
            whole_option(field.name, getattr(self, field.name), 1)
        if self.string_bytes > LONGEST_STRING:
            raise OptionError(f"string_bytes must be at most {LONGEST_STRING}, got {shown(self.string_bytes)}")

    def exceeded(self, name: str, path: str, at: int | None, found: object, what: str) -> GgufError:
        """The error for a file that exceeds the limit `name`; `what` says what it has."""
        limit = getattr(self, name)
        reason = (
            f"{what}; the limit is {limit:,}. If you trust this file, open it with a higher limit: "
            f"limits=numba_dequant.Limits({name}=...)"
        )
        return GgufError(path, name, at, found, f"at most {limit}", reason)


class Allowance:
    """What is left of the limits while the files of one model are read.

    Attributes:
        limits: the limits of the model.
        header_bytes: what is left of the limit of this name.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.header_bytes = limits.header_bytes
        self._metadata_entries, self._tensors = limits.metadata_entries, limits.tensors

    def spend_entries(self, count: int, path: str, at: int) -> None:
        """Count metadata entries, before they are read. Raises GgufError if there are too many."""
        self._metadata_entries -= count
        if self._metadata_entries < 0:
            total = self.limits.metadata_entries - self._metadata_entries
            raise self.limits.exceeded("metadata_entries", path, at, total, f"the model has {total:,} metadata entries")

    def spend_tensors(self, count: int, path: str, at: int) -> None:
        """Count tensors, before they are read. Raises GgufError if there are too many."""
        self._tensors -= count
        if self._tensors < 0:
            total = self.limits.tensors - self._tensors
            raise self.limits.exceeded("tensors", path, at, total, f"the model has {total:,} tensors")


def checked_limits(limits: object) -> Limits:
    """The limits that a caller passes; None means the default. Raises OptionError for anything else."""
    if limits is None:
        return Limits()
    if not isinstance(limits, Limits):
        raise OptionError(f"limits must be a numba_dequant.Limits or None, got {shown(limits)}")
    return limits
