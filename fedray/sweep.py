"""`fedray sweep`: many federated runs under Ray Tune, each with its own coordinator and workers inside its trial's placement group.

A space is a Python file that holds one `Sweep` under the name SWEEP (see `tune_spaces/`). Every trial is an ordinary run directory under
`OUT/trials`, so a trial that is repeated, by Tune or by `--resume`, goes on from its own checkpoint, and any trial can be evaluated,
exported or rerun alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Repeater
from ray.tune.search.repeater import TRIAL_INDEX
from ray.tune.search.sample import Categorical, Domain, Sampler
from ray.tune.search.variant_generator import generate_variants
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.argv import split
from fedray.compare import Entry
from fedray.config.read import known_keys, read_config
from fedray.config.sections import Config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError, FedrayError, PrivacyError, nearest
from fedray.federation.cluster import nodes_there, ray_session
from fedray.federation.folder import check_lasting, rooted
from fedray.federation.placement import Node, silos_of
from fedray.federation.prepare import Prepared, prepare
from fedray.federation.results import read_rounds, read_run_config
from fedray.federation.run import execute
from fedray.methods import why_not
from fedray.privacy.accountant import Release
from fedray.privacy.keys import KeyStore
from fedray.privacy.ledger import EVERYONE, Ledger
from fedray.privacy.planning import plans_for
from fedray.privacy.selection import STOPPING, composed, draw_runs
from fedray.report.metrics import RayMetrics
from fedray.report.track import Several
from fedray.stopping import interruption

SEARCHES, STOPS, TRACKERS = ("grid", "random", "optuna"), ("asha", "median", "none"), ("mlflow", "wandb")
TRIAL_ATTEMPTS = 3


@dataclass(frozen=True)
class Sweep:
    """What to try. `space`: by config key (or any name, for several keys at once: the values are then mappings) Tune's `grid_search`,
    `choice`, `loguniform`, ...; the key `entry` takes `[ADAPTER+]METHOD[@RANK]`. `base`: config keys that all trials share.

    `samples`: how many draws (of random and optuna; grids are crossed with each). `seeds`: every trial is run with each. `objective`: a
    metric of the task (default: the one in `summary.json`). `stop`: asha, median or none, from round `grace` on; `reduction`: of asha.
    `random_stopping`: geometric or poisson: the number of draws is secret and random, `samples` on average, and the privacy of the best
    alone is told too.
    Raises ConfigError for what is no sweep.
    """

    space: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)
    search: str = "grid"
    samples: int = 1
    seeds: Sequence[int] = (0,)
    objective: str | None = None
    stop: str = "none"
    grace: int = 1
    reduction: float = 3.0
    max_concurrent: int | None = None
    random_stopping: str | None = None

    def __post_init__(self):
        for name, value, allowed in (("search", self.search, SEARCHES), ("stop", self.stop, STOPS)):
            if value not in allowed:
                raise ConfigError(f"{name} '{value}' of the sweep is not known: choose {', '.join(allowed)}")
        if not self.space:
            raise ConfigError("the sweep's space is empty: give at least one key something to choose from")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"the sweep's seeds {tuple(self.seeds)} must be different numbers, one or more")
        if self.samples < 1 or self.grace < 1 or (self.max_concurrent or 1) < 1 or self.reduction <= 1:
            raise ConfigError("samples, grace and max_concurrent of a sweep are at least 1, and reduction is above 1")
        domains = [key for key, value in self.space.items() if isinstance(value, Domain)]
        if self.search == "grid" and domains:
            raise ConfigError(
                f"'{domains[0]}' draws its values, which search grid does not do: give tune.grid_search([...]), or search='random'"
            )
        grids = [key for key, value in self.space.items() if isinstance(value, dict) and "grid_search" in value]
        if self.search == "optuna" and grids:
            raise ConfigError(f"'{grids[0]}' is a grid, which optuna does not take: give tune.choice([...])")
        if self.search == "optuna" and len(self.seeds) > 1 and self.stop != "none":
            raise ConfigError(
                "optuna learns from the mean over the seeds, which a scheduler that stops some of them would spoil: stop='none', or one seed"
            )
        if self.random_stopping is not None:
            if self.random_stopping not in STOPPING:
                raise ConfigError(
                    f"random_stopping '{self.random_stopping}' is not known: choose {', '.join(STOPPING)}"
                )
            if self.search != "random" or self.stop != "none" or len(self.seeds) > 1 or grids:
                raise ConfigError(
                    "random_stopping holds for runs that are drawn alike and know nothing of each other: search='random', stop='none', one seed, and no grid_search"
                )


def in_words(value: Any) -> Any:
    """A sweep, or what is in it, as plain values that are the same whenever the same space file is read."""
    if isinstance(value, Sweep):  # how many run at a time is no part of what is asked
        return {k: in_words(v) for k, v in vars(value).items() if k != "max_concurrent"}
    if isinstance(value, Mapping):
        return {str(k): in_words(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_words(v) for v in value]
    if isinstance(value, (Domain, Sampler)):
        return [type(value).__qualname__, {k: in_words(v) for k, v in sorted(vars(value).items())}]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def load_space(path: str) -> Sweep:
    """The SWEEP of a space file. Raises ConfigError for a file that cannot be read or holds none."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"space '{path}' does not exist: give a Python file such as tune_spaces/smoke.py")
    spec = importlib.util.spec_from_file_location(f"fedray_space_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"space '{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FedrayError:
        raise
    except Exception as error:  # whatever is wrong with a person's file is told with its line
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        words = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(f"space '{path}' cannot be read: {type(error).__name__}: {words} (line {line})") from error
    if not isinstance(found := getattr(module, "SWEEP", None), Sweep):
        raise ConfigError(
            f"space '{path}' holds no SWEEP: write SWEEP = Sweep(space={{...}}), with `from fedray.sweep import Sweep`"
        )
    return found


# --- which trials ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its name, what sets it apart (as in the space, seed included), and its config."""

    name: str
    values: dict[str, Any]
    config: Config


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the space as config keys (and `entry`): values that are mappings give several keys. Raises ConfigError for unknown keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    known = {*known_keys(), "entry"}
    for key in flat:
        if key not in known and not key.startswith("clients."):
            raise ConfigError(f"the space's key '{key}' is not known{nearest(key, known)}")
        if key.startswith("output.") or key == "seed":
            raise ConfigError(f"the space may not set {key}: the sweep does (seeds=..., --out)")
    return flat


def trial_config(flags: Sequence[str], values: Mapping[str, Any]) -> Config:
    """The config of one point of the space. `flags`: what all trials share. Raises ConfigError."""
    flat = settings({k: v for k, v in values.items() if k != "seed"})
    own = []
    if (text := flat.pop("entry", None)) is not None:
        kind = read_config(list(flags)).adapter
        entry = Entry.parse(str(text), kind.kind if "kind" in kind.model_fields_set else None)
        own += entry.flags({})
        if entry.rank and "adapter.rank" in flat:
            raise ConfigError(f"the space gives '{text}' a rank and varies adapter.rank: leave one of them out")
    own += [word for key, value in flat.items() for word in (f"--{key}", flag_value(value))]
    return read_config([*flags, *own, "--seed", str(values.get("seed", 0))])


def flag_value(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return (
        ",".join(map(str, value))
        if isinstance(value, (list, tuple))
        else str(value.item() if isinstance(value, np.generic) else value)
    )


def points(sweep: Sweep, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The points of a space that is known beforehand (grid, random), without the seeds."""
    state = np.random.RandomState(seed)
    for _ in range(draws if sweep.search == "random" else 1):
        for _, values in generate_variants(dict(sweep.space), random_state=state):
            yield dict(values)


def trials_of(sweep: Sweep, flags: Sequence[str], draws: int, seed: int = 0) -> tuple[list[Trial], list[str]]:
    """All trials of a grid or of random draws, and for each combination that no method admits a line of why it is left out.

    Raises ConfigError for a config that is bad otherwise.
    """
    found, left_out = [], []
    seen: set[str] = set()
    for point in points(sweep, draws, seed):
        text = label(point)
        if reason := _unsound(flags, point):
            left_out.append(f"{text}: {reason}")
            continue
        for seed in sweep.seeds:
            config = trial_config(flags, point | {"seed": seed})
            key = config.model_dump_json()
            if key in seen and sweep.random_stopping is None:  # the same run gives the same numbers
                continue
            seen.add(key)
            found.append(Trial(f"{len(found):03d},{text},seed={seed}", {**point, "seed": seed}, config))
    if not found:
        raise ConfigError(f"no trial is left of the space: {left_out[0]}")
    return found, left_out


def _unsound(flags: Sequence[str], point: Mapping[str, Any]) -> str | None:
    flat = settings(point)
    if "entry" in flat or "method.name" not in flat or "adapter.kind" not in flat:
        return None  # what a space names as a whole must be sound
    return why_not(flat["method.name"], flat["adapter.kind"])


def label(point: Mapping[str, Any]) -> str:
    """A point in words that a file's name may hold: `entry` bare, of other keys the last part of the name."""
    parts = []
    for key, value in settings(point).items():
        text = flag_value(f"{value:.4g}" if isinstance(value, float) else value)
        parts.append(text if key in ("entry", "method.name") else f"{key.rsplit('.', 1)[-1]}={text}")
    return re.sub(r"[^\w.,=@+-]", "-", ",".join(parts))[:120]


# --- checks before anything runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundles:
    """What a trial's placement group holds. `own`: the trial's own process (inline runs train in it); `workers` times `each`: its workers, on
    nodes with `labels`, one mapping a worker, where clients are kept to their own nodes."""

    own: dict[str, float]
    each: dict[str, float]
    workers: int
    labels: tuple[dict[str, str], ...] = ()

    def factory(self) -> tune.PlacementGroupFactory:
        where = {"bundle_label_selector": [_elsewhere(self.labels), *self.labels]} if self.labels else {}
        return tune.PlacementGroupFactory([self.own, *[self.each] * self.workers], strategy="PACK", **where)

    @property
    def words(self) -> str:
        count, one = (self.workers, self.each) if self.workers else (1, self.own)
        ask = " and ".join(f"{n:g} {name}{'s' if n > 1 else ''}" for name, n in one.items())
        total = " and ".join(f"{count * n:g} {name}{'s' if count * n > 1 else ''}" for name, n in one.items())
        return f"{count} workers of {ask} = {total}" if count > 1 else ask


def bundles(config: Config, clients: int, gpus_there: float) -> Bundles:
    """The resources of a trial: one worker (or `worker.count`, or, where `worker.gpus` is given, one for each client of a cohort) of
    `worker.gpus` GPUs (default 1 where the cluster has any) and `worker.cpus` CPUs (default 1)."""
    worker = config.worker
    gpus = worker.gpus if worker.gpus is not None else (1.0 if gpus_there else 0.0)
    each = {"CPU": float(worker.cpus or 1)} | ({"GPU": gpus} if gpus else {})
    if config.engine == "inline":
        return Bundles(each, {}, 0)
    if config.siloed:
        at_most = worker.count or (clients if worker.gpus else 1)
        labels = tuple(
            dict(where) for where, members in silos_of(config).items() for _ in range(min(at_most, len(members)))
        )
        # A bundle of its own, a byte, for the trial and its coordinator: they see every update, and belong on no silo's machine.
        return Bundles({"memory": 1.0}, each, len(labels), labels)
    cohort = min(config.federation.cohort or clients, clients)
    return Bundles({}, each, worker.count or (cohort if worker.gpus else 1))


def _elsewhere(labels: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Labels of a node that is none of the silos' (as far as they are told apart by plain values)."""
    values: dict[str, list[str]] = {}
    for where in labels:
        for key, text in where.items():
            if not text.startswith("!"):
                values.setdefault(key, []).extend(text[3:-1].split(",") if text.startswith("in(") else [text])
    return {key: f"!in({','.join(sorted({t.strip() for t in found}))})" for key, found in values.items()}


def check_placeable(name: str, asked: Bundles, nodes: Sequence[Node]) -> None:
    """Raises ConfigError, with the arithmetic, for a trial that the cluster can never place (of places with labels `place_silos` has said so)."""
    one, count = (asked.each, asked.workers) if asked.workers else (asked.own, 1)
    room = sum(node.room(one) for node in nodes)
    if room >= count:
        return
    have = ", ".join(f"{sum(node.resources.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in one)
    on = f" on {len(nodes)} nodes, where {room} such workers fit" if len(nodes) > 1 else ""
    raise ConfigError(
        f"trial '{name}' asks for {asked.words}, but the cluster has {have}{on}: lower worker.count (workers serve clients in turn), worker.gpus or worker.cpus"
    )


def planned(prepared: Prepared) -> dict[str, list[Release]] | None:
    """What a run would release of each client's data by its plan; None for a run without privacy."""
    config = prepared.config
    if not config.privacy.on:
        return None
    if config.privacy.unit == "client":
        (plan,) = plans_for(config, dict.fromkeys(prepared.data.clients, 1.0)).values()
        return {EVERYONE: [plan.release(plan.steps)]}
    counts = {c: float(max(n, config.client(c).batch_size)) for c, n in prepared.units().items()}
    return {c: [*p.before, p.release(p.steps)] for c, p in plans_for(config, counts).items()}


def released(folder: Path) -> dict[str, list[Release]] | None:
    """What a run has released so far, from its ledger; {} before the first release, None for a run without privacy."""
    ledger = Ledger.load(folder / "checkpoint" / "ledger.json")
    if ledger is not None:
        return {c: [e.release for e in entries] for c, entries in ledger.entries.items()}
    begun = (folder / "config.yaml").is_file()
    return None if begun and not read_run_config(folder).privacy.on else {}


def split_of(config: Config) -> str:
    """A word that two runs share when a client has the same examples in both."""
    own = {n: c.source for n, c in config.clients.items() if c.source}
    by_nature = bool(own) or config.data.source == "builtin" or config.data.partition == "column"
    seed = None if by_nature and config.data.limit is None else config.seed
    return json.dumps(
        [config.data.model_dump(mode="json"), own, None if by_nature else config.federation.clients, seed],
        sort_keys=True,
    )


PUBLIC_RUN = {EVERYONE: [Release("a run without privacy", 0.0)]}


def told(out: Path) -> list[tuple[dict[str, list[Release]], str]]:
    """What every run under OUT that has begun has released so far, of a run without privacy a release without noise; and how it dealt the data."""
    folders = (
        sorted(p for p in (out / "trials").iterdir() if (p / "config.yaml").is_file())
        if (out / "trials").is_dir()
        else []
    )
    found = [(released(folder), split_of(read_run_config(folder))) for folder in folders]
    return [(PUBLIC_RUN if releases is None else releases, split) for releases, split in found]


def check_budget(trials: Sequence[Trial], prepared: Sequence[Prepared], times: int | None = None) -> None:
    """Raises ConfigError when the runs together would spend more than `privacy.sweep_epsilon` of any client's data, or cannot be added up.
    `times`: the trials are what an adaptive search may choose from, so many times: as often as it chooses the one that spends most."""
    configs = [t.config for t in trials]
    private = [c for c in configs if c.privacy.on]
    if len({c.privacy.unit for c in private}) > 1:
        raise ConfigError(
            "the sweep varies privacy.unit, and what examples and what clients are told cannot be added up: make two sweeps"
        )
    cut = [c for c in private if c.model.task == "causal-lm" and c.data.completion is None]
    for key, values in (
        ("data.max_length", {c.data.max_length for c in cut}),
        ("model.path", {c.model.path for c in cut}),
    ):
        if len(values) > 1:
            raise ConfigError(
                f"the sweep varies {key}, which decides what one private example is: releases of different units cannot be added up; make two sweeps"
            )
    if len({split_of(c) for c in private if c.privacy.unit == "client"}) > 1:
        raise ConfigError(
            "privacy.unit client with trials that deal the data out differently (other seeds, clients or partitions): a client of one is no client of another, and what they are told "
            "cannot be added up; use one seed, or data whose clients are given"
        )
    budgets = {c.privacy.sweep_epsilon for c in configs}
    if budgets == {None}:
        return
    if len(budgets) > 1:
        raise ConfigError(
            "privacy.sweep_epsilon is one for the whole sweep: give it on the command line or in the base, not in the space"
        )
    if bare := next((t.name for t in trials if not t.config.privacy.on), None):
        raise ConfigError(
            f"trial '{bare}' has no privacy.epsilon, so that no privacy.sweep_epsilon can hold: leave one of them out"
        )
    if any(c.privacy.delta is None and c.privacy.unit == "example" for c in configs):
        raise ConfigError(
            "privacy.sweep_epsilon needs privacy.delta too: each trial's own would follow from noised numbers of examples, and a sum has one delta"
        )
    runs, splits, budget = [planned(p) for p in prepared], [split_of(c) for c in configs], budgets.pop()
    delta, count = min(plan_delta(p) for p in prepared), times if times is not None else len(runs)
    if times is None:
        total = worst_of(composed(runs, delta, splits))
    else:
        total = max(
            worst_of(composed([run] * times, delta, [str(i % len(set(splits))) for i in range(times)])) for run in runs
        )
    if total > budget:
        raise ConfigError(
            f"{count} trials together would spend epsilon {total:.4g} at delta {delta:g} of the data, and privacy.sweep_epsilon is {budget:g}: "
            "lower privacy.epsilon, try fewer, or raise it"
        )


def plan_delta(prepared: Prepared) -> float:
    """delta of a private run's plan."""
    config = prepared.config
    if config.privacy.delta is not None:
        return config.privacy.delta
    units = prepared.units() if config.privacy.unit == "example" else dict.fromkeys(prepared.data.clients, 1)
    counts = {c: float(max(n, config.client(c).batch_size)) for c, n in units.items()}
    return next(iter(plans_for(config, counts).values())).delta


def worst_of(epsilons: Mapping[str, float]) -> float:
    """The largest, 0 of none."""
    return max(epsilons.values(), default=0.0)


# --- one trial ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep know. `base`: the config's keys that they share, nested."""

    sweep: Sweep
    base: dict[str, Any]
    out: str
    gpus_there: float

    def config(self, values: Mapping[str, Any]) -> Config:
        return trial_config(_flags(self.base), values)


def _flags(nested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested plain values as the command line has them."""
    found = []
    for key, value in nested.items():
        if isinstance(value, Mapping) and prefix + key != "adapter.rank" and key != "node_labels":
            found += _flags(value, f"{prefix}{key}.")
        else:
            text = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else flag_value(value)
            found += [f"--{prefix}{key}", text]
    return found


def placed(config: Config, clients: int, gpus_there: float, folder: Path) -> tuple[Config, Bundles]:
    """The config with its workers and its run directory spelled out, so that the same run can be made again alone; and its bundles."""
    asked = bundles(config, clients, gpus_there)
    one = asked.each or asked.own
    cache = config.worker.cache or str(cache_folder(folder.parent.parent))
    count = (
        (config.worker.count or max(asked.labels.count(where) for where in asked.labels))
        if asked.labels
        else asked.workers or None
    )
    worker = config.worker.model_copy(
        update={"count": count, "cpus": int(one["CPU"]), "gpus": one.get("GPU", 0.0), "cache": cache}
    )
    output = config.output.model_copy(
        update={"dir": str(folder), "resume": True, "track": ()}
    )  # Tune's own callbacks do
    return config.model_copy(update={"worker": worker, "output": output}), asked


def cache_folder(out: Path) -> Path:
    """Where a sweep's trials share what they tokenised, on each machine by itself: the sweep removes it when it ends. The base weights need
    no such place: they are mapped from the model's own files, so that trials on one machine share them through the page cache."""
    return Path(tempfile.gettempdir()) / f"fedray-{os.getuid()}-{hashlib.sha256(str(out).encode()).hexdigest()[:12]}"


def objective_of(sweep: Sweep, config: Config) -> tuple[str, str]:
    """(name, max or min) of what is sought."""
    task = TASKS[config.model.task]
    name = sweep.objective or task.metric
    if name not in task.reported:
        raise ConfigError(f"objective '{name}' is no metric of this task: choose {', '.join(task.reported)}")
    better = (
        task.higher_is_better
        if name == task.metric
        else not any(word in name for word in ("loss", "perplexity", "bits"))
    )
    return name, "max" if better else "min"


class _Reports:
    """Tells Tune of each round. The last one is held back until the run's results are written: a scheduler ends a trial that reports it."""

    def __init__(self, objective: str, rounds: int):
        self.objective, self.rounds = objective, rounds
        self._bytes, self._metrics, self._last = 0, {}, None

    def __getattr__(self, name: str):
        return lambda *args: None

    def evaluated(self, record: dict[str, Any]) -> None:
        start = record.get("start") or {}
        self._bytes = start.get("bytes_up", 0) + start.get("bytes_down", 0)
        self._metrics = record["metrics"]

    def round(self, record: dict[str, Any]) -> None:
        self._bytes += record["bytes_up"] + record["bytes_down"]
        if record["metrics"] is None:
            return  # a scheduler must not judge a round by an older one's numbers
        self._metrics = record["metrics"]
        told = {
            "round": record["round"],
            "objective": self._metrics[self.objective],
            **self._metrics,
            "bytes": self._bytes,
            "epsilon": max((record["epsilon"] or {}).values(), default=None),
            "train_loss": record["train_loss"],
            "exactness": record["exactness"],
            "aggregation_error": record["aggregation_error"],
            **{f"seconds_{phase}": value for phase, value in record["seconds"].items()},
        }
        told = {k: v for k, v in told.items() if v is not None}
        if record["round"] == self.rounds or "stopped" in record:
            self._last = told
        else:
            tune.report(told)

    def finished(self) -> None:
        if self._last is not None:
            tune.report(self._last)


def run_trial(point: dict[str, Any], shared: Shared) -> None:
    """The trainable: one federated run in the trial's placement group, from its own checkpoint where there is one.

    A run that fails for its own reason (it diverged, it cannot afford its privacy) leaves `failed.json` and ends; anything else is raised, and Tune
    tries the trial again.
    """
    values = point.get("values") or {k: v for k, v in point.items() if k != TRIAL_INDEX} | {
        "seed": shared.sweep.seeds[point.get(TRIAL_INDEX, 0)]
    }
    name = (
        point.get("name")
        or f"{tune.get_context().get_trial_id()},{label({k: v for k, v in values.items() if k != 'seed'})},seed={values['seed']}"
    )
    folder = Path(shared.out) / "trials" / name
    failed, stopped = folder.parent / f"{name}.failed.json", folder.parent / f"{name}.stopped"
    if stopped.exists():
        return  # a scheduler has ended it, and Tune was killed before it wrote that down
    failed.unlink(missing_ok=True)
    try:
        config = shared.config(values)
        clients = len(prepare(config, (1e9, 1e9)).data.clients) if config.engine == "ray" else 1
        config, asked = placed(config, clients, shared.gpus_there, folder)
        one = asked.each or asked.own
        count = asked.workers or 1
        prepared = prepare(config, (count * one["CPU"], count * one.get("GPU", 0.0)))
        (folder.parent / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        _write_json(
            folder.parent / f"{name}.json",
            {"values": values, "split": split_of(config), "planned": _as_json(planned(prepared))},
        )
        if "name" not in point:  # trials of a list were checked together before the first began
            _afford(shared, prepared, name)
        reports = _Reports(objective_of(shared.sweep, config)[0], config.federation.rounds)
        execute(prepared, Several([RayMetrics(), reports]), get_current_placement_group() if asked.workers else None)
    except FedrayError as error:
        own_fault = isinstance(error, (ConfigError, PrivacyError)) or any(
            w in str(error) for w in ("the loss became", "not finite")
        )
        if not own_fault:
            raise
        _write_json(failed, {"reason": str(error)})
        return
    reports.finished()


def _afford(shared: Shared, prepared: Prepared, name: str) -> None:
    """Raises PrivacyError when this run, beside what the others have released, would overspend the sweep's budget."""
    budget = prepared.config.privacy.sweep_epsilon
    if budget is None:
        return
    # Its own plan is written down already: of two that start at the same moment each sees the other's.
    runs, splits = [], []
    for file in sorted((Path(shared.out) / "trials").glob("*.json")):
        if file.name.endswith(".failed.json"):
            continue
        kept = json.loads(file.read_text())
        run, over = (
            file.with_suffix(""),
            file.with_suffix(".failed.json").exists() or file.with_suffix(".stopped").exists(),
        )
        spent = released(run) if over or (run / "summary.json").exists() else _from_json(kept["planned"])
        runs.append(PUBLIC_RUN if spent is None else spent)
        splits.append(kept["split"])
    total = worst_of(composed(runs, plan_delta(prepared), splits))
    if total > budget:
        (Path(shared.out) / "trials" / f"{name}.json").unlink()
        raise PrivacyError(
            f"with this trial the sweep would have spent epsilon {total:.4g} of privacy.sweep_epsilon {budget:g}: it is left out"
        )


def _as_json(runs: Mapping[str, Sequence[Release]] | None) -> dict[str, list[list[Any]]] | None:
    return (
        None
        if runs is None
        else {client: [[r.what, r.noise, r.rate, r.steps] for r in releases] for client, releases in runs.items()}
    )


def _from_json(kept: Mapping[str, Sequence[Sequence[Any]]] | None) -> dict[str, list[Release]] | None:
    return None if kept is None else {client: [Release(*r) for r in releases] for client, releases in kept.items()}


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, default=str))
    part.replace(path)


# --- the sweep itself ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A sweep as a person asked for it, read and checked: what to run, where, and how."""

    sweep: Sweep
    space: str
    base: dict[str, Any]
    out: Path
    resume: bool
    trackers: tuple[str, ...]
    notes: tuple[str, ...] = ()


_OWN = {"space", "out", "resume", "track", "seeds", "samples", "max-concurrent"}


def read_sweep(argv: Sequence[str]) -> Asked:
    """`--space F.py [--out DIR] [--resume] [--seeds 0,1] [--samples N] [--max-concurrent N] [--track mlflow,wandb]` and config flags, which
    win over the space's base and fix a key of the space. Raises ConfigError."""
    own, rest = split(argv, lambda name: name in _OWN, switches=("resume",))
    if "space" not in own:
        raise ConfigError("fedray sweep needs --space F.py, a search space such as tune_spaces/smoke.py")
    sweep = load_space(own["space"])
    try:
        change: dict[str, Any] = {}
        if "seeds" in own:
            change["seeds"] = tuple(int(s) for s in own["seeds"].split(","))
        for flag, name in (("samples", "samples"), ("max-concurrent", "max_concurrent")):
            if flag in own:
                change[name] = int(own[flag])
    except ValueError as error:
        raise ConfigError(f"--seeds, --samples and --max-concurrent hold whole numbers: {error}") from None
    given = [word[2:] for word in rest if word.startswith("--")]
    for key in given:
        if key in ("seed", "output.dir", "output.resume", "output.track"):
            raise ConfigError(f"--{key} is set by the sweep itself: use --seeds, --out, --resume or --track")
    together = {
        inner
        for axis in sweep.space.values()
        for value in _values_of(axis)
        if isinstance(value, Mapping)
        for inner in value
    }
    entries = "entry" in sweep.space or "entry" in together
    for key in given:
        if key in together or (entries and key in ("method.name", "adapter.kind")):
            raise ConfigError(
                f"--{key} is what the space varies together with other keys: leave it out, or write a space of your own"
            )
    fixed = [key for key in sweep.space if key in given]
    space = {key: value for key, value in sweep.space.items() if key not in fixed}
    sweep = Sweep(**vars(sweep) | {"space": space} | change)
    flat = settings(sweep.base)
    flags = [word for key, value in flat.items() for word in (f"--{key}", flag_value(value))]
    trackers = tuple(t for t in own.get("track", "").split(",") if t)
    if strange := [t for t in trackers if t not in TRACKERS]:
        raise ConfigError(
            f"--track '{strange[0]}' is not known: choose {', '.join(TRACKERS)} (TensorBoard's files are always written)"
        )
    base = rooted(read_config([*flags, *rest])).model_dump(mode="json", exclude_unset=True)
    check_lasting("--out", own.get("out"))
    out = Path(
        own.get("out", Path("runs", f"sweep-{Path(own['space']).stem}-{time.strftime('%Y%m%d-%H%M%S')}"))
    ).absolute()
    notes = tuple(f"{key} is fixed by the command line, and no longer part of the space" for key in fixed)
    return Asked(sweep, own["space"], base, out, "resume" in own, trackers, notes)


def _values_of(axis: Any) -> Sequence[Any]:
    """What an axis of a space takes its values from, where that is a list."""
    if isinstance(axis, Categorical):
        return axis.categories
    return axis["grid_search"] if isinstance(axis, dict) and "grid_search" in axis else [axis]


def run_sweep(asked: Asked, view: Callable[[int, bool], tune.Callback], say: Callable[[str], None]) -> Path:
    """Check everything, run all trials, and return the folder, where `fedray.report.sweep` finds them. `view`: makes the live view, from the
    number of trials and whether more is better. Raises ConfigError before anything runs, KeyboardInterrupt when it was stopped."""
    sweep, out = asked.sweep, asked.out
    _check_folder(asked)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own output, which scrolls; the live view has its place
    os.environ.setdefault(
        "TUNE_DISABLE_STRICT_METRIC_CHECKING", "1"
    )  # a trial that fails before its first report fails alone
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # what a kill of the sweep may forget of an adaptive search
    draws, seed = _draws(asked)
    with ray_session():
        nodes = nodes_there()
        shared = Shared(sweep, asked.base, str(out), sum(node.resources.get("GPU", 0.0) for node in nodes))
        if sweep.search == "optuna":
            trials, left_out, times = corners(sweep, _flags(asked.base)), [], sweep.samples * len(sweep.seeds)
        else:
            trials, left_out = trials_of(sweep, _flags(asked.base), draws, seed)
            times = None
        goal, mode = objective_of(sweep, trials[0].config)
        for line in (*asked.notes, *(f"left out: {text}" for text in left_out)):
            say(line)
        if len({t.config.model.task for t in trials}) > 1:
            raise ConfigError("the space varies model.task, whose metrics cannot be compared: make two sweeps")
        prepared = []
        for trial in trials:
            found = prepare(trial.config, (1e9, 1e9))
            prepared.append(found)
            if trial.config.worker.wait is None:
                check_placeable(
                    trial.name, placed(trial.config, len(found.data.clients), shared.gpus_there, out)[1], nodes
                )
        check_budget(trials, prepared, times)
        rounds = max(t.config.federation.rounds for t in trials)
        out.mkdir(parents=True, exist_ok=True)
        kept = {
            "space": asked.space,
            "base": asked.base,
            "sweep": in_words(sweep),
            "objective": goal,
            "mode": mode,
            "trials": [] if sweep.search == "optuna" else [{"name": t.name, "values": t.values} for t in trials],
            "left_out": left_out,
            "random_stopping": [sweep.random_stopping, sweep.samples] if sweep.random_stopping else None,
        }
        _write_json(out / "sweep.json", kept)
        say(
            f"{len(trials) if sweep.search != 'optuna' else sweep.samples * len(sweep.seeds)} trials, {goal} ({mode}), in {out}"
        )
        count = len(sweep.seeds) * sweep.samples if sweep.search == "optuna" else len(trials)
        unfinished = True
        try:
            results = _tuner(asked, shared, trials, rounds, goal, mode, view(count, mode == "max")).fit()
            for r in results:
                if (
                    r.error is not None
                    and (name := _name_of(out, r)) is not None
                    and not (out / "trials" / f"{name}.failed.json").exists()
                ):
                    reason = (str(r.error).strip().splitlines() or [type(r.error).__name__])[
                        -1
                    ]  # not its own fault: --resume tries again
                    _write_json(
                        out / "trials" / f"{name}.failed.json",
                        {"reason": f"it was tried {TRIAL_ATTEMPTS} times: {reason}"},
                    )
            names = _begun(out) if sweep.search == "optuna" else [t.name for t in trials]
            ended = [
                n
                for n in names
                if any(
                    (out / "trials" / f"{n}{what}").exists() for what in ("/summary.json", ".failed.json", ".stopped")
                )
            ]
            unfinished = len(ended) < max(count, len(names))
            for name in names:
                if (failed := out / "trials" / f"{name}.failed.json").exists():
                    say(f"failed: {name}: {json.loads(failed.read_text())['reason']}")
        finally:
            _clean_up(out, whole=not unfinished)
    if unfinished:
        raise interruption()
    return out


def _begun(out: Path) -> list[str]:
    """The names of all trials that have begun."""
    files = sorted((out / "trials").glob("*.json")) if (out / "trials").is_dir() else []
    return sorted({f.name.removesuffix(".json").removesuffix(".failed") for f in files})


def _name_of(out: Path, result: Any) -> str | None:
    """The name of the trial of one of Tune's results; None of one that has told Tune nothing."""
    if "trial" in (result.config or {}):
        return result.config["trial"]["name"]
    identity = Path(result.path).name
    return next((name for name in _begun(out) if name.startswith(f"{identity},")), None)


def _draws(asked: Asked) -> tuple[int, int]:
    """How many draws of the space, and the seed that they come from: as asked and 0, or both secret, the same ones after a resume."""
    sweep = asked.sweep
    if sweep.random_stopping is None:
        return sweep.samples, 0
    asked.out.mkdir(parents=True, exist_ok=True)
    key = KeyStore(asked.out / "keys").key("sweep", "runs")
    draws = draw_runs(sweep.random_stopping, sweep.samples, key.stream("runs"))
    if draws == 0:
        raise FedrayError(
            "the secret number of runs came out as 0, which is part of the guarantee: nothing is released"
        )
    return draws, int(key.stream("points").integers(1)[0] % 2**32)


def _check_folder(asked: Asked) -> None:
    kept = asked.out / "sweep.json"
    if not asked.out.exists() or not any(asked.out.iterdir()):
        return  # with --resume too: a job that is submitted again says the same
    if not kept.is_file() and not (asked.out / "keys").is_dir():
        raise ConfigError(f"--out '{asked.out}' is not empty and holds no sweep: choose another")
    if not asked.resume:
        raise ConfigError(f"--out '{asked.out}' holds another sweep: choose another, or go on with it by --resume")
    if kept.is_file():
        held = json.loads(kept.read_text())
        if held["base"] != json.loads(json.dumps(asked.base)) or held["sweep"] != json.loads(
            json.dumps(in_words(asked.sweep))
        ):
            raise ConfigError(
                f"--out '{asked.out}' holds a sweep of another space or other flags: give the same to resume it, or another --out"
            )


def corners(sweep: Sweep, flags: Sequence[str]) -> list[Trial]:
    """Trials that stand for all that an adaptive search may try: every combination of what shapes privacy, data or resources, other keys at
    one value. Raises ConfigError where such a key is drawn from a range, which cannot be checked beforehand."""
    shaping = (
        "entry",
        "method.name",
        "adapter.kind",
        "adapter.subspace",
        "privacy.",
        "federation.",
        "data.",
        "worker.",
        "clients.",
    )
    axes: dict[str, list[Any]] = {}
    for key, value in sweep.space.items():
        if isinstance(value, Categorical):
            axes[key] = list(value.categories)
        elif isinstance(value, Domain):
            if key.startswith(shaping) and key not in (
                "federation.lr",
                "federation.weight_decay",
                "federation.proximal",
                "federation.warmup",
            ):
                raise ConfigError(
                    f"'{key}' decides what a trial costs or spends, so that optuna may only choose it from a list: give tune.choice([...])"
                )
            axes[key] = [value.sample(random_state=np.random.RandomState(0))]
        else:
            axes[key] = [value]
    found = []
    for combination in itertools.product(*axes.values()):
        point = dict(zip(axes, combination, strict=True)) | {"seed": sweep.seeds[0]}
        found.append(Trial(label({k: v for k, v in point.items() if k != "seed"}), point, trial_config(flags, point)))
    return found


def _tuner(
    asked: Asked, shared: Shared, trials: Sequence[Trial], rounds: int, goal: str, mode: str, view: tune.Callback
) -> tune.Tuner:
    sweep, folder = asked.sweep, asked.out / "tune"
    trainable = tune.with_resources(tune.with_parameters(run_trial, shared=shared), resources=_Resources(shared))
    if sweep.search == "optuna":
        space: dict[str, Any] = dict(sweep.space)
    else:
        space = {"trial": tune.grid_search([{"name": t.name, "values": t.values} for t in trials])}
        trainable = tune.with_resources(tune.with_parameters(run_listed, shared=shared), resources=_Resources(shared))
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(
            str(folder), trainable, resume_unfinished=True, resume_errored=True, param_space=space
        )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode=mode,
            scheduler=_scheduler(sweep, rounds, asked.out, goal),
            search_alg=_searcher(sweep, mode),
            num_samples=sweep.samples * len(sweep.seeds) if sweep.search == "optuna" else 1,
            max_concurrent_trials=sweep.max_concurrent,
            trial_dirname_creator=_dirname,
            reuse_actors=True,  # the next trial finds everything imported
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(asked.out),
            callbacks=[view, *_trackers(asked)],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=TRIAL_ATTEMPTS - 1),
        ),
    )


def run_listed(config: dict[str, Any], shared: Shared) -> None:
    """`run_trial` for a trial of a list."""
    run_trial(config["trial"], shared)


def _dirname(trial: Any) -> str:
    listed = trial.config.get("trial")
    return f"{trial.trial_id}" if listed is None else f"{listed['name'].split(',')[0]}_{trial.trial_id}"


@dataclass(frozen=True)
class _Resources:
    """A trial's placement group, from its config."""

    shared: Shared

    def __call__(self, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        point = config.get("trial", config)
        values = (
            point["values"] if "values" in point else {k: v for k, v in point.items() if k != TRIAL_INDEX} | {"seed": 0}
        )
        found = self.shared.config(values)
        clients = (
            len(prepare(found, (1e9, 1e9)).data.clients)
            if found.engine == "ray" and found.worker.count is None and found.worker.gpus
            else 1
        )
        return bundles(found, clients, self.shared.gpus_there).factory()


@dataclass(frozen=True)
class _Ended:
    """A trial that had ended before the sweep was resumed, as a scheduler knows it."""

    trial_id: str


class _Lasting:
    """A scheduler that outlives its sweep: it writes down whom it stops, and after a resume it knows what the trials that had ended told
    (Tune itself keeps nothing of a scheduler). Trials that go on tell their earlier rounds again themselves."""

    out: Path
    objective: str

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        taken = super().set_search_properties(metric, mode, **spec)
        for folder in sorted(
            p
            for p in (self.out / "trials").glob("*/")
            if (p / "summary.json").exists() or p.with_name(f"{p.name}.stopped").exists()
        ):
            for record in read_rounds(folder):
                if record["metrics"] is not None:
                    self.remember(
                        _Ended(folder.name), {"round": record["round"], "objective": record["metrics"][self.objective]}
                    )
        return taken

    def remember(self, trial: _Ended, result: dict[str, Any]) -> None:
        raise NotImplementedError

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            listed = trial.config.get("trial", {}).get("name")
            found = (
                [listed]
                if listed
                else [
                    p.stem
                    for p in (self.out / "trials").glob(f"{trial.trial_id},*.json")
                    if not p.name.endswith(".failed.json")
                ]
            )
            for name in found:
                if not (
                    self.out / "trials" / name / "summary.json"
                ).exists():  # at its last round it was not stopped, it was done
                    (self.out / "trials" / f"{name}.stopped").touch()
        return decision


class _Asha(_Lasting, AsyncHyperBandScheduler):
    def remember(self, trial: _Ended, result: dict[str, Any]) -> None:
        self._brackets[0].on_result(trial, result["round"], self._metric_op * result["objective"])


class _Median(_Lasting, MedianStoppingRule):
    def remember(self, trial: _Ended, result: dict[str, Any]) -> None:
        self._results[trial].append(result)


def _scheduler(sweep: Sweep, rounds: int, out: Path, objective: str) -> TrialScheduler:
    if sweep.stop == "asha" and rounds > sweep.grace:
        made: Any = _Asha(time_attr="round", max_t=rounds, grace_period=sweep.grace, reduction_factor=sweep.reduction)
    elif sweep.stop == "median":
        made = _Median(time_attr="round", grace_period=sweep.grace, min_samples_required=3)
    else:
        return FIFOScheduler()
    made.out, made.objective = out, objective
    return made


def _searcher(sweep: Sweep, mode: str) -> Any:
    if sweep.search != "optuna":
        return None
    try:
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(metric="objective", mode=mode, seed=0)
    except (ImportError, AssertionError) as error:
        raise ConfigError("search='optuna' needs Optuna: pip install 'fedray[optuna]'") from error
    return Repeater(search, repeat=len(sweep.seeds)) if len(sweep.seeds) > 1 else search


def _trackers(asked: Asked) -> list[tune.Callback]:
    found: list[tune.Callback] = []
    for name in asked.trackers:
        try:
            if name == "mlflow":
                import mlflow  # noqa: F401
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{asked.out / 'mlflow.db'}"
                found.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name=asked.out.name))
            else:
                import wandb  # noqa: F401
                from ray.air.integrations.wandb import WandbLoggerCallback

                found.append(
                    WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "fedray"), group=asked.out.name)
                )
        except ImportError as error:
            raise ConfigError(f"--track {name} needs it: pip install 'fedray[track]'") from error
    return found


def _clean_up(out: Path, whole: bool) -> None:
    """On every machine: remove what the trials shared, and, when the whole sweep is over, the noise keys of runs that a scheduler ended, so that
    nobody takes their noise away. A sweep that was stopped needs them to go on with the same noise."""
    keys = []
    for folder in (p for p in (out / "trials").iterdir() if p.is_dir()) if whole and (out / "trials").is_dir() else []:
        ledger = Ledger.load(folder / "checkpoint" / "ledger.json")
        if ledger is not None and not (folder / "summary.json").exists():
            keys.append((read_run_config(folder).privacy.key_dir, ledger.run))
    here = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    ray.get(
        [
            _remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=True)).remote(
                cache_folder(out), keys
            )
            for n in here
        ]
    )


@ray.remote(num_cpus=0)
def _remove(cache: Path, keys: list[tuple[str | None, str]]) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    for folder, run in keys:
        KeyStore(folder).forget_run(run)
