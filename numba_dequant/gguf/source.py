"""The source of a GGUF file's bytes, a file on disk or memory, and the detection of changes.

Files are read. They are mapped only for `Model.read(mmap=True)`, because access to the map of a truncated file ends the
process. Every file is opened by `open_regular`, so that a pipe or a device raises an error instead of blocking.
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
"""The reason in errors about a file that is no longer the one whose header was read."""

ADVICE = {
    errno.ENOENT: "",
    errno.EACCES: "; this user may not read it: change its permissions",
    errno.EPERM: "; this user may not read it: change its permissions",
    errno.EMFILE: "; close some files, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "; close some files, or raise the system's limit of open files",
    errno.ELOOP: "; the path contains a loop of symbolic links: correct the links",
    errno.ENOTDIR: "; a directory of the path is a file: correct the path",
    errno.ENAMETOOLONG: "; correct the path",
    errno.ENOMEM: "; free some memory",
}
"""What to do about a system error, by errno; `USUAL_ADVICE` for all others."""

USUAL_ADVICE = "; check the disk, or copy the file again"

LONGEST_WRITE = 2_000_000_000
"""Nanoseconds after which a time stamp is trusted.

A write sets the time stamp before it writes the bytes, and some file systems store time stamps in steps of 2 s.
"""

FILE_TYPES = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class FileIdentity(NamedTuple):
    """The size, modification time, inode and device of a file."""

    size: int
    mtime_ns: int
    inode: int
    device: int


def identity_of(file: io.RawIOBase) -> FileIdentity:
    """The identity of an open file."""
    status = os.fstat(file.fileno())
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class NotRegularFileError(OSError):
    """A directory, a pipe or a device instead of a regular file; `strerror` says which."""


class OpenFile(io.FileIO):
    """An open file, and how many times `Source.is_unchanged` may skip comparing the header."""

    trusted = 0
    next_trusted = 1


def open_regular(path: str) -> OpenFile:
    """Open a regular file for reading, without blocking. A symbolic link is followed.

    Raises:
        NotRegularFileError: the path is not a regular file.
        OSError: the file cannot be opened.
    """
    try:
        _check_regular(os.stat(path).st_mode)  # opening a device or a pipe may have an effect
        file = OpenFile(path, "rb", opener=_open_at_once)
    except ValueError as error:  # a NUL, or a character that paths cannot have on this system
        raise OSError(errno.ENOENT, f"No such file ({error})") from error
    try:  # another file may have this path by now
        _check_regular(os.fstat(file.fileno()).st_mode)
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for a writer. Without O_NOCTTY, a terminal may become the process's own.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        name = next((name for is_type, name in FILE_TYPES if is_type(mode)), "a special file")
        raise NotRegularFileError(errno.EINVAL, f"it is {name}, not a file")


def read_error(
    name: str, error: OSError, tensor: str | None = None, offset: int | None = None, what: str = ""
) -> ReadError:
    """Convert a system error to a `ReadError` that says what was read, what happened and what to do."""
    reason = f"{what}{error.strerror or error}"
    if isinstance(error, NotRegularFileError):
        return ReadError(name, tensor, offset, f"{reason}; correct the path", error.errno)
    reason += ADVICE.get(error.errno or 0, USUAL_ADVICE)
    if error.errno != errno.ENOENT:
        return ReadError(name, tensor, offset, reason, error.errno)
    if name.startswith("~"):
        reason += "; ~ is not expanded: pass os.path.expanduser(path)"
    elif "://" in name:
        reason += "; URLs are not supported: download the file first"
    return MissingFileError(name, tensor, offset, reason, error.errno)


class MemoryFile(io.RawIOBase):
    """A file object over bytes in memory."""

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
        """Read up to the size of the buffer; returns how many bytes were read."""
        room = memoryview(buffer).cast("B")
        chunk = self._data[self._position : self._position + len(room)]
        room[: len(chunk)] = chunk.data
        self._position += len(chunk)
        return len(chunk)


class Source:
    """The source of one GGUF file: its path or bytes, and what is needed to detect changes.

    Attributes:
        name: the path as the caller gave it, or ``<memory>``; shown in errors and tables.
        path: the absolute path; empty for memory.
        data: the bytes in memory; None for a file.
        stamp: the identity of the file when its header was read.
        header: offset, length and checksum of each part of the header that was read.
        may_grow: whether the file may become longer, because its download was incomplete.
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
        """Open the bytes as a file.

        Raises:
            OSError: as for `open_regular`.
        """
        return MemoryFile(self.data) if self.data is not None else open_regular(self.path)

    def open_first(self) -> io.RawIOBase:
        """Open the bytes as a file before its header is read, and store its identity for later checks.

        Raises:
            OSError: as for `open_regular`.
        """
        file = self.open()
        if self.data is None:
            self.stamp = self._accepted = identity_of(file)
        return file

    def size(self, file: io.RawIOBase) -> int:
        """The size in bytes of an open file of this source."""
        return self.data.size if self.data is not None else identity_of(file).size

    def is_cut_short(self, file: io.RawIOBase) -> bool:
        """Whether an open file on disk is still the one whose header was read, but shorter."""
        stamp, known = identity_of(file), self.stamp
        return (stamp.inode, stamp.device) == (known.inode, known.device) and stamp.size < known.size

    def is_unchanged(self, file: io.RawIOBase) -> bool:
        """Whether an open file is still the one whose header was read.

        The file has changed if its size differs, or if both its modification time and its inode differ. Only a file
        that was incomplete may have grown. If only the time or the inode differs, the header is read again and
        compared, because some mounts change the time without a write, and some network file systems assign new inodes.
        A new modification time causes one warning. Tensor data that is overwritten in place is not detected: it causes
        only this warning.

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
        # If reading changes the time, every chunk would otherwise reread the whole header.
        if isinstance(file, OpenFile):
            if file.trusted:
                file.trusted -= 1
                return True
            file.trusted, file.next_trusted = file.next_trusted, 2 * file.next_trusted
        if not self._has_same_header(file):
            return False
        if has_new_time and not has_grown and self._may_warn():
            warn(
                f"{self.name}: its time stamp has changed since it was opened, but its size and header have not. The "
                "file is treated as unchanged; reopen it if its tensors may have been written to"
            )
        if time.time_ns() - stamp.mtime_ns > LONGEST_WRITE:
            self._accepted = stamp
        return True

    def _may_warn(self) -> bool:
        """True for the first call only, from any thread."""
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
    """A checksum against accidental changes. It does not protect against deliberate ones.

    The 64-bit words form rows of 4 KiB. CRCs of the sums of the columns and of the rows detect moved words. This takes
    a seventh of the time of a CRC-32 of all bytes.
    """
    octets = np.frombuffer(data, np.uint8)
    rows = octets[: len(octets) // 4096 * 4096].view(np.uint64).reshape(-1, 512)
    rest = octets[rows.nbytes :]
    return zlib.crc32(np.add.reduce(rows, 0)), zlib.crc32(np.add.reduce(rows, 1)), zlib.crc32(rest.data)


def read_into(file: io.RawIOBase, data: NDArray[np.uint8], offset: int) -> int:
    """Fill `data` with the bytes from `offset`; returns how many bytes were read."""
    file.seek(offset)
    done = 0
    while done < len(data):
        count = file.readinto(data[done:].data)
        if not count:
            break
        done += count
    return done


def source_of(given: Any, number: int | None = None) -> Source:
    """The source for a path or for the contents of a file. `number` is the position in a list.

    A `str`, an `os.PathLike`, and `bytes` without a NUL byte are paths. `bytes` with a NUL byte are contents: every
    GGUF file has one in its first six bytes, and no path has one. Shorter `bytes` that begin with GGUF, and any other
    object with bytes in memory, are contents too.

    Raises:
        OptionError: `given` is neither.
        DataError: the memory is not contiguous, or not bytes.
        ReadError: the path is relative, and the working directory does not exist.
    """
    if isinstance(given, (str, os.PathLike)) or (isinstance(given, bytes) and _is_path(given)):
        try:
            name = os.fsdecode(given)
        except Exception as error:  # a foreign object may raise any exception
            raise OptionError(f"expected a path, got {type(given).__name__}: {error}") from error
        try:
            return Source(name, _absolute(name))
        except OSError as error:
            raise read_error(name, error) from error
    try:
        contents = _contents(given)
    except NumbaDequantError:
        raise
    except Exception as error:  # a foreign object may raise any exception
        raise OptionError(f"expected a path or the contents of a file as bytes, got {shown(given)}") from error
    name = "<memory>" if number is None else f"<memory {number}>"
    return Source(name, data=contents)


def _is_path(given: bytes) -> bool:
    return b"\0" not in given and not (given.startswith(b"GGUF") and len(given) < 6)


def _contents(given: Any) -> NDArray[np.uint8]:
    if not hasattr(given, "__dlpack__"):  # arrays of NumPy have it
        try:
            memoryview(given)
        except TypeError:
            hint = "; for an open file, pass the result of its read()" if hasattr(given, "read") else ""
            raise OptionError(
                f"expected a path, the contents of a file as bytes, or a list of shards, got "
                f"{type(given).__name__}{hint}"
            ) from None
    if isinstance(given, np.ndarray) and given.dtype.itemsize != 1:
        raise DataError(f"the contents of a file must be an array of uint8, got {given.dtype.name}")
    array = host_array(given)
    if not array.flags.c_contiguous:
        raise DataError("the contents of a file must be contiguous in memory; pass a contiguous copy")
    return flat_bytes(array)


def _absolute(path: str) -> str:
    # os.path.abspath is used on Windows only: it would drop "link/..", which is wrong if `link` is a symbolic link.
    if os.name == "nt":
        return os.path.abspath(path) if path else path
    return os.path.join(os.getcwd(), path) if path and not os.path.isabs(path) else path
