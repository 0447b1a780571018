"""What a client remembers of its secure sums, on its own disk, written before it answers.

It follows nobody's word: a session has one content, each of its steps one answer, rounds do not go back, and what was
opened over one list of clients is not opened over another. A step that is repeated with the same inputs gives the same
bits, so a worker that dies over it, or a run that is resumed, goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.errors import PrivacyError
from fedray.privacy.files import alone, hashed, write
from fedray.privacy.keys import digest_of
from fedray.privacy.sums.rules import Session

#: How often a sum may be begun anew: a coordinator may not draw neighbours until it likes them.
SESSIONS = 16


@dataclass
class Page:
    """A session as one client knows it. `key`: the identity of the key that it began with. `answers`: by step, a
    digest of what was answered to. `adverts`, `roster`, `shared`, `sent`, `terms`: what it was told at these steps."""

    session: Session
    key: str
    answers: dict[str, str]
    adverts: dict[str, list[str]]
    roster: dict[str, str]
    shared: list[str]
    sent: list[str]
    terms: str = ""

    def answer(self, step: str, after: str | None, *inputs: str | int | bytes) -> None:
        """Note that a step is answered. `after`: the step before it. Raises PrivacyError
        for a step out of turn, or one that was answered with other inputs."""
        if after is not None and after not in self.answers:
            raise PrivacyError(f"the coordinator asked for step '{step}' of a secure sum before '{after}'")
        digest = digest_of(*inputs)
        if self.answers.setdefault(step, digest) != digest:
            raise PrivacyError(
                f"the coordinator asked for step '{step}' of the secure sum of {self.session.what} again with other "
                "inputs: a client answers each step of a session once"
            )


class Pages:
    """All that a client remembers of a run. `opened`: by what it was the sum of, a digest of the list."""

    def __init__(self, values: dict[str, Any]):
        self.round: int = values.get("round", 0)
        self.opened: dict[str, str] = values.get("opened", {})
        self.sessions = {name: _page(page) for name, page in values.get("sessions", {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        pages = {name: vars(page) | {"session": vars(page.session)} for name, page in self.sessions.items()}
        return {"round": self.round, "opened": self.opened, "sessions": pages}

    def begin(self, session: Session, key: str) -> None:
        """A new session, or the same again. Raises PrivacyError for a name that was another session's, an earlier
        round, and too many beginnings."""
        if session.name in self.sessions:
            if self.sessions[session.name].session != session:
                raise PrivacyError(
                    "the coordinator used the name of a secure sum for another one: what masks one must mask no other"
                )
            return
        if session.round < self.round:
            raise PrivacyError(
                f"the coordinator asked for a secure sum of round {session.round}, and this client has been in round "
                f"{self.round}: sums of earlier rounds are not opened again"
            )
        if session.round > self.round:
            self.round, self.sessions, self.opened = session.round, {}, {}
        if sum(page.session.what == session.what for page in self.sessions.values()) >= SESSIONS:
            raise PrivacyError(f"the secure sum of {session.what} was begun {SESSIONS} times: this client gives it up")
        self.sessions[session.name] = Page(session, key, {}, {}, {}, [], [])

    def page(self, name: str, key: str) -> Page:
        """A session that was begun, with the key that it still has. Raises PrivacyError."""
        if name not in self.sessions:
            raise PrivacyError("this client knows nothing of that secure sum: it was not begun here, or is over")
        if self.sessions[name].key != key:
            raise PrivacyError("its key of the secure sum was lost in between")
        return self.sessions[name]

    def check_opened(self, what: str, sent: Sequence[str]) -> str:
        """A digest of the list. Raises PrivacyError when the same was opened over another list: two sums that differ by
        one client show it."""
        digest = digest_of(*sent)
        if self.opened.get(what, digest) != digest:
            raise PrivacyError(
                f"the secure sum of {what} was opened of other clients before, and again of {', '.join(sent)} it would "
                "show the difference: have the same clients back"
            )
        return digest


class Book:
    """The file of one client in one run."""

    def __init__(self, folder: Path, run: str, client: str):
        self._path = Path(folder) / "secure-sums" / hashed(run) / f"{hashed(client)}.json"

    @contextmanager
    def opened(self) -> Iterator[Pages]:
        """The pages, by one process at a time; what the block changed is on disk when it ends, unless it raised."""
        with alone(self._path):
            before = self._path.read_text() if self._path.is_file() else "{}"
            pages = Pages(json.loads(before))
            yield pages
            after = json.dumps(pages.to_dict())
            if after != before:
                write(self._path, after.encode())


def _page(values: dict[str, Any]) -> Page:
    session = values["session"]
    return Page(**values | {"session": Session(**session | {"members": tuple(session["members"])})})
