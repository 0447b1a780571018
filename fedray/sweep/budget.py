"""What all trials of a sweep together may release of the data: they are releases of the same examples, and add up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fedray.config.sections import BUILTIN, Config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError, PrivacyError
from fedray.federation.prepare import Prepared
from fedray.privacy.accountant import Release
from fedray.privacy.ledger import EVERYONE
from fedray.privacy.planning import plans_for
from fedray.privacy.selection import composed
from fedray.sweep.folder import Releases, SweepFolder, TrialFolder
from fedray.sweep.trials import Trial

#: A run without privacy, as a release without noise.
PUBLIC_RUN: Releases = {EVERYONE: [Release("a run without privacy", 0.0)]}


def planned(prepared: Prepared) -> Releases | None:
    """What a run would release of each client's data by its plan; None for a run without privacy."""
    config = prepared.config
    if not config.privacy.on:
        return None
    if config.privacy.unit == "client":
        (plan,) = plans_for(config, dict.fromkeys(prepared.data.clients, 1.0)).values()
        return {EVERYONE: [plan.release(plan.steps)]}
    plans = plans_for(config, _counts(config, prepared.units()))
    return {client: [*plan.before, plan.release(plan.steps)] for client, plan in plans.items()}


def plan_delta(prepared: Prepared) -> float:
    """delta of a private run's plan."""
    config = prepared.config
    if config.privacy.delta is not None:
        return config.privacy.delta
    units = prepared.units() if config.privacy.unit == "example" else dict.fromkeys(prepared.data.clients, 1)
    return next(iter(plans_for(config, _counts(config, units)).values())).delta


def _counts(config: Config, units: Mapping[str, int]) -> dict[str, float]:
    """The numbers of examples that a plan is made for: at least one batch."""
    return {client: float(max(count, config.client(client).batch_size)) for client, count in units.items()}


def split_of(config: Config) -> str:
    """A word that two runs share when a client has the same examples in both."""
    sources = {name: client.source for name, client in config.clients.items() if client.source}
    by_nature = bool(sources) or config.data.source == BUILTIN or config.data.partition == "column"
    clients = None if by_nature else config.federation.clients
    seed = None if by_nature and config.data.limit is None else config.seed
    return json.dumps([config.data.model_dump(mode="json"), sources, clients, seed], sort_keys=True)


def released_by(runs: Sequence[TrialFolder]) -> tuple[list[Releases], list[str]]:
    """What each of these runs has released so far, of a run without privacy a release without noise; and how each
    dealt the data out."""
    releases = [run.released for run in runs]
    return [PUBLIC_RUN if each is None else each for each in releases], [split_of(run.config) for run in runs]


def worst_of(epsilons: Mapping[str, float]) -> float:
    """The largest, 0 of none."""
    return max(epsilons.values(), default=0.0)


# --- before anything runs ---------------------------------------------------------------------------------------------


def check_budget(trials: Sequence[Trial], prepared: Sequence[Prepared], times: int | None = None) -> None:
    """Raises ConfigError when the runs together would spend more than `privacy.sweep_epsilon` of any client's data, or
    cannot be added up. `times`: the trials are what an adaptive search may choose from, so many times: as often as it
    chooses the one that spends most."""
    configs = [trial.config for trial in trials]
    _check_units(configs)
    budget = _budget_of(trials)
    if budget is None:
        return
    runs, splits = [planned(each) for each in prepared], [split_of(config) for config in configs]
    private = [run for run in runs if run is not None]
    delta = min(plan_delta(each) for each in prepared)
    total = _spent(private, splits, delta) if times is None else _most_spent(private, splits, delta, times)
    if total > budget:
        raise ConfigError(
            f"{len(runs) if times is None else times} trials together would spend epsilon {total:.4g} "
            f"at delta {delta:g} of the data, and privacy.sweep_epsilon is {budget:g}: "
            "lower privacy.epsilon, try fewer, or raise it"
        )


def _spent(runs: Sequence[Releases], splits: Sequence[str], delta: float) -> float:
    """Epsilon of all of them."""
    return worst_of(composed(runs, delta, splits))


def _most_spent(runs: Sequence[Releases], splits: Sequence[str], delta: float, times: int) -> float:
    """Epsilon of the one that spends most, chosen every time, over as many splits as there are."""
    turns = [str(turn % len(set(splits))) for turn in range(times)]
    return max(_spent([run] * times, turns, delta) for run in runs)


def _check_units(configs: Sequence[Config]) -> None:
    """Raises ConfigError where what the private trials protect differs, so that it cannot be added up."""
    private = [config for config in configs if config.privacy.on]
    if len({config.privacy.unit for config in private}) > 1:
        raise ConfigError(
            "the sweep varies privacy.unit, and what examples and what clients are told cannot be added up: make two "
            "sweeps"
        )
    _check_sequences(private)
    if len({split_of(config) for config in private if config.privacy.unit == "client"}) > 1:
        raise ConfigError(
            "privacy.unit client with trials that deal the data out differently (other seeds, clients or partitions): "
            "a client of one is no client of another, and what they are told "
            "cannot be added up; use one seed, or data whose clients are given"
        )


def _check_sequences(private: Sequence[Config]) -> None:
    """Raises ConfigError where texts are cut into sequences, the examples that are protected, in different ways."""
    cut = [config for config in private if TASKS[config.model.task].cuts(config.data)]
    lengths, models = {config.data.max_length for config in cut}, {config.model.path for config in cut}
    for key, values in (("data.max_length", lengths), ("model.path", models)):
        if len(values) > 1:
            raise ConfigError(
                f"the sweep varies {key}, which decides what one private example is: releases of different units "
                "cannot be added up; make two sweeps"
            )


def _budget_of(trials: Sequence[Trial]) -> float | None:
    """`privacy.sweep_epsilon`; None where there is no budget. Raises ConfigError for one that cannot hold."""
    privacy = [trial.config.privacy for trial in trials]
    budgets = {section.sweep_epsilon for section in privacy}
    if budgets == {None}:
        return None
    if len(budgets) > 1:
        raise ConfigError(
            "privacy.sweep_epsilon is one for the whole sweep: give it on the command line or in the base, "
            "not in the space"
        )
    if bare := next((trial.name for trial in trials if not trial.config.privacy.on), None):
        raise ConfigError(
            f"trial '{bare}' has no privacy.epsilon, so that no privacy.sweep_epsilon can hold: leave one of them out"
        )
    if any(section.delta is None and section.unit == "example" for section in privacy):
        raise ConfigError(
            "privacy.sweep_epsilon needs privacy.delta too: each trial's own would follow from noised numbers of "
            "examples, and a sum has one delta"
        )
    return budgets.pop()


# --- before a trial of an adaptive search -----------------------------------------------------------------------------


def check_affordable(prepared: Prepared, trial: TrialFolder) -> None:
    """Raises PrivacyError when this run, beside what the others have released, would overspend the sweep's budget."""
    budget = prepared.config.privacy.sweep_epsilon
    if budget is None:
        return
    # Its own plan is written down already: of two that start at the same moment each sees the other's.
    others = SweepFolder(trial.trials.parent).planned()
    spent = [each.released if each.ended else each.planned for each in others]
    runs = [PUBLIC_RUN if releases is None else releases for releases in spent]
    total = worst_of(composed(runs, plan_delta(prepared), [each.split for each in others]))
    if total > budget:
        trial.withdraw()
        raise PrivacyError(
            f"with this trial the sweep would have spent epsilon {total:.4g} of privacy.sweep_epsilon {budget:g}: it "
            "is left out"
        )
