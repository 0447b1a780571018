"""What a client may release over all runs of its key folder, whoever names them.

A journal holds one run within its budget, and a coordinator that begins another run has another budget: a client
cannot know whether two runs are meant to be one. `privacy.lifetime_epsilon` bounds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedray.errors import PrivacyError
from fedray.privacy.accountant import Release, epsilon, merged, rdp_epsilon
from fedray.privacy.files import alone, hashed
from fedray.privacy.journal import ANSWERED, Journal, Said


class Lifetime:
    """Of one client. `budget`: the epsilon of all that it ever releases; None: each run has its own alone."""

    def __init__(self, folder: Path, client: str, budget: float | None):
        """`folder`: of the client's keys."""
        self._answered, self._name, self._budget = folder / ANSWERED, hashed(client), budget
        self._journals: dict[Path, Journal] = {}

    def answer(
        self,
        journal: Journal,
        said: Said,
        check: Callable[[Sequence[Release]], None],
        delta: float,
        planned: Sequence[Release] = (),
    ) -> None:
        """As `Journal.answer`, within the budget of all runs too, at `delta`. `planned`: what the run will have
        released at its end as things stand, so that one too large is refused at its start. Raises PrivacyError.

        Opens each run's journal once and then reads its new lines; other processes wait.
        """
        if self._budget is None:
            journal.answer(said, check)
            return
        with alone(self._answered / self._name):
            others = [release for other in self._others(journal) for release in other.releases]

            def both(made: Sequence[Release]) -> None:
                check(made)
                self._check([*others, *made, *_ahead(made, planned)], delta)

            journal.answer(said, both)

    def _others(self, journal: Journal) -> list[Journal]:
        paths = sorted(self._answered.glob(f"*/{self._name}.jsonl"))
        return [self._journals.setdefault(path, Journal(path)) for path in paths if path != journal.path]

    def _check(self, releases: Sequence[Release], delta: float) -> None:
        assert self._budget is not None
        if rdp_epsilon(releases, delta) <= self._budget:  # a hundredth of the cost, and it bounds as well
            return
        if epsilon(releases, delta) > self._budget:
            raise PrivacyError(
                "with this run the client would have spent more than its privacy.lifetime_epsilon "
                f"{self._budget:g}, over all runs of its key folder: it sends nothing"
            )


def _ahead(made: Sequence[Release], planned: Sequence[Release]) -> list[Release]:
    """What of a plan is not made yet."""
    steps = merged(made)
    return [replace(p, steps=max(0, p.steps - steps.get((p.noise, p.rate), 0))) for p in planned]
