"""What runs in a trial's process: one federated run, and what Tune is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search.repeater import TRIAL_INDEX
from ray.util.placement_group import get_current_placement_group

from fedray.config.sections import Config
from fedray.data.partition import client_names
from fedray.errors import ConfigError, FedrayError, PrivacyError
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.report.metrics import RayMetrics
from fedray.report.track import Several
from fedray.sweep.budget import check_affordable, planned, split_of
from fedray.sweep.folder import SweepFolder
from fedray.sweep.resources import bundles, counts_clients, placed
from fedray.sweep.space import Sweep
from fedray.sweep.trials import label, objective_of, trial_config, without_seed


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep know. `base`: the config that they share; `gpus_there`: of the whole cluster."""

    sweep: Sweep
    base: Config
    out: str
    gpus_there: float

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(Path(self.out))

    def config(self, values: Mapping[str, Any]) -> Config:
        """The config of a trial with these values."""
        return trial_config(self.base, values)


@dataclass(frozen=True)
class Draw:
    """What one trial is to run. `listed`: it is one of a list that was checked as a whole before the first began."""

    name: str
    values: dict[str, Any]
    listed: bool

    @classmethod
    def of(cls, point: Mapping[str, Any], sweep: Sweep) -> Draw:
        """Of what a search has drawn: keys of the space and, with several seeds, the turn."""
        drawn = {key: value for key, value in point.items() if key != TRIAL_INDEX}
        seed = sweep.seeds[point.get(TRIAL_INDEX, 0)]
        name = f"{tune.get_context().get_trial_id()},{label(without_seed(drawn))},seed={seed}"
        return cls(name, drawn | {"seed": seed}, False)


@dataclass(frozen=True)
class TrialResources:
    """A trial's placement group, from its config."""

    shared: Shared

    def __call__(self, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        point = config.get("trial", config)
        # Any seed: none decides how many clients there are.
        values = point.get("values") or {k: v for k, v in point.items() if k != TRIAL_INDEX} | {"seed": 0}
        run = self.shared.config(values)
        clients = len(client_names(run)) if counts_clients(run) else 1
        return bundles(run, clients, self.shared.gpus_there).factory()


class RoundReports:
    """Tells Tune of each round. The last one is held back until the run's results are written: a scheduler ends a
    trial that reports it."""

    def __init__(self, objective: str, rounds: int) -> None:
        self.objective, self.rounds = objective, rounds
        self._bytes = 0
        self._last: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None

    def evaluated(self, record: dict[str, Any]) -> None:
        start = record.get("start") or {}
        self._bytes = start.get("bytes_up", 0) + start.get("bytes_down", 0)

    def round(self, record: dict[str, Any]) -> None:
        self._bytes += record["bytes_up"] + record["bytes_down"]
        if record["metrics"] is None:
            return  # a scheduler must not judge a round by an older one's numbers
        if record["round"] == self.rounds or "stopped" in record:
            self._last = self._numbers(record)
        else:
            tune.report(self._numbers(record))

    def finished(self) -> None:
        if self._last is not None:
            tune.report(self._last)

    def _numbers(self, record: dict[str, Any]) -> dict[str, Any]:
        metrics = record["metrics"]
        numbers = {
            "round": record["round"],
            "objective": metrics[self.objective],
            **metrics,
            "bytes": self._bytes,
            "epsilon": max((record["epsilon"] or {}).values(), default=None),
            "train_loss": record["train_loss"],
            "exactness": record["exactness"],
            "aggregation_error": record["aggregation_error"],
            **{f"seconds_{phase}": value for phase, value in record["seconds"].items()},
        }
        return {name: value for name, value in numbers.items() if value is not None}


def run_listed(config: dict[str, Any], shared: Shared) -> None:
    """The trainable for a trial of a list."""
    listed = config["trial"]
    _run_to_its_end(Draw(listed["name"], listed["values"], True), shared)


def run_trial(config: dict[str, Any], shared: Shared) -> None:
    """The trainable for a trial that a search has drawn."""
    _run_to_its_end(Draw.of(config, shared.sweep), shared)


def _run_to_its_end(draw: Draw, shared: Shared) -> None:
    """One federated run in the trial's placement group, from its own checkpoint where there is one.

    A run that fails for its own reason (it diverged, it cannot afford its privacy) leaves `NAME.failed.json` and ends;
    anything else is raised, and Tune tries the trial again.
    """
    folder = shared.folder.trial(draw.name)
    if folder.stopped:
        return  # a scheduler has ended it, and Tune was killed before it wrote that down
    folder.try_again()
    try:
        reports = _run(draw, shared)
    except FedrayError as error:
        if not _own_fault(error):
            raise
        folder.fail(str(error))
        return
    reports.finished()


def _run(draw: Draw, shared: Shared) -> RoundReports:
    """The run itself, and what is to be reported when all of it is written. Raises FedrayError."""
    folder = shared.folder.trial(draw.name)
    config = shared.config(draw.values)
    clients = len(client_names(config)) if config.engine == "ray" else 1
    config, needed = placed(config, clients, shared.gpus_there, folder.run)
    each = needed.training
    prepared = prepare(config, (needed.processes * each["CPU"], needed.processes * each.get("GPU", 0.0)))
    folder.begin(draw.values, split_of(config), planned(prepared))
    if not draw.listed:
        check_affordable(prepared, folder)
    reports = RoundReports(objective_of(shared.sweep, config)[0], config.federation.rounds)
    group = get_current_placement_group() if needed.workers else None
    execute(prepared, Several([RayMetrics(), reports]), group)
    return reports


def _own_fault(error: FedrayError) -> bool:
    """Whether the run would fail again for the same reason."""
    diverged = any(words in str(error) for words in ("the loss became", "not finite"))
    return diverged or isinstance(error, (ConfigError, PrivacyError))
