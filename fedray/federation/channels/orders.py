"""A client's own look at its orders: whoever gives them, nothing is computed where its own config, and what it has said
in this run so far, do not allow them.

What is refused shows to whoever gave the orders. So every check is a function of the config, of the orders, and of
what the client has released before, its noised number of examples among it: never of the data themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedray.errors import PrivacyError
from fedray.federation.messages import Orders
from fedray.privacy.accountant import Release, epsilon, merged
from fedray.privacy.plan import default_delta, round_up
from fedray.privacy.planning import (
    SKETCH_CLIP,
    SUBSPACE_RELEASES,
    clip_of,
    count_noise,
    subspace_rate,
    subspace_share,
)

if TYPE_CHECKING:
    from fedray.config.sections import Config


class OneRun:
    """The run that a worker is for, which is the first that it hears of: what clients have answered is written down
    run by run, and over two of them the same question could be asked twice."""

    def __init__(self) -> None:
        self._run: str | None = None

    def check(self, run: str) -> None:
        """Raises PrivacyError for another run, and for a name that is none."""
        if type(run) is not str or not run:
            raise PrivacyError("the coordinator named no run: it sends nothing")
        if self._run is None:
            self._run = run
        if run != self._run:
            raise PrivacyError("the coordinator named another run than the one this worker is for: it sends nothing")


class Budget:
    """What one client may still release in a run. `count`: the noised number of examples that it has told; `releases`:
    all that it has made."""

    def __init__(self, config: Config, client: str, count: float, releases: Sequence[Release]):
        self._privacy, self._section = config.privacy, config.client(client)
        self._config = config
        self._before = [release for release in releases if release.what != "training"]
        # The coordinator plans with a count that was noised under this key, or under one that was lost since: the
        # difference of the two is taken to be within nine standard deviations.
        self._count = max(float(self._section.batch_size), count)
        self._least = max(float(self._section.batch_size), count - 9 * 2**0.5 * count_noise(config))
        delta = config.privacy.delta
        # Of the count that was told, not of the least that it may mean: the coordinator's own follows from counts no
        # smaller, and a larger delta would let it spend more than it says.
        self.delta = delta if delta is not None else default_delta(self._count)

    def check_round(self, round: int, orders: Orders) -> None:
        """Of orders for a round (from 0): its number, clip, noise and rate, and that the whole run at that noise stays
        within the budget. Raises PrivacyError."""
        check_round_number(self._config, round)
        self._check_weight(orders)
        most = round_up(self._section.batch_size / self._least)
        _check_shape(orders, clip_of(self._config), self._privacy.noise, most)
        if self._privacy.noise is None:
            self.check(self._run(orders))

    def check_run(self, orders: Orders, releases: Sequence[Release]) -> None:
        """Of all that the client will have released with this round. Raises PrivacyError. What is part of a run that
        was checked as a whole needs no look of its own."""
        whole = merged(self._run(orders)) if self._privacy.noise is None else {}
        if any(steps > whole.get(mechanism, 0) for mechanism, steps in merged(releases).items()):
            self.check(releases)

    def _run(self, orders: Orders) -> list[Release]:
        return [*self._before, self.training(orders)]

    def training(self, orders: Orders) -> Release:
        """All of a run's training at these orders."""
        steps = self._config.federation.rounds * self._section.local_steps
        return Release("training", orders.noise, orders.rate, steps)

    def check_sketch(self, orders: Orders) -> None:
        """Of orders for the sketches of a private subspace. Raises PrivacyError."""
        self._check_weight(orders)
        share = subspace_share(self._config)
        # With both given, epsilon shares out what the subspace may spend, and the noise is of training alone.
        noise = self._privacy.noise if share is None else None
        _check_shape(orders, SKETCH_CLIP, noise, subspace_rate(self._config, self._least))
        if share is not None:
            both = Release("subspace", orders.noise, orders.rate, SUBSPACE_RELEASES)
            _check_spent(epsilon([both], self.delta), share)

    def _check_weight(self, orders: Orders) -> None:
        """Of a secure sum: with all others near 0 it would show this client."""
        slack = 9 * 2**0.5 * count_noise(self._config)
        if orders.sum is None or not self._config.by_examples:
            return
        least, most = max(float(self._section.batch_size), self._count - slack), self._count + slack
        if orders.weight is None or not least <= orders.weight <= most:
            raise PrivacyError(
                "the coordinator ordered another weight in a secure sum than the client's own noised number of "
                "examples gives: it sends nothing"
            )

    def check(self, releases: Sequence[Release]) -> None:
        """That all of these together stay within the budget, where there is one. Raises PrivacyError."""
        if self._privacy.epsilon is not None:
            _check_spent(epsilon(releases, self.delta), self._privacy.epsilon)


def check_round_number(config: Config, round: int) -> None:
    """Raises PrivacyError for a round (from 0) that the client's own config does not have."""
    rounds = config.federation.rounds
    if type(round) is not int or not 0 <= round < rounds:
        raise PrivacyError(
            f"the coordinator asked for a round that is none of the {rounds} of the client's own config: it sends "
            "nothing"
        )


def _check_shape(orders: Orders, clip: float, noise: float | None, most: float) -> None:
    if orders.clip != clip or (noise is not None and orders.noise != noise):
        raise PrivacyError(
            "the coordinator ordered another clip or noise than the client's own config has: it sends nothing"
        )
    if not 0 < orders.rate <= most:
        raise PrivacyError(
            "the coordinator ordered a higher sampling rate than the client's own count gives: it sends nothing"
        )


def _check_spent(spent: float, budget: float) -> None:
    if spent > budget:
        raise PrivacyError(
            f"the coordinator ordered noise with which the run would spend epsilon {spent:.3g} of {budget:g}: it sends "
            "nothing"
        )
