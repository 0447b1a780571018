"""Files that are on disk when a call returns, most of them for their owner alone; and names for them."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def hashed(name: str) -> str:
    """A file's name for any word, however long, and on file systems that take A for a."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def flush(path: Path) -> None:
    """A file's content, or what was made, renamed or removed in a folder, is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, content: bytes, new: bool = False) -> None:
    """Replace a file whole, for its owner alone; with `new`, only make it where there is none. Raises OSError when it
    cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(path, content, new, mode=0o600)


def write_durably(path: Path, text: str) -> None:
    """Replace a file whole, which others may read as far as the umask lets them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, text.encode(), new=False, mode=0o666)


def _write(path: Path, content: bytes, new: bool, mode: int) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(part, path)  # fails where another process was first
        else:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)


def make_secret(path: Path) -> bytes:
    """The 32 secret bytes of a file, drawn from the operating system's randomness where there is none."""
    if not path.is_file():
        with suppress(FileExistsError):  # then the other process's secret holds
            write(path, os.urandom(32), new=True)
    return path.read_bytes()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in this block for the same path."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
