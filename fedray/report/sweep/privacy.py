"""What all trials of a sweep together have told of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedray.privacy.ledger import Ledger
from fedray.privacy.selection import ANY_CLIENT, best_alone, composed, dominating
from fedray.sweep.budget import released_by
from fedray.sweep.folder import Releases, SweepFolder, TrialFolder


def privacy_of(out: Path) -> dict[str, Any]:
    """What all trials together have told of each client's data: `composed` epsilon by client at `delta`, `trials` and
    how many were without privacy; with random stopping also what the best alone tells. Empty for a sweep without any
    private trial, or before anything has been released. `lost`: the trials whose ledgers are gone, so that
    nothing bounds what was told."""
    folder = SweepFolder(out)
    if lost := [trial.name for trial in folder.runs() if trial.lost_ledger]:
        return {"composed": {ANY_CLIENT: math.inf}, "lost": lost}
    return _told(folder)


def _told(folder: SweepFolder) -> dict[str, Any]:
    """The same, where every ledger is there."""
    trials = [trial for trial in folder.runs() if trial.has_run]
    configs = [trial.config for trial in trials]
    private = [config for config in configs if config.privacy.on]
    ledgers = _ledgers(folder.runs())
    deltas = [ledger.delta for ledger in ledgers if ledger.delta is not None]
    if not private or not deltas:
        return {}
    runs, splits = released_by(trials)
    delta, bare = min(deltas), len(configs) - len(private)
    report: dict[str, Any] = {
        "composed": {ANY_CLIENT: math.inf} if bare else composed(runs, delta, splits),
        "delta": delta,
        "trials": len(runs),
        "without_privacy": bare,
        "unit": private[0].privacy.unit,
        "void": any(ledger.fixed for ledger in ledgers),
        "budget": configs[0].privacy.sweep_epsilon,
    }
    if stopping := folder.settings["random_stopping"]:
        report |= _best_alone(runs, delta, *stopping)
    return report


def _ledgers(trials: Sequence[TrialFolder]) -> list[Ledger]:
    """Of those that have released anything."""
    return [ledger for ledger in (trial.ledger for trial in trials) if ledger is not None]


def _best_alone(runs: Sequence[Releases], delta: float, stopping: str, mean: float) -> dict[str, Any]:
    """What the best of a secret number of runs tells when no other is shown."""
    worst = dominating(dominating(run.values()) for run in runs)
    return {
        "best_alone": best_alone(worst, delta, stopping, mean),
        "random_stopping": {"distribution": stopping, "mean": mean},
    }
