"""The folder in which compiled code is kept from one process to the next.

An entry is one file: `MAGIC`, the SHA-256 of its name and payload, the payload. It is written under another name and
then renamed, so that many processes may write at once; one that cannot be read, or does not match its sum, counts as
missing.

What is read here is run, so it must come from this user. The rule is that of ssh for keys: the folder and each entry
belong to this user or to root, nobody else may write to them, and an entry is a plain file and not a link. Otherwise
it is not used, and one warning says why. The folder itself may be reached by links of this user's or root's. Windows
has no such modes; there the folder below the user's own profile is trusted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from numba_dequant.errors import warn_once

VARIABLE = "NUMBA_DEQUANT_CACHE_DIR"

MAGIC = b"numba_dequant cache entry 1\n"
HEAD = len(MAGIC) + 32
ENTRY_NAME = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*-[0-9a-f]{32}", re.ASCII)
TEMPORARY_NAME = re.compile(r"\.numba_dequant-[0-9a-f]{16}\.tmp", re.ASCII)

MAX_BYTES = 512 << 20
"""All entries together; the least recently used ones go first."""

ABANDONED_AFTER = 3600
"""Seconds after which the process that was writing a temporary file must have died."""

USED_WITHIN = 24 * 3600
"""Seconds within which a second use of an entry is not noted."""


def directory() -> Path:
    """Where entries are kept: `NUMBA_DEQUANT_CACHE_DIR`, or else the user's cache directory on this platform.

    Raises:
        FileNotFoundError: the user has no home directory. Nothing is then kept: in a directory that everyone may
            write, somebody else could leave code for this user.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~\\AppData\\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise FileNotFoundError(f"there is no home directory to keep compiled code in; set {VARIABLE} to a directory")
    return Path(base) / "numba_dequant"


@lru_cache
def source_digest() -> str:
    """A digest of this package's own source: compiled code is only as good as the source that it came from."""
    root = os.path.dirname(__file__)
    paths = _sources(root)
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb", buffering=0) as file:
            digest.update(path[len(root) :].encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def _sources(folder: str) -> list[str]:
    # pathlib takes three times as long, and a first call waits for this.
    paths = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.name.endswith(".py"):
                paths.append(entry.path)
            elif entry.is_dir() and entry.name != "__pycache__":
                paths += _sources(entry.path)
    return paths


def cache_key(label: str, *parts: object) -> str:
    """The name of the entry for `label` that depends on all of `parts` and on this package's source."""
    text = "\0".join([label, source_digest(), *map(str, parts)])
    return f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@lru_cache
def versions(*packages: str) -> str:
    """What is installed of packages, as text."""
    found = []
    for package in packages:
        try:
            # What `importlib.metadata.version` does takes three times as long.
            metadata = distribution(package).read_text("METADATA") or ""
            match = re.search(r"^Version: *(\S+)", metadata, re.MULTILINE)
            found.append(f"{package}={match[1] if match else metadata}")
        except PackageNotFoundError:
            found.append(f"{package}=")
    return ", ".join(found)


def read(name: str) -> bytes | None:
    """The payload of an entry, or None if there is no sound one."""
    try:
        with _Folder() as folder:
            folder.check()
            content = folder.read(name)
    except _RefusedError as refused:
        _warn(refused)
        return None
    except OSError:
        return None
    payload = content[HEAD:]
    return payload if content[:HEAD] == _head(name, payload) else None


def write(name: str, payload: bytes) -> bool:
    """Keep `payload` as an entry; False if that is not possible, which costs speed and nothing else."""
    is_kept = _write(name, payload)
    if not is_kept:
        not_kept.append(name)
    return is_kept


not_kept: list[str] = []
"""Names of the entries that this process could not write."""


def _write(name: str, payload: bytes) -> bool:
    assert ENTRY_NAME.fullmatch(name)
    try:
        _make(directory())
        with _Folder() as folder:
            folder.check()
            folder.check_entry(name)
            folder.write(name, _head(name, payload) + payload)
            _remove_abandoned(folder)
            _remove_least_recently_used(folder, name)
    except _RefusedError as refused:
        _warn(refused)
        return False
    except OSError:
        return False
    return True


def entries() -> dict[str, int]:
    """Name and size in bytes of every entry."""
    try:
        with _Folder() as folder:
            return {name: status.st_size for name, status in folder.files(ENTRY_NAME) if folder.is_ours(name)}
    except OSError:
        return {}


def clear() -> int:
    """Remove every entry, and what processes that died have left; the result is how many entries there were.

    A file is an entry if it has the name and the first bytes of one: nothing else in the folder is touched. Processes
    that run now keep what they have loaded.
    """
    count = 0
    with suppress(FileNotFoundError), _Folder() as folder:
        _remove_abandoned(folder)
        for name, _ in folder.files(ENTRY_NAME):
            if folder.is_ours(name):
                with suppress(FileNotFoundError):
                    folder.unlink(name)
                    count += 1
    return count


def problem() -> str | None:
    """Why nothing can be kept, with the folder's name, or None if compiled code is kept."""
    try:
        path = directory().absolute()
        parent = _nearest(path)
        if parent == path:
            with _Folder() as folder:
                folder.check()
        else:
            _check_parent(parent)
            if not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it cannot be written")
    except _RefusedError as refused:
        return str(refused)
    except OSError as error:
        # An error without a number is that of `directory`, which says it all.
        return f"nothing can be kept in {directory()}: {error.strerror}" if error.errno else str(error)
    return None


def _head(name: str, payload: bytes) -> bytes:
    # With the name: nobody can pass one entry off as another.
    return MAGIC + hashlib.sha256(name.encode() + b"\0" + payload).digest()


class _RefusedError(Exception):
    """A folder or an entry that somebody else may have written."""


_warned: set[Path] = set()
"""Folders of which a warning has been given: one is enough, even if each entry has a fault of its own."""


def _warn(refused: _RefusedError) -> None:
    if directory() not in _warned:
        warn_once(f"numba_dequant compiles in each process, because it cannot use its cache: {refused}")
        _warned.add(directory())


def _why_untrusted(status: os.stat_result) -> str | None:
    """Why a file may be somebody else's work, or None if it is not."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _nearest(path: Path) -> Path:
    """The path itself, or else the folder nearest above it that is there."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _check_parent(parent: Path) -> None:
    # Under sudo with the user's HOME: a folder of root's there would shut the user out of the user's own cache.
    if hasattr(os, "geteuid") and os.geteuid() == 0 and (owner := os.stat(parent).st_uid) != 0:
        raise _RefusedError(f"{directory()} would be root's in a folder of another user's (uid {owner})")


def _make(path: Path) -> None:
    """Make the folder, and those above it that are missing, for this user alone."""
    nearest = _nearest(path)
    path = path.absolute()
    missing = [each for each in (path, *path.parents) if nearest in each.parents]
    if missing:
        _check_parent(nearest)
    for each in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(each, 0o700)


class _Folder:
    """The folder of the entries, held open: what has been checked is what is used."""

    def __enter__(self) -> _Folder:
        self._path = directory().absolute()
        self._handle = None
        real = os.path.realpath(self._path)
        if os.open in os.supports_dir_fd:
            self._handle = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def check(self) -> None:
        """Refuse a folder that somebody else may write to, or that is reached by somebody else's link."""
        if self._handle is None:
            return
        if reason := _why_untrusted(os.fstat(self._handle)):
            raise _RefusedError(
                f"{self._path} is not used: {reason}; set {VARIABLE} to a folder that only you may write"
            )
        for path in (self._path, *self._path.parents):
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode) and status.st_uid not in (os.geteuid(), 0):
                raise _RefusedError(
                    f"{self._path} is not used: {path} is a link of another user's (uid {status.st_uid})"
                )

    def check_entry(self, name: str) -> None:
        """Refuse to write over what is not this user's own: it stays, as evidence."""
        with suppress(FileNotFoundError):
            self._check_entry(name, os.lstat(self._at(name), dir_fd=self._handle))

    def _check_entry(self, name: str, status: os.stat_result) -> None:
        reason = "it is not a plain file" if not stat.S_ISREG(status.st_mode) else _why_untrusted(status)
        if reason:
            raise _RefusedError(f"{self._path / name} is not used: {reason}; remove it")

    def read(self, name: str) -> bytes:
        """The content of an entry."""
        handle = self._open(name)
        try:
            status = os.fstat(handle)
            self._check_entry(name, status)
            if time.time() - status.st_mtime > USED_WITHIN:
                with suppress(OSError):
                    os.utime(handle if os.utime in os.supports_fd else self._at(name))
            with open(handle, "rb", closefd=False) as file:
                return file.read(MAX_BYTES)
        finally:
            os.close(handle)

    def write(self, name: str, content: bytes) -> None:
        """Write an entry under another name, then rename it."""
        temporary = f".numba_dequant-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(self._at(temporary), flags, 0o600, dir_fd=self._handle)
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(self._at(temporary), self._at(name), src_dir_fd=self._handle, dst_dir_fd=self._handle)
        except BaseException:
            with suppress(OSError):
                self.unlink(temporary)
            raise

    def files(self, pattern: re.Pattern[str]) -> Iterator[tuple[str, os.stat_result]]:
        """Name and status of each plain file with such a name."""
        with os.scandir(self._path if self._handle is None else self._handle) as found:
            entries = list(found)
            for entry in entries:
                if pattern.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield entry.name, status

    def is_ours(self, name: str, *, is_partial: bool = False) -> bool:
        """Whether a plain file begins as an entry does; one that is partial may end before."""
        try:
            handle = self._open(name)
        except (OSError, _RefusedError):
            return False
        with open(handle, "rb") as file:
            found = file.read(len(MAGIC)) if stat.S_ISREG(os.fstat(handle).st_mode) else b"no file"
        return found == MAGIC or (is_partial and MAGIC.startswith(found))

    def unlink(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._at(name), dir_fd=self._handle)

    def _open(self, name: str) -> int:
        # O_NONBLOCK: a pipe in place of an entry would otherwise be waited for.
        flags = os.O_RDONLY
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        try:
            return os.open(self._at(name), flags, dir_fd=self._handle)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):  # what systems call a link that is not followed
                raise _RefusedError(f"{self._path / name} is not used: it is a link; remove it") from None
            raise

    def _at(self, name: str) -> str:
        return name if self._handle is not None else str(self._path / name)


def _remove_abandoned(folder: _Folder) -> None:
    for name, status in folder.files(TEMPORARY_NAME):
        if time.time() - status.st_mtime > ABANDONED_AFTER and folder.is_ours(name, is_partial=True):
            with suppress(OSError):
                folder.unlink(name)


def _remove_least_recently_used(folder: _Folder, newest: str) -> None:
    found = sorted(folder.files(ENTRY_NAME), key=lambda file: file[1].st_mtime)
    n_bytes = sum(status.st_size for _, status in found)
    for name, status in found:
        if n_bytes <= MAX_BYTES:
            break
        if name != newest and folder.is_ours(name):
            with suppress(OSError):
                folder.unlink(name)
                n_bytes -= status.st_size
