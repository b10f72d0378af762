"""Where the bytes of a GGUF file come from, a file on disk or memory, and whether they are still the same.

Files are read, not mapped: a file that is cut short under a map ends the process. Every file is opened by
`open_regular`, so that a pipe or a device in the place of a file is an error and never waited for.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_dequant.arguments import flat_bytes, host_array
from numba_dequant.errors import DataError, MissingFileError, NumbaDequantError, OptionError, ReadError, shown, warn

CHANGED = "it has changed since it was opened; reopen it"
"""What errors say of a file that is not the one whose header was read."""

ADVICE = {
    errno.ENOENT: "",
    errno.EACCES: "; this user may not read it: change its permissions",
    errno.EPERM: "; this user may not read it: change its permissions",
    errno.EMFILE: "; close some files, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "; close some files, or raise the system's limit of open files",
    errno.ELOOP: "; a symbolic link on the way leads back to itself: correct the link",
    errno.ENOTDIR: "; a part of the path is a file: correct the path",
    errno.ENAMETOOLONG: "; correct the path",
    errno.ENOMEM: "; free some memory",
}
"""What to do about an error of the system; `USUAL_ADVICE` for all others."""

USUAL_ADVICE = "; check the disk, or copy the file again"

LONGEST_WRITE = 2_000_000_000
"""Nanoseconds: a file gets its new time before the bytes, and some systems count time in steps of two seconds."""

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class FileIdentity(NamedTuple):
    """What the system says of a file: its size in bytes, when it was written to, its number and that of its disk."""

    size: int
    mtime_ns: int
    inode: int
    device: int


def identity_of(file: io.RawIOBase) -> FileIdentity:
    """What the system says of an open file."""
    found = os.fstat(file.fileno())
    return FileIdentity(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


class NotRegularFileError(OSError):
    """A directory, a pipe or the like, where a file was expected; `strerror` says which."""


class OpenFile(io.FileIO):
    """An open file, and how many times `Source.is_unchanged` may trust its size alone."""

    trusted = 0
    next_trusted = 1


def open_regular(path: str) -> OpenFile:
    """Open a file for reading, without waiting for anything.

    Raises:
        NotRegularFileError: there is something else than a file.
        OSError: it cannot be opened.
    """
    try:
        file = OpenFile(path, "rb", opener=_open_at_once)
    except ValueError as error:  # a NUL, or a character that no path of this system holds
        raise OSError(errno.ENOENT, f"No such file ({error})") from error
    except OSError as error:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            raise error from None
        _check_regular(mode)
        raise
    try:
        _check_regular(os.fstat(file.fileno()).st_mode)
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe waits for a writer otherwise


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_it, kind in KINDS if is_it(mode)), "no regular file")
        raise NotRegularFileError(errno.EINVAL, f"it is {kind}, not a file")


def read_error(
    name: str, error: OSError, tensor: str | None = None, offset: int | None = None, what: str = ""
) -> ReadError:
    """The error of ours for one of the system: what was being read, what happened, and what to do."""
    reason = f"{what}{error.strerror or error}"
    if isinstance(error, NotRegularFileError):
        return ReadError(name, tensor, offset, f"{reason}; correct the path", error.errno)
    reason += ADVICE.get(error.errno or 0, USUAL_ADVICE)
    if error.errno != errno.ENOENT:
        return ReadError(name, tensor, offset, reason, error.errno)
    if name.startswith("~"):
        reason += "; ~ is not expanded: pass os.path.expanduser(path)"
    elif "://" in name:
        reason += "; a URL is not opened: download the file first"
    return MissingFileError(name, tensor, offset, reason, error.errno)


class MemoryFile(io.RawIOBase):
    """Bytes in memory, read as a file is."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes; the result is how many there were."""
        room = memoryview(buffer).cast("B")
        found = self._data[self._position : self._position + len(room)]
        room[: len(found)] = found.data
        self._position += len(found)
        return len(found)


class Source:
    """One GGUF file: where its bytes are, and what tells whether it is the one whose header was read.

    Attributes:
        name: the path as it was given, or ``<memory>``: what errors and tables show.
        path: the absolute path; empty for memory.
        data: the bytes in memory, None for a file.
        stamp: of the file when its header was read.
        header: offset, length and checksum of each part of the header that was read.
        may_grow: whether it may get longer, because its download was not complete.
    """

    def __init__(self, name: str, path: str = "", data: NDArray[np.uint8] | None = None) -> None:
        self.name, self.path, self.data = name, path, data
        self.stamp = FileIdentity(0 if data is None else data.size, 0, 0, 0)
        self.header: list[tuple[int, int, tuple[int, int, int]]] = []
        self.may_grow = False
        self._accepted = self.stamp
        self._warnings_left = [None]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Source):
            return NotImplemented
        return (self.name, self.path, self.stamp, self.header) == (other.name, other.path, other.stamp, other.header)

    def __hash__(self) -> int:
        return hash((self.name, self.path, self.stamp))

    def __repr__(self) -> str:
        return f"Source({self.name!r})"

    def open(self) -> io.RawIOBase:
        """The bytes as an open file.

        Raises:
            OSError: as `open_regular` has it.
        """
        return MemoryFile(self.data) if self.data is not None else open_regular(self.path)

    def open_first(self) -> io.RawIOBase:
        """The bytes as an open file whose header has not been read yet: what is found now is what is expected later.

        Raises:
            OSError: as `open_regular` has it.
        """
        file = self.open()
        if self.data is None:
            self.stamp = self._accepted = identity_of(file)
        self.header.clear()
        return file

    def size(self, file: io.RawIOBase) -> int:
        """Bytes in an open file of this source."""
        return self.data.size if self.data is not None else identity_of(file).size

    def is_cut_short(self, file: io.RawIOBase) -> bool:
        """Whether an open file is the one whose header was read, and has become shorter."""
        if self.data is not None:
            return False
        stamp, known = identity_of(file), self.stamp
        return (stamp.inode, stamp.device) == (known.inode, known.device) and stamp.size < known.size

    def is_unchanged(self, file: io.RawIOBase) -> bool:
        """Whether an open file is the one whose header was read, and has not been written to as far as can be told.

        A file of another size is another. Where the size is the same, but the time of writing or the number of the
        file has changed, the header is read again and compared: some mounts change the time without a write, or by
        reading, and some network file systems number files anew. Where both have changed, it is another file. A new
        time is said in a warning, once. Not noticed is what leaves the header, the size and one of those two as they
        were: values that somebody has overwritten in place get no more than the warning.

        Raises:
            OSError: the header cannot be read.
        """
        if self.data is not None:
            return True
        stamp = identity_of(file)
        if stamp == self._accepted:
            return True
        known = self.stamp
        has_grown = self.may_grow and stamp.size > known.size
        has_new_time = stamp.mtime_ns != known.mtime_ns
        has_new_number = (stamp.inode, stamp.device) != (known.inode, known.device)
        if (stamp.size != known.size and not has_grown) or (has_new_number and has_new_time):
            return False
        # Where reading changes the time, each chunk would have the whole header read again.
        if isinstance(file, OpenFile):
            if file.trusted:
                file.trusted -= 1
                return True
            file.trusted, file.next_trusted = file.next_trusted, 2 * file.next_trusted
        if not self._has_same_header(file):
            return False
        if has_new_time and not has_grown and self._may_warn():
            warn(
                f"{self.name}: its time stamp has changed since it was opened, its size and its header have not; it is "
                "taken for the same file. Reopen it if its tensors may have been written to"
            )
        if time.time_ns() - stamp.mtime_ns > LONGEST_WRITE:
            self._accepted = stamp
        return True

    def _may_warn(self) -> bool:
        """True once: several threads may find out at the same time."""
        try:
            self._warnings_left.pop()
        except IndexError:
            return False
        return True

    def _has_same_header(self, file: io.RawIOBase) -> bool:
        for offset, length, expected in self.header:
            room = np.empty(length, np.uint8)
            if read_into(file, room, offset) < length or checksum(room) != expected:
                return False
        return True


def checksum(data: Any) -> tuple[int, int, int]:
    """Numbers that tell bytes from others by accident, not by malice.

    Words are laid in rows of 4 KiB; the sums of the columns and those of the rows tell where a word stood. It takes a
    seventh of the time of a CRC-32 of all.
    """
    found = np.frombuffer(data, np.uint8)
    rows = found[: len(found) // 4096 * 4096].view(np.uint64).reshape(-1, 512)
    return zlib.crc32(np.add.reduce(rows, 0)), zlib.crc32(np.add.reduce(rows, 1)), zlib.crc32(found[rows.nbytes :].data)


def read_into(file: io.RawIOBase, data: NDArray[np.uint8], offset: int) -> int:
    """Fill `data` with the bytes from `offset` on; the result is how many there were."""
    file.seek(offset)
    done = 0
    while done < len(data):
        count = file.readinto(data[done:].data)
        if not count:
            break
        done += count
    return done


def source_of(given: Any, number: int | None = None) -> Source:
    """The source that a user has named: a path, or the contents of a file; `number` is its place in a list.

    A `str`, an `os.PathLike` and `bytes` without a NUL byte are paths. `bytes` with one are contents, because every
    GGUF file has a NUL among its first six bytes, and no path can have any; so are the first few bytes of such a file,
    and whatever else holds bytes in memory.

    Raises:
        OptionError: it is neither.
        DataError: it is memory that is not contiguous, or not bytes.
        ReadError: a relative path, and the working directory is gone.
    """
    if isinstance(given, (str, os.PathLike)) or (isinstance(given, bytes) and _is_path(given)):
        try:
            name = os.fsdecode(given)
        except TypeError as error:
            raise OptionError(f"expected a path, got {type(given).__name__}: {error}") from error
        try:
            return Source(name, _absolute(name))
        except OSError as error:
            raise read_error(name, error) from error
    try:
        contents = _contents(given)
    except NumbaDequantError:
        raise
    except Exception as error:  # a foreign object may fail in any way when it is asked what it is
        raise OptionError(f"expected a path or the contents of a file as bytes, got {shown(given)}") from error
    name = "<memory>" if number is None else f"<memory {number}>"
    return Source(name, data=contents)


def _is_path(given: bytes) -> bool:
    return b"\0" not in given and not (given.startswith(b"GGUF") and len(given) < 6)


def _contents(given: Any) -> NDArray[np.uint8]:
    if not isinstance(given, np.ndarray) and not hasattr(given, "__dlpack__"):
        try:
            memoryview(given)
        except TypeError:
            hint = "; of an open file, pass what its read() gives" if hasattr(given, "read") else ""
            raise OptionError(
                f"expected a path, the contents of a file as bytes, or a list of shards, got "
                f"{type(given).__name__}{hint}"
            ) from None
    if isinstance(given, np.ndarray) and given.dtype.itemsize != 1:
        raise DataError(f"expected the contents of a file as an array of uint8, got {given.dtype.name}")
    array = host_array(given)
    if not array.flags.c_contiguous:
        raise DataError("expected the contents of a file as one contiguous piece of memory; pass a contiguous copy")
    return flat_bytes(array)


def _absolute(path: str) -> str:
    # Not os.path.abspath, except for drive letters: "link/.." is not where it says if the link leads elsewhere.
    if os.name == "nt":
        return os.path.abspath(path) if path else path
    return os.path.join(os.getcwd(), path) if path and not os.path.isabs(path) else path
