"""The directory in which compiled code is kept from one process to the next.

An entry is one file: the SHA-256 of its payload, then the payload. It is written under another name and then renamed,
so that many processes may write at once; one that cannot be read, or does not match its sum, counts as missing.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

VARIABLE = "NUMBA_DEQUANT_CACHE_DIR"


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
def package_digest() -> str:
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


def entry_name(label: str, *parts: object) -> str:
    """The name of the entry for `label` that depends on all of `parts` and on this package's source."""
    text = "\0".join([label, package_digest(), *map(str, parts)])
    return f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def read(name: str) -> bytes | None:
    """The payload of an entry, or None if there is no sound one."""
    try:
        content = (directory() / name).read_bytes()
    except OSError:
        return None
    payload = content[32:]
    return payload if hashlib.sha256(payload).digest() == content[:32] else None


def entries() -> dict[str, int]:
    """Name and size in bytes of every entry."""
    try:
        with os.scandir(directory()) as found:
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file() and entry.name[0] != "."}
    except OSError:
        return {}


def clear() -> int:
    """Remove every entry; the result is how many there were. Processes that run now keep what they have loaded."""
    names = entries()
    for name in names:
        (directory() / name).unlink(missing_ok=True)
    return len(names)


def write(name: str, payload: bytes) -> bool:
    """Keep `payload` as an entry; False if the directory cannot be written, which costs speed and nothing else."""
    temporary = None
    try:
        directory().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory(), prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, directory() / name)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True
