"""Files that appear under their names only when all of them are complete.

They are written to a folder beside them, and then moved. The process holds a lock on that folder, so that another
process can tell whether the folder is in use or was left by a process that was killed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

from numba_dequant.errors import NumbaDequantError

WORK_NAME = re.compile(r"\.numba_dequant-convert-[0-9a-f]{16}", re.ASCII)
LOCK = "lock"

ABANDONED_AFTER = 3600
"""Seconds after which a folder without a lock file is considered abandoned by its process."""

ADVICE = {
    errno.ENOSPC: "; free some space, or write to another disk",
    errno.EDQUOT if hasattr(errno, "EDQUOT") else 0: "; free some space, or write to another disk",
    errno.EFBIG: "; pass a smaller --shard-size, or raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "; write to another folder",
    errno.EACCES: "; write to another folder",
    errno.EPERM: "; write to another folder",
    errno.ENOENT: "; make the folder first",
}
"""What to do about a system error, by errno."""


@contextmanager
def explained(path: str) -> Iterator[None]:
    """A context in which a system error names the file that the user asked for, and says what to do."""
    try:
        yield
    except NumbaDequantError:  # errors of reading are system errors, too
        raise
    except OSError as error:
        reason = f"{error.strerror or error}{ADVICE.get(error.errno or 0, '')}"
        raise OSError(error.errno or errno.EIO, reason, path) from error


class NewFiles:
    """A context in which files are written. They are moved to their names by `publish`, and otherwise removed."""

    def __init__(self, folder: str) -> None:
        self._folder = folder or os.curdir
        self._work = ""
        self._lock = -1

    def __enter__(self) -> NewFiles:
        _remove_abandoned(self._folder)
        while not self._made():
            pass
        return self

    def __exit__(self, *error: object) -> None:
        # On Windows, an open file cannot be removed; elsewhere, the lock should last as long as the folder.
        if sys.platform == "win32":
            os.close(self._lock)
        shutil.rmtree(self._work, ignore_errors=True)
        if sys.platform != "win32":
            os.close(self._lock)

    def _made(self) -> bool:
        """Make the folder and lock it. False if another process has removed it before it was locked."""
        self._work = os.path.join(self._folder, f".numba_dequant-convert-{secrets.token_hex(8)}")
        os.mkdir(self._work, 0o700)
        try:
            path = os.path.join(self._work, LOCK)
            self._lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            _is_locked(self._lock)
        except FileNotFoundError:
            return False
        if os.path.exists(path):
            return True
        os.close(self._lock)
        return False

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A new file, which is on the disk at the end of the context."""
        with open(os.path.join(self._work, name), "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def publish(self, names: Sequence[str], obsolete: Sequence[str]) -> None:
        """Remove obsolete files, and move the new files to their names, in this order.

        If that fails, those files that have been moved are removed again, unless they have replaced others.
        """
        moved = []
        for name in obsolete:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._folder, name))
        try:
            for name in names:
                target = os.path.join(self._folder, name)
                is_new = not os.path.lexists(target)
                os.replace(os.path.join(self._work, name), target)
                if is_new:
                    moved.append(target)
            _write_folder(self._folder)
        except BaseException:
            for target in moved:
                with suppress(OSError):
                    os.unlink(target)
            raise


def _write_folder(folder: str) -> None:
    """Have the names in a folder written to the disk."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot do this
            os.fsync(handle)
    finally:
        os.close(handle)


def _is_locked(handle: int) -> bool:
    """Lock an open file, without waiting; returns whether that worked."""
    if sys.platform == "win32":
        return True  # as long as it is open, others cannot remove it
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: str) -> None:
    """Remove the folders of processes that were killed."""
    with os.scandir(folder) as entries:
        works = [each.path for each in entries if WORK_NAME.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]
    for work in works:
        with suppress(OSError):
            _remove_if_abandoned(work)


def _remove_if_abandoned(work: str) -> None:
    path = os.path.join(work, LOCK)
    if not os.path.lexists(path):
        if time.time() - os.stat(work).st_mtime > ABANDONED_AFTER:
            shutil.rmtree(work, ignore_errors=True)
        return
    if sys.platform == "win32":
        os.unlink(path)  # fails while another process has it open
        shutil.rmtree(work, ignore_errors=True)
        return
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        if _is_locked(handle):
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)
