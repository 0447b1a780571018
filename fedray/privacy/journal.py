"""What a client has answered in a run, on its own disk: the client's side of the ledger.

A coordinator keeps the ledger, and a client that trusts nobody cannot rely on it. So each client writes down, before
an answer leaves, what it was asked and from which inputs, and what that release costs. It answers the same question a
second time only from the same inputs, which gives the same noise and tells nothing new, and it answers no question
that would take all of its answers together over its own budget.

A journal is a file of JSON lines below the folder of the keys, and outlives them: a run whose keys are forgotten is
not asked anew.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from fedray.errors import PrivacyError
from fedray.privacy.accountant import Release
from fedray.privacy.files import flush, hashed

#: How many keys a client may draw noise from in one run: the first, and others after its key was lost or its data
#: changed, each of which is a release of its own.
KEYS_A_RUN = 3

#: The folder of all journals, below that of the keys.
ANSWERED = "answered"

#: What is written when a run has ended.
OVER = "over"


@dataclass(frozen=True)
class Said:
    """One line: what was asked (`round 3`, `count`), the identity of the key that the noise is from, a digest of all
    inputs beside the data, the release, and its value where that is needed again."""

    what: str
    key: str
    inputs: str
    release: Release
    value: float | None = None


class Journal:
    """Of one client in one run. Several processes may write to it."""

    def __init__(self, path: Path):
        self.path = path
        self._said: list[Said] = []
        self._known: dict[tuple[str, str], str] = {}  # inputs, by question and key
        self._keys: set[str] = set()
        self._steps: dict[Release, int] = {}  # of each mechanism, as a release of no steps
        self._over = False
        self._count: float | None = None
        self._read_to = 0

    @staticmethod
    def of(folder: Path, run: str, client: str) -> Journal:
        """The journal of a client in a run; `folder`: of the client's keys."""
        return Journal(folder / ANSWERED / hashed(run) / f"{hashed(client)}.jsonl")

    @property
    def said(self) -> tuple[Said, ...]:
        """All so far."""
        with self._locked():
            return tuple(self._said)

    @property
    def count(self) -> float | None:
        """The first noised number of examples that was told; None before there is one."""
        with self._locked():
            return self._count

    @property
    def releases(self) -> list[Release]:
        """All so far, those of one mechanism as one."""
        with self._locked():
            return self._merged()

    def answer(self, new: Said, check: Callable[[Sequence[Release]], None]) -> None:
        """Write down an answer that is about to be given; on disk when this returns. One that is there is given again.

        `check` raises for releases (all so far and the new one) that may not be. Raises PrivacyError for the same
        question with other inputs, and for one key too many. The cost is of the new lines alone.
        """
        with self._locked() as file:
            if self._over:
                raise PrivacyError(
                    "this run is over, and the client's key forgotten: it sends nothing; start another run"
                )
            inputs = self._known.get((new.what, new.key))
            if inputs == new.inputs:
                return
            if inputs is not None:
                raise PrivacyError(
                    f"the coordinator asked for {new.what} a second time, from other inputs than were answered before, "
                    "and the difference would show data: it sends nothing; go on from the run's newest checkpoint, or "
                    "start another run"
                )
            if len(self._keys | {new.key}) > KEYS_A_RUN:
                raise PrivacyError(
                    f"its noise key was lost, or its data changed, {KEYS_A_RUN} times in this run: it sends nothing; "
                    "start another run"
                )
            check([*self._merged(), new.release])
            self._write(file, new)

    def close(self) -> None:
        """The run is over: nothing more is answered in it, whatever becomes of the client's key."""
        with self._locked() as file:
            if not self._over:
                self._write(file, Said(OVER, "", "", Release(OVER, 1.0, steps=0)))

    def _write(self, file: IO[bytes], said: Said) -> None:
        file.write((json.dumps(asdict(said)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
        self._take(said)
        self._read_to = file.tell()

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, with all of its lines read, for this process alone."""
        if not self.path.exists():
            self._make()
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) < self._read_to:
                raise PrivacyError(f"the client's journal '{self.path}' has lost lines: bring the file back")
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):  # its writer died, and gave no answer
                    file.truncate(self._read_to)
                    break
                self._take(_parsed(line))
                self._read_to += len(line)
            file.seek(self._read_to)
            yield file

    def _make(self) -> None:
        """An empty file for the client's user alone, that a crash does not take away."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        for folder in (self.path.parent, self.path.parent.parent, self.path.parent.parent.parent):
            flush(folder)

    def _take(self, said: Said) -> None:
        self._said.append(said)
        self._known[said.what, said.key] = said.inputs
        if said.what == OVER:
            self._over = True
            return
        self._keys.add(said.key)
        mechanism = replace(said.release, steps=0)
        self._steps[mechanism] = self._steps.get(mechanism, 0) + said.release.steps
        if said.what == "count" and self._count is None:
            self._count = said.value

    def _merged(self) -> list[Release]:
        return [replace(mechanism, steps=steps) for mechanism, steps in self._steps.items()]


def _parsed(line: bytes) -> Said:
    values = json.loads(line)
    return Said(**(values | {"release": Release(**values["release"])}))
