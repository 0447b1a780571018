"""What one sum is called, and what a client's own config allows of it, whoever asks.

A client answers each step of a session once, and reveals its shares only when `threshold` members of the session have
signed the very list of who sent that it signed itself. Of n members let c be those that work with the coordinator.
Two lists with `threshold` signatures each have 2 threshold - n signers or more in common; where that is more than c,
one of them is honest and signed twice, which it does not. So with

    2 threshold > n + c

a session is opened over one list, of each client either the own mask (who is on the list) or the key of pairwise masks
(who is not) is revealed, and never both (Bonawitz et al., CCS 2017, theorem 6.5).

| identities          | threshold of n members | against                                                            |
|---------------------|------------------------|--------------------------------------------------------------------|
| exchanged before    | floor(2n/3) + 1        | a coordinator that lies in any way, with fewer than n / 3 clients  |
| none                | floor(n/2) + 1         | a coordinator that lies about who sent, but passes keys on unchanged |
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from fedray.errors import PrivacyError
from fedray.privacy.keys import words
from fedray.privacy.sums.neighbours import Neighbours, neighbours

#: With fewer members each would read the other out of the sum.
LEAST_MEMBERS = 3


@dataclass(frozen=True)
class Session:
    """One sum: a name that no other has, who takes part, in order, how many must stay to the end, the run that keys
    are filed under, the round (from 1; 0: before the first), and what it is the sum of, the same after a resume."""

    name: str
    members: tuple[str, ...]
    threshold: int
    run: str = ""
    round: int = 0
    what: str = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises PrivacyError for what no rule allows. Not done when a session arrives from elsewhere."""
        if len(set(self.members)) < len(self.members):
            raise PrivacyError("a secure sum names a client twice")
        if len(self.members) < LEAST_MEMBERS or not 2 <= self.threshold <= len(self.members):
            raise PrivacyError(
                f"a secure sum needs {LEAST_MEMBERS} clients or more and a threshold between 2 and their "
                f"number, not {len(self.members)} and {self.threshold}"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: what is signed and derived for one session fits no other."""
        parts: tuple[str | int, ...] = (self.name, self.run, self.round, self.what, self.threshold, *self.members)
        return hashlib.sha256(words(*parts)).hexdigest()

    def point(self, client: str) -> int:
        """Where a client's shares lie on the polynomials."""
        return self.members.index(client) + 1


@dataclass(frozen=True)
class Rule:
    """A client's own config of secure sums. `signed`: whether identities were exchanged before the run. `share`: of a
    cohort that must stay to the end; None: the least that the theorem needs. `colluding`: the share of clients that may
    work with the coordinator, which decides how many neighbours a client of a large cohort needs."""

    signed: bool = False
    share: float | None = None
    colluding: float = 0.05

    def least(self, members: int) -> int:
        """The least threshold with which a session is opened over one list."""
        return 2 * members // 3 + 1 if self.signed else members // 2 + 1

    def threshold(self, members: int) -> int:
        """How many of so many members must stay."""
        return min(members, max(self.least(members), math.ceil((self.share or 0.0) * members)))

    def check(self, session: Session) -> None:
        """Raises PrivacyError for a session with fewer members or a lower threshold than the client's config has."""
        session.check()
        needed = self.threshold(len(session.members))
        if session.threshold < needed:
            raise PrivacyError(
                f"the coordinator ordered a secure sum that {session.threshold} of {len(session.members)} clients "
                f"open, and the client's own config needs {needed}: it takes no part"
            )

    def neighbours(self, session: Session) -> Neighbours:
        """Whom a client of the session shares with and masks against."""
        return neighbours(len(session.members), session.threshold, self.colluding)

    def fewest(self, members: int) -> int:
        """Of so many members, the fewest whose sum a lying coordinator may learn: of the threshold, where all mask
        against all."""
        return neighbours(members, self.threshold(members), self.colluding).group
