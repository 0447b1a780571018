"""Secure sums that hide nothing, because a test's word has fixed the keys of their masks: kept beside the checkpoints,
and said wherever a run is told of.

A run without a ledger has nowhere else to keep it, and no key of a client's that reports would carry. Workers are asked
when they start; a run is what any part of it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.privacy.files import write_durably
from fedray.privacy.keys import TEST_KEY

if TYPE_CHECKING:
    from fedray.config.sections import Config

NOT_SECURE = (
    f"NOT SECURE: the masks of the secure sums were fixed by {TEST_KEY}, a word for tests, so whoever knows it can "
    "read each client's update; unset it where the workers run, and start another run"
)


def fixed_here() -> bool:
    """Whether this process would give clients keys that a test has fixed."""
    return bool(os.environ.get(TEST_KEY))


def warning(config: Config, folder: Path, fixed: Callable[[], Iterable[bool]]) -> str | None:
    """What a person must be told when a run in `folder` begins or goes on; kept for whoever looks later. `fixed`: of
    each worker, asked only where there are masks."""
    if not config.privacy.secure_aggregation:
        return None
    if any(fixed()):
        write_durably(_mark(folder), NOT_SECURE)
    return NOT_SECURE if were_fixed(folder) else None


def were_fixed(folder: Path) -> bool:
    """Whether they were in any part of the run in `folder`."""
    return _mark(folder).is_file()


def masks(config: Config, folder: Path) -> dict[str, Any]:
    """What `summary.json` says of them: nothing in a run without secure sums."""
    return {"masks_were_fixed": were_fixed(folder)} if config.privacy.secure_aggregation else {}


def _mark(folder: Path) -> Path:
    return folder / "checkpoint" / "masks-were-fixed"
