"""Folders for copies of training data: this user's, and nobody else writes there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedray.errors import ConfigError


def owned_folder(path: Path, key: str) -> Path:
    """The folder, made for this user alone where it is not there. `key`: what decides where it is. Raises ConfigError
    for one that another could write to, and for one that cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{key} '{path}' cannot be made ({error.strerror}): give another place") from error
    there = path.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise ConfigError(
            f"{key} '{path}' is not a folder of this user's alone: another could change the training data in it; "
            "give another place"
        )
    return path
