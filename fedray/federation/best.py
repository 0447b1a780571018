"""Which round's state is the result, and when rounds stop helping: rules over a run's records, by the task's metric.
Record 0, before training, is no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedray.config.sections import Config
from fedray.data.tasks import TASKS


def result_of(config: Config, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of the round whose state is the run's result: the best one, the first of equals, where
    `federation.best_round` says so, else the last that was evaluated; None where none was."""
    evaluated = _evaluated(records)
    if not evaluated:
        return None
    return evaluated[_best(config, evaluated)] if config.federation.best_round else evaluated[-1]


def round_to_keep(config: Config, records: Sequence[Mapping[str, Any]]) -> int | None:
    """The round whose checkpoint must stay though others follow; None where only the last ones matter."""
    result = result_of(config, records) if config.federation.best_round else None
    return None if result is None else result["round"]


def out_of_patience(config: Config, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no round may follow these records, in words; None where one may."""
    patience, evaluated = config.federation.patience, _evaluated(records)
    if patience is None or not evaluated:
        return None
    best = _best(config, evaluated)
    since = len(evaluated) - 1 - best
    if since < patience:
        return None
    metric, reached = TASKS[config.model.task].metric, evaluated[best]
    return (
        f"{metric} has not been better than round {reached['round']}'s {reached['metrics'][metric]:.4g} in {since} "
        f"evaluation{'s' * (since > 1)} (federation.patience)"
    )


def _evaluated(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in records if record["round"] > 0 and record["metrics"] is not None]


def _best(config: Config, evaluated: Sequence[Mapping[str, Any]]) -> int:
    """Which of them is the best: the first of equals. A metric that is no number is the worst."""
    task = TASKS[config.model.task]
    sign = 1.0 if task.higher_is_better else -1.0
    values = [sign * record["metrics"][task.metric] for record in evaluated]
    return max(range(len(values)), key=lambda i: values[i] if values[i] == values[i] else float("-inf"))
