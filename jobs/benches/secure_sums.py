"""What a secure sum costs one client as the cohort grows: bytes of every message to and from it, and its own time.

A third of the clients drops out, a part at every step. Every message is measured as it travels (pickled), the masked
vector apart from the rest, since it is the same in every cohort. The ratios hold one run's medians against each other.
"""

from __future__ import annotations

import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benches.measure import table, threads, timed
from fedray.federation.messages import SumStep
from fedray.privacy import secure_sum
from fedray.privacy.keys import Key
from fedray.privacy.secure_sum import Identities, Party, Rule, Session
from fedray.privacy.sums.identity import line

RUN, COUNTS = "bench", (50, 100, 200)


@dataclass
class Cost:
    """Of one client: bytes up and down beside its vector, and seconds that it worked, of which `masking` on its
    vector."""

    up: int = 0
    down: int = 0
    seconds: float = 0.0
    masking: float = 0.0


@dataclass(frozen=True)
class Sum:
    """A sum as it ended: the costs of those who stayed, the coordinator's seconds, the error of the total, and how many
    neighbours a client draws."""

    costs: list[Cost]
    opening: float
    error: float
    drawn: int

    def median(self, of: Callable[[Cost], float]) -> float:
        """Over the clients that stayed to the end."""
        return statistics.median(of(cost) for cost in self.costs)


class Cohort:
    """Clients with identities, each on a disk of its own, and who is still there."""

    def __init__(self, count: int, folder: Path, signed: bool):
        self.names = [f"client {i}" for i in range(count)]
        self.rule = Rule(signed=signed)
        file = folder / "identities.yaml" if signed else None
        if file is not None:
            lines = [line(c, Identities(folder / c, None).make(c)) for c in self.names]
            file.write_text("\n".join(lines))
        self.party = {
            c: Party(
                c, Key(os.urandom(32)), self.rule, Identities(folder / c, str(file) if file else None), folder / c, RUN
            )
            for c in self.names
        }
        self.costs = {c: Cost() for c in self.names}

    def ask(self, steps: dict[str, SumStep], call: Callable[[Party, SumStep], Any]) -> dict[str, Any]:
        """Everyone's answer, weighed and timed."""
        answers = {}
        for client, step in steps.items():
            cost, started = self.costs[client], time.perf_counter()
            answers[client] = call(self.party[client], step)
            cost.seconds += time.perf_counter() - started
            cost.down += len(pickle.dumps(step))
            cost.up += len(pickle.dumps(answers[client]))
        return answers


def secure(console: Console, numbers: int = 10_000, counts: Iterable[int] = COUNTS) -> None:
    """A client's cost in cohorts of so many, and the last cohort's over the first's."""
    shown = table(
        f"a client in a secure sum of {numbers:,} numbers, a third of the clients dropping out ({threads()}, medians "
        "over those that stay)",
        (
            "clients",
            "identities",
            "neighbours drawn",
            "bytes up, beside the vector",
            "bytes down",
            "bytes, all",
            "with the vector",
            "ms, beside masking",
            "ms of masking",
            "coordinator, s",
        ),
    )
    for signed in (True, False):
        sums = {count: cohort_sum(count, numbers, signed) for count in counts}
        for count, one in sums.items():
            shown.add_row(f"{count:,}", "yes" if signed else "no", f"{one.drawn}", *_row(one, numbers))
        few, *_, many = sums.values()
        ratios = [m / f for m, f in zip(_values(many, numbers), _values(few, numbers), strict=True)]
        shown.add_row(f"{max(sums)} / {min(sums)}", "", "", *(f"{r:.2f}" for r in ratios), end_section=True)
    console.print(shown)


def _values(one: Sum, numbers: int) -> list[float]:
    up, down = one.median(lambda c: c.up), one.median(lambda c: c.down)
    seconds, masking = one.median(lambda c: c.seconds - c.masking), one.median(lambda c: c.masking)
    return [up, down, up + down, up + down + 8 * numbers, 1e3 * seconds, 1e3 * masking, one.opening]


def _row(one: Sum, numbers: int) -> list[str]:
    *sizes, seconds, masking, opening = _values(one, numbers)
    return [*(f"{v:,.0f}" for v in sizes), f"{seconds:.1f}", f"{masking:.1f}", f"{opening:.2f}"]


def cohort_sum(count: int, numbers: int, signed: bool) -> Sum:
    """One sum in which a third of the clients drops out: a ninth before each of sharing, sending and revealing. With
    identities two thirds and one must stay, so that is as many as may."""
    with tempfile.TemporaryDirectory() as folder:
        return _Play(Cohort(count, Path(folder), signed), numbers).sum()


@dataclass
class _Play:
    """The steps of one sum."""

    cohort: Cohort
    numbers: int
    values: np.ndarray = field(init=False)

    def sum(self) -> Sum:
        cohort, names = self.cohort, self.cohort.names
        rule, gone = cohort.rule, (len(names) - 1) // 3
        last = [names[: len(names) - round(gone * part)] for part in (0, 1 / 3, 2 / 3, 1)]  # who is there at each step
        session = Session("a sum", tuple(names), rule.threshold(len(names)), RUN, 1, "round 1")
        first = dict.fromkeys(names, SumStep(RUN, session.name, session))
        adverts = cohort.ask(first, lambda p, _: p.advertise(session))
        near = secure_sum.edges(session, adverts)
        roster = {} if rule.signed else {c: a.verify for c, a in adverts.items()}
        told = {
            c: SumStep(RUN, session.name, adverts={o: adverts[o].public() for o in near[c]}, roster=roster)
            for c in last[1]
        }
        dealt = cohort.ask(told, lambda p, step: p.share(step.name, step.adverts, step.roster))
        masked = self._masked(session, last[2], secure_sum.bits(session, dealt))
        listed = SumStep(RUN, session.name, listed=secure_sum.bits(session, masked))
        signed = cohort.ask(dict.fromkeys(last[3], listed), lambda p, step: p.sign(step.name, step.listed))
        enough = {c: signed[c] for c in list(signed)[: session.threshold]}
        steps = {
            c: SumStep(
                RUN, session.name, signatures=enough, sealed={o: texts[c] for o, texts in dealt.items() if c in texts}
            )
            for c in signed
        }
        revealed = cohort.ask(steps, lambda p, step: p.reveal(step.name, step.signatures, step.sealed))
        there = {c: adverts[c] for c in dealt}
        seconds, total = timed(lambda: secure_sum.unmask(session, rule, there, masked, revealed), 1)
        wanted = sum((secure_sum.decode(self._vector(c, session)) for c in masked), np.zeros(self.numbers))
        error = float(np.abs(secure_sum.decode(total) - wanted).max())
        return Sum([cohort.costs[c] for c in last[3]], seconds, error, rule.neighbours(session).drawn)

    def _vector(self, client: str, session: Session) -> np.ndarray:
        values = np.random.default_rng(session.point(client)).normal(size=self.numbers)
        return secure_sum.encode(values, len(session.members))

    def _masked(self, session: Session, who: list[str], shared: bytes) -> dict[str, np.ndarray]:
        """The masked vectors, whose bytes are counted apart."""
        masked = {}
        for client in who:
            vector, cost, started = self._vector(client, session), self.cohort.costs[client], time.perf_counter()
            masked[client] = self.cohort.party[client].mask(session.name, shared, 1, "round 1", vector)
            cost.masking += time.perf_counter() - started
            cost.seconds += time.perf_counter() - started
            cost.down += len(pickle.dumps(SumStep(RUN, session.name, listed=shared)))
        return masked
