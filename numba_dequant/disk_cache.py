"""The on-disk cache of compiled code.

An entry is one file: `MAGIC`, the SHA-256 of name and payload, the payload. It is written to a temporary file and then
renamed, so that several processes may write at once. An entry that cannot be read or fails its checksum counts as
missing.

The cached code is executed, so it must come from this user. As with ssh keys, the folder and each entry must belong to
this user or to root and must not be writable by others, and an entry must be a regular file, not a link. Otherwise it
is not used, and one warning says why. The path of the folder may contain links of this user or of root. Windows has no
such modes; there, the folder in the user's profile is trusted.
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
from pathlib import Path

from numba_dequant.errors import warn_once

VARIABLE = "NUMBA_DEQUANT_CACHE_DIR"

MAGIC = b"numba_dequant cache entry 1\n"
HEAD = len(MAGIC) + 32
ENTRY_NAME = re.compile(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*-[0-9a-f]{32}", re.ASCII)
TEMPORARY_NAME = re.compile(r"\.numba_dequant-[0-9a-f]{16}\.tmp", re.ASCII)

MAX_BYTES = 512 << 20
"""Maximum size of all entries; the least recently used ones are removed first."""

ABANDONED_AFTER = 3600
"""Seconds after which a temporary file is considered abandoned by its process."""

USED_WITHIN = 24 * 3600
"""Seconds during which further uses of an entry do not update its time stamp."""


def directory() -> Path:
    """The folder of the cache: `NUMBA_DEQUANT_CACHE_DIR`, or else a folder in the user's cache directory.

    Raises:
        FileNotFoundError: the user has no home directory. Nothing is cached then, because another user could place
            code in a world-writable directory.
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
        raise FileNotFoundError(
            f"there is no home directory for the cache of compiled code; set {VARIABLE} to a directory"
        )
    return Path(base) / "numba_dequant"


@lru_cache
def source_digest() -> str:
    """A digest of this package's source, which is part of every cache key."""
    root = os.path.dirname(__file__)
    paths = _sources(root)
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb", buffering=0) as file:
            digest.update(path[len(root) :].encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def _sources(folder: str) -> list[str]:
    # pathlib is three times slower, and the first call waits for this.
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                paths.append(entry.path)
            elif entry.is_dir() and entry.name != "__pycache__":
                paths += _sources(entry.path)
    return paths


def cache_key(label: str, *parts: object) -> str:
    """The name of an entry, which depends on `label`, on `parts` and on this package's source."""
    text = "\0".join([label, source_digest(), *map(str, parts)])
    return f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@lru_cache
def versions(*packages: str) -> str:
    """The installed versions of packages, as text."""
    from importlib.metadata import PackageNotFoundError, distribution  # takes as long as half of this package

    versions = []
    for package in packages:
        try:
            # `importlib.metadata.version` is three times slower.
            metadata = distribution(package).read_text("METADATA") or ""
            match = re.search(r"^Version: *(\S+)", metadata, re.MULTILINE)
            versions.append(f"{package}={match[1] if match else metadata}")
        except PackageNotFoundError:
            versions.append(f"{package}=")
    return ", ".join(versions)


def read(name: str) -> bytes | None:
    """The payload of an entry, or None if there is no valid entry."""
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
    """Write `payload` as an entry; returns False if that fails, which only costs speed."""
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
    """Remove every entry and all abandoned temporary files; returns the number of entries.

    Only files with the name and the first bytes of an entry are removed. Running processes keep the code they have
    loaded.
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


def try_out() -> bool:
    """Whether an entry can be written and read. It is removed."""
    name, payload = cache_key("doctor", secrets.token_hex(8)), b"payload"
    is_kept = _write(name, payload) and read(name) == payload
    with suppress(OSError), _Folder() as folder:
        folder.unlink(name)
    return is_kept


def problem() -> str | None:
    """Why the cache cannot be used, with the name of the folder, or None if it can."""
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
        # An error without an errno comes from `directory`; its message is complete.
        return f"nothing can be cached in {directory()}: {error.strerror}" if error.errno else str(error)
    return None


def _head(name: str, payload: bytes) -> bytes:
    # The name is included, so that one entry cannot be passed off as another.
    return MAGIC + hashlib.sha256(name.encode() + b"\0" + payload).digest()


class _RefusedError(Exception):
    """A folder or an entry that another user may have written."""


_warned: set[Path] = set()
"""Folders for which a warning was issued; there is one warning per folder."""


def _warn(refused: _RefusedError) -> None:
    if directory() not in _warned:
        warn_once(f"numba_dequant compiles in each process, because it cannot use its cache: {refused}")
        _warned.add(directory())


def _why_untrusted(status: os.stat_result) -> str | None:
    """Why another user may have written a file, or None."""
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & 0o022:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _nearest(path: Path) -> Path:
    """The path itself if it exists, or else its nearest existing parent."""
    path = path.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _check_parent(parent: Path) -> None:
    # Under sudo with the user's HOME, a folder of root would lock the user out of the user's own cache.
    if hasattr(os, "geteuid") and os.geteuid() == 0 and (owner := os.stat(parent).st_uid) != 0:
        raise _RefusedError(f"{directory()} would belong to root, in a folder of another user (uid {owner})")


def _make(path: Path) -> None:
    """Create the folder and its missing parents, accessible to this user only."""
    nearest = _nearest(path)
    path = path.absolute()
    missing = [each for each in (path, *path.parents) if nearest in each.parents]
    if missing:
        _check_parent(nearest)
    for each in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(each, 0o700)


class _Folder:
    """The folder of the cache, held open, so that the checked folder is the one that is used."""

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
        """Refuse a folder that another user may write to, or whose path contains another user's link."""
        if self._handle is None:
            return
        if reason := _why_untrusted(os.fstat(self._handle)):
            raise _RefusedError(
                f"{self._path} is not used: {reason}; set {VARIABLE} to a folder that only you may write"
            )
        for path in (self._path, *self._path.parents):
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode) and status.st_uid not in (os.geteuid(), 0):
                raise _RefusedError(f"{self._path} is not used: {path} is a link of another user (uid {status.st_uid})")

    def check_entry(self, name: str) -> None:
        """Refuse to overwrite an entry that is not trusted; it stays as evidence."""
        with suppress(FileNotFoundError):
            self._check_entry(name, os.lstat(self._at(name), dir_fd=self._handle))

    def _check_entry(self, name: str, status: os.stat_result) -> None:
        reason = "it is not a plain file" if not stat.S_ISREG(status.st_mode) else _why_untrusted(status)
        if reason:
            raise _RefusedError(f"{self._path / name} is not used: {reason}; remove it")

    def read(self, name: str) -> bytes:
        """Read an entry."""
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
        """Write an entry to a temporary file, then rename it."""
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
        """Name and status of each regular file whose name matches."""
        with os.scandir(self._path if self._handle is None else self._handle) as entries:
            for entry in list(entries):
                if pattern.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            yield entry.name, status

    def is_ours(self, name: str, *, is_partial: bool = False) -> bool:
        """Whether a regular file begins like an entry; a partial one may be shorter."""
        try:
            handle = self._open(name)
        except (OSError, _RefusedError):
            return False
        with open(handle, "rb") as file:
            start = file.read(len(MAGIC)) if stat.S_ISREG(os.fstat(handle).st_mode) else b"no file"
        return start == MAGIC or (is_partial and MAGIC.startswith(start))

    def unlink(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self._at(name), dir_fd=self._handle)

    def _open(self, name: str) -> int:
        # O_NONBLOCK: opening a pipe must not block.
        flags = os.O_RDONLY
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        try:
            return os.open(self._at(name), flags, dir_fd=self._handle)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):  # the path is a link, and O_NOFOLLOW is set
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
    oldest_first = sorted(folder.files(ENTRY_NAME), key=lambda file: file[1].st_mtime)
    n_bytes = sum(status.st_size for _, status in oldest_first)
    for name, status in oldest_first:
        if n_bytes <= MAX_BYTES:
            break
        if name != newest and folder.is_ours(name):
            with suppress(OSError):
                folder.unlink(name)
                n_bytes -= status.st_size
