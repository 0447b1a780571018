"""How Ray Tune is set up: what it runs, how it searches, when it stops a trial, and whom it tells."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Repeater

from fedray.errors import ConfigError
from fedray.sweep.folder import SweepFolder, TrialFolder
from fedray.sweep.space import Sweep
from fedray.sweep.trial import Shared, TrialResources, run_listed, run_trial
from fedray.sweep.trials import Trial

TRACKERS = ("mlflow", "wandb")
TRIAL_ATTEMPTS = 3
#: Tune's own folder under OUT.
STATE = "tune"


@dataclass(frozen=True)
class Goal:
    """What is sought: the metric, `max` or `min`, and the most rounds that a trial may take."""

    metric: str
    mode: str
    rounds: int


def tuner(
    shared: Shared, trials: Sequence[Trial], goal: Goal, view: tune.Callback, tracked: Sequence[str]
) -> tune.Tuner:
    """Tune for this sweep: as it was left, where it has begun before. `trials`: those of a list; an adaptive search
    draws its own. `tracked`: the trackers of `--track`. Raises ConfigError for a search or a tracker that is not
    installed."""
    trainable, space = _work(shared, trials)
    state = str(Path(shared.out) / STATE)
    if tune.Tuner.can_restore(state):
        return tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True, param_space=space)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=_tune_config(shared, goal),
        run_config=tune.RunConfig(
            name=STATE,
            storage_path=shared.out,
            callbacks=[view, *trackers(tracked, Path(shared.out))],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_ATTEMPTS - 1),
        ),
    )


def _tune_config(shared: Shared, goal: Goal) -> tune.TuneConfig:
    sweep = shared.sweep
    return tune.TuneConfig(
        metric="objective",
        mode=goal.mode,
        scheduler=scheduler(sweep, goal.rounds, Path(shared.out), goal.metric),
        search_alg=_searcher(sweep, goal.mode),
        num_samples=sweep.samples * len(sweep.seeds) if sweep.adaptive else 1,
        max_concurrent_trials=sweep.max_concurrent,
        trial_dirname_creator=_dirname,
        reuse_actors=True,  # the next trial finds everything imported
    )


def _work(shared: Shared, trials: Sequence[Trial]) -> tuple[Any, dict[str, Any]]:
    """What Tune runs, and what it draws from."""
    run: Callable[..., None]
    if shared.sweep.adaptive:
        run, space = run_trial, dict(shared.sweep.space)
    else:
        run, space = run_listed, {"trial": tune.grid_search([{"name": t.name, "values": t.values} for t in trials])}
    return tune.with_resources(tune.with_parameters(run, shared=shared), resources=TrialResources(shared)), space


def listed_name(config: Mapping[str, Any]) -> str | None:
    """The name of a trial of a list, from what Tune gave it; None of one that a search drew, or that was given
    nothing."""
    return config["trial"]["name"] if "trial" in config else None


def _dirname(trial: Any) -> str:
    name = listed_name(trial.config)
    return f"{trial.trial_id}" if name is None else f"{name.split(',')[0]}_{trial.trial_id}"


# --- when a trial is stopped ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ended:
    """A trial that had ended before the sweep was resumed, as a scheduler knows it."""

    trial_id: str


class _Lasting(TrialScheduler):
    """A scheduler that outlives its sweep: it writes down whom it stops, and after a resume it knows what the trials
    that had ended told (Tune itself keeps nothing of a scheduler). Trials that go on tell their earlier rounds again
    themselves."""

    out: Path
    objective: str

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        taken = super().set_search_properties(metric, mode, **spec)
        for trial in SweepFolder(self.out).runs():
            if trial.finished or trial.stopped:
                self._remember_all(trial)
        return taken

    def _remember_all(self, trial: TrialFolder) -> None:
        for record in trial.records:
            if record["metrics"] is not None:
                result = {"round": record["round"], "objective": record["metrics"][self.objective]}
                self.remember(_Ended(trial.name), result)

    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        """Take in what an ended trial told of one round."""
        raise NotImplementedError

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            for folder in _folders_of(SweepFolder(self.out), trial):
                if not folder.finished:  # at its last round it was not stopped, it was done
                    folder.stop()
        return decision


def _folders_of(sweep: SweepFolder, trial: Any) -> list[TrialFolder]:
    """The folder of one of Tune's trials; none where it has not begun."""
    name = listed_name(trial.config)
    if name:
        return [sweep.trial(name)]
    return [folder for folder in sweep.planned() if folder.name.startswith(f"{trial.trial_id},")]


class _Asha(_Lasting, AsyncHyperBandScheduler):
    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        self._brackets[0].on_result(trial, result["round"], self._metric_op * result["objective"])


class _Median(_Lasting, MedianStoppingRule):
    def remember(self, trial: Any, result: dict[str, Any]) -> None:
        self._results[trial].append(result)


def scheduler(sweep: Sweep, rounds: int, out: Path, objective: str) -> TrialScheduler:
    """What stops trials, as `sweep.stop` says. `rounds`: the most that a trial takes; `out`: the sweep's folder."""
    made: _Lasting
    if sweep.stop == "asha" and rounds > sweep.grace:
        made = _Asha(time_attr="round", max_t=rounds, grace_period=sweep.grace, reduction_factor=sweep.reduction)
    elif sweep.stop == "median":
        made = _Median(time_attr="round", grace_period=sweep.grace, min_samples_required=3)
    else:
        return FIFOScheduler()
    made.out, made.objective = out, objective
    return made


def _searcher(sweep: Sweep, mode: str) -> Any:
    if not sweep.adaptive:
        return None
    try:
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(metric="objective", mode=mode, seed=0)
    except (ImportError, AssertionError) as error:
        raise ConfigError("search='optuna' needs Optuna: pip install 'fedray[optuna]'") from error
    return Repeater(search, repeat=len(sweep.seeds)) if len(sweep.seeds) > 1 else search


# --- whom it tells ----------------------------------------------------------------------------------------------------


def trackers(names: Sequence[str], out: Path) -> list[tune.Callback]:
    """Tune's callbacks for `--track`. Raises ConfigError for one that is not installed."""
    made = {"mlflow": _mlflow, "wandb": _wandb}
    callbacks = []
    for name in names:
        try:
            callbacks.append(made[name](out))
        except ImportError as error:
            raise ConfigError(f"--track {name} needs it: pip install 'fedray[track]'") from error
    return callbacks


def _mlflow(out: Path) -> tune.Callback:
    import mlflow  # noqa: F401 (the callback itself can be made without it)
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out / 'mlflow.db'}"
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=out.name)


def _wandb(out: Path) -> tune.Callback:
    import wandb  # noqa: F401 (the callback itself can be made without it)
    from ray.air.integrations.wandb import WandbLoggerCallback

    return WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "fedray"), group=out.name)
