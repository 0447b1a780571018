"""A client's own look at its orders: whoever gives them, nothing is computed where its own config and its true count do
not allow them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedray.errors import PrivacyError
from fedray.federation.messages import Orders
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.plan import default_delta, round_up
from fedray.privacy.planning import (
    SKETCH_CLIP,
    SUBSPACE_RELEASES,
    clip_of,
    count_noise,
    releases_before,
    subspace_rate,
    subspace_share,
)

if TYPE_CHECKING:
    from fedray.config.sections import Config


def least_count(config: Config, client: str, count: int) -> float:
    """The smallest number of examples that the coordinator may plan with. The count it has is noised, maybe under a key
    that was lost since: it is taken to be within nine standard deviations."""
    return max(float(config.client(client).batch_size), count - 9 * count_noise(config))


def check_round(config: Config, client: str, count: int, orders: Orders) -> None:
    """A client's own look at its orders for a round: with its own config and its true count, the whole run must stay
    within the budget. Raises PrivacyError; nothing is computed then."""
    privacy, section, least = config.privacy, config.client(client), least_count(config, client, count)
    _check_shape(orders, clip_of(config), privacy.noise, round_up(section.batch_size / least))
    if privacy.epsilon is None or privacy.noise is not None:
        return
    delta = _delta(config, least)
    # At the rate of the count that these orders were made from.
    before = releases_before(config, max(least, orders.expected / orders.rate), delta)
    steps = config.federation.rounds * section.local_steps
    _check_spent(epsilon([*before, Release("training", orders.noise, orders.rate, steps)], delta), privacy.epsilon)


def check_sketch(config: Config, client: str, count: int, orders: Orders) -> None:
    """The same for the sketches of a private subspace. Raises PrivacyError."""
    least, share = least_count(config, client, count), subspace_share(config)
    # With both given, epsilon shares out what the subspace may spend, and the noise is of training alone.
    noise = config.privacy.noise if share is None else None
    _check_shape(orders, SKETCH_CLIP, noise, subspace_rate(config, least))
    if share is not None:
        release = Release("subspace", orders.noise, orders.rate, SUBSPACE_RELEASES)
        _check_spent(epsilon([release], _delta(config, least)), share)


def _delta(config: Config, least: float) -> float:
    return config.privacy.delta if config.privacy.delta is not None else default_delta(least)


def _check_shape(orders: Orders, clip: float, noise: float | None, most: float) -> None:
    if orders.clip != clip or (noise is not None and orders.noise != noise):
        raise PrivacyError(
            "the coordinator ordered another clip or noise than the client's own config has: it sends nothing"
        )
    if orders.rate > most:
        raise PrivacyError(
            "the coordinator ordered a higher sampling rate than the client's own count gives: it sends nothing"
        )


def _check_spent(spent: float, budget: float) -> None:
    if spent > budget:
        raise PrivacyError(
            f"the coordinator ordered noise with which the run would spend epsilon {spent:.3g} of {budget:g}: it sends "
            "nothing"
        )
