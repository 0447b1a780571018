"""The ledger: every release of every client's data, charged before it happens, on disk before it happens.

A release is known by its draw: the hash of who adds the noise (the identity of its key) and of all inputs of the
computation. A round that is repeated from the same inputs with the same key gives the same numbers, so it has the
same draw and costs nothing; whatever differs is another draw, and is charged again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.files import write_durably
from fedray.privacy.keys import words
from fedray.privacy.plan import PrivacyPlan


def draw_of(identity: str, *inputs: str | int) -> str:
    """The name of a draw of noise: by whom, from what."""
    return hashlib.sha256(words(identity, *inputs)).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One release: what was drawn (`draw`), its mechanism, and the round (from 1; 0: before the first)."""

    draw: str
    release: Release
    round: int


@dataclass
class Ledger:
    """Of one run. `plans`, `counts` (noised numbers of examples) and `keys` (identities) by client; with unit
    `client` all clients share the entries of one name, EVERYONE. Kept in one file, replaced whole."""

    run: str
    delta: float | None = None
    plans: dict[str, PrivacyPlan] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    clip: float | None = None
    """Unit client: the clip of the next round."""
    fixed: bool = False
    """Whether a key was fixed for a test: then nothing is private."""

    def epsilon(self, client: str, more: Iterable[Release] = ()) -> float:
        """What the client's data has spent so far, and would have with `more`. Raises ValueError where delta is not
        known yet."""
        if self.delta is None:
            raise ValueError("the ledger's delta is not known yet")
        return epsilon([*(e.release for e in self.entries.get(client, [])), *more], self.delta)

    def affords(self, client: str, draw: str, release: Release) -> bool:
        """Whether the release, unless it is in the books already, stays within the client's budget."""
        plan = self.plans.get(client)
        if self._has(client, draw) or plan is None or plan.budget is None:
            return True
        if self._as_planned(client, plan, release) and plan.epsilon <= plan.budget:
            return True  # no other epsilon than the plan's need be worked out
        return self.epsilon(client, [release]) <= plan.budget

    def _as_planned(self, client: str, plan: PrivacyPlan, more: Release) -> bool:
        """Whether all that the client has spent, with `more`, is part of the plan."""
        left = [*plan.before, plan.release(plan.steps)]
        for release in [*(e.release for e in self.entries.get(client, [])), more]:
            covering = next(
                (r for r in left if (r.noise, r.rate) == (release.noise, release.rate) and r.steps >= release.steps),
                None,
            )
            if covering is None:
                return False
            left.remove(covering)
            left.append(replace(covering, steps=covering.steps - release.steps))
        return True

    def charge(self, client: str, draw: str, release: Release, round: int) -> bool:
        """Enter the release unless the same draw is there; whether it was new."""
        if self._has(client, draw):
            return False
        self.entries.setdefault(client, []).append(Entry(draw, release, round))
        return True

    def _has(self, client: str, draw: str) -> bool:
        return any(e.draw == draw for e in self.entries.get(client, []))

    def mark(self) -> dict[str, Any]:
        """How far the ledger has come: its run, and by name how many entries it has and a digest of them. Costs the new
        entries alone."""
        return {"run": self.run, "entries": {name: self._mark(name, len(es)) for name, es in self.entries.items()}}

    def follows(self, mark: dict[str, Any]) -> bool:
        """Whether the ledger has all that it had when the mark was made."""
        marks: dict[str, list[Any]] = mark["entries"]
        return self.run == mark["run"] and all(
            len(self.entries.get(name, [])) >= count and self._mark(name, count) == [count, digest]
            for name, (count, digest) in marks.items()
        )

    def _mark(self, name: str, count: int) -> list[Any]:
        chain = self._chains.setdefault(name, [""])
        for entry in self.entries[name][len(chain) - 1 : count]:
            chain.append(hashlib.sha256(f"{chain[-1]}\n{json.dumps(asdict(entry))}".encode()).hexdigest())
        return [count, chain[count]]

    @cached_property
    def _chains(self) -> dict[str, list[str]]:
        """By name, the digest of its first entries, for none of them on."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the file and for `privacy.json`."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Replace the file, and come back only when it is on disk."""
        write_durably(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: Path) -> Ledger | None:
        """The ledger in the file; None where there is no file."""
        if not path.is_file():
            return None
        values = json.loads(path.read_text())
        plans = {c: PrivacyPlan.from_dict(p) for c, p in values.pop("plans").items()}
        entries = {
            c: [Entry(e["draw"], Release(**e["release"]), e["round"]) for e in es]
            for c, es in values.pop("entries").items()
        }
        return cls(**values, plans=plans, entries=entries)


def new_ledger() -> Ledger:
    """Of a run that has not begun, under a name that no other has."""
    return Ledger(secrets.token_hex(8))


EVERYONE = "(every client)"


def worst(epsilons: Sequence[float]) -> float | None:
    """The largest of the clients' epsilons, which is the run's: their data do not overlap."""
    return max(epsilons, default=None)
