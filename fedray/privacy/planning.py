"""From a config and (noised) numbers of examples to the plan of each client: rate, noise, steps, budget.

| unit    | who adds the noise               | sampled in a step                 | charged                         |
|---------|----------------------------------|-----------------------------------|---------------------------------|
| example | the client, from its own key     | each example, with rate batch / n | to the client that trains       |
| client  | the coordinator, from its key    | each client, with rate cohort / k | to every client, sampled or not |
| client, trust nobody | each client, its share | nobody: all take part              | to every client                 |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedray.errors import ConfigError
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.ledger import EVERYONE
from fedray.privacy.plan import PrivacyPlan, calibrate, default_delta, round_up

if TYPE_CHECKING:
    from fedray.config.sections import Config

CLIP, COUNT_NOISE, SUBSPACE_FRACTION, SUBSPACE_EXAMPLES = 1.0, 20.0, 0.2, 512
SUBSPACE_RELEASES = 2  # G Omega, then Q^T G
#: What a private sketch is clipped to.
SKETCH_CLIP = 1.0


def plans_for(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    """The plan of each client from (noised) numbers of examples; of unit client one plan, under EVERYONE.

    Raises ConfigError for a delta that is none, or a budget that what comes before training has spent.
    """
    try:
        return _client_plan(config, counts) if config.privacy.unit == "client" else _example_plans(config, counts)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def clip_of(config: Config) -> float:
    """The clip of training, in round 1 where it adapts."""
    return config.privacy.clip or CLIP


def count_noise(config: Config) -> float:
    """Standard deviation of the noise on a client's number of examples."""
    return config.privacy.count_noise or COUNT_NOISE


def _delta(config: Config, units: float, of: str) -> float:
    delta = config.privacy.delta if config.privacy.delta is not None else default_delta(units)
    if delta >= 1 / units:
        raise ConfigError(
            f"privacy.delta {delta:g} is not below 1 / {units:.0f}, {of}: a mechanism that shows one of them to "
            "everybody would satisfy it; lower it"
        )
    return delta


def _example_plans(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    delta = _delta(config, max(counts.values()), "the largest client's number of examples")
    plans = {}
    for client, count in counts.items():
        section, before = config.client(client), releases_before(config, count, delta)
        rate = round_up(section.batch_size / count)
        steps = config.federation.rounds * section.local_steps
        noise = _noise(config, rate, steps, delta, before)
        clip, budget = clip_of(config), config.privacy.epsilon
        plan = PrivacyPlan("example", rate, rate * count, clip, noise, steps, delta, budget, tuple(before))
        _check_first_round(plan, section.local_steps, f"client '{client}'")
        plans[client] = plan
    return plans


def _client_plan(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    clients, rounds = len(counts), config.federation.rounds
    cohort = min(config.federation.cohort or clients, clients)
    delta, rate = _delta(config, clients, "the number of clients"), cohort / clients
    discrete, budget = config.privacy.trust == "nobody", config.privacy.epsilon
    noise = _noise(config, rate, rounds, delta, [], discrete)
    plan = PrivacyPlan("client", rate, float(cohort), clip_of(config), noise, rounds, delta, budget, discrete=discrete)
    _check_first_round(plan, 1, "every client")
    return {EVERYONE: plan}


def _noise(
    config: Config, rate: float, steps: int, delta: float, before: list[Release], discrete: bool = False
) -> float:
    """The multiplier that is given, or the least one that keeps the budget."""
    if config.privacy.noise is not None:
        return config.privacy.noise
    assert config.privacy.epsilon is not None, "a private run has a budget or a noise multiplier"
    return calibrate(rate, steps, delta, config.privacy.epsilon, before, discrete)


def _check_first_round(plan: PrivacyPlan, steps: int, who: str) -> None:
    needed = epsilon([*plan.before, plan.release(steps)], plan.delta)
    if plan.budget is not None and needed > plan.budget:
        raise ValueError(
            f"{who} would spend epsilon {needed:.3g} by its first round with privacy.noise {plan.noise:g}, and its "
            f"budget is {plan.budget:g}: raise one of them"
        )


# --- what is released before training ----------------------------------------------------------------------------


def releases_before(config: Config, count: float, delta: float) -> list[Release]:
    """What an example-level run releases of a client of so many examples before it trains."""
    before = [Release("count", count_noise(config))]
    if config.adapter.subspace == "private":
        before.append(_subspace_release(config, subspace_rate(config, count), delta))
    return before


def _subspace_release(config: Config, rate: float, delta: float) -> Release:
    share = subspace_share(config)
    noise = calibrate(rate, SUBSPACE_RELEASES, delta, share) if share else config.privacy.noise
    assert noise is not None, "a private run has a budget or a noise multiplier"
    return Release("subspace", noise, rate, SUBSPACE_RELEASES)


def subspace_share(config: Config) -> float | None:
    """The epsilon that a private subspace may spend; None where only the noise is given."""
    privacy = config.privacy
    return (privacy.subspace_fraction or SUBSPACE_FRACTION) * privacy.epsilon if privacy.epsilon else None


def subspace_rate(config: Config, count: float) -> float:
    """Poisson rate of the examples that a private subspace is read from."""
    return round_up(min(1.0, (config.adapter.subspace_examples or SUBSPACE_EXAMPLES) / count))
