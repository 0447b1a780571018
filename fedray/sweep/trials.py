"""Which trials a space means: their names, values and configs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain

from fedray.compare.entries import Entry
from fedray.config.read import merged
from fedray.config.sections import Config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.methods import why_not
from fedray.sweep.space import Sweep, points, settings

#: What decides a trial's privacy, data or resources: an adaptive search may only choose these from lists.
SHAPING = (
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
#: Keys of the federation section that shape nothing of it.
FREE = ("federation.lr", "federation.weight_decay", "federation.proximal", "federation.warmup")


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its name, what sets it apart (as in the space, seed included), and its config."""

    name: str
    values: dict[str, Any]
    config: Config


def plain(value: Any) -> Any:
    """A value of a space as YAML has it: numpy's numbers as Python's; the words null and none unset a key, as on the
    command line."""
    if isinstance(value, np.generic):
        return value.item()
    return None if value in ("null", "none", "None") else value


def as_word(value: Any) -> str:
    """A value as a name or a table shows it, and as the command line would take it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(plain(value))


def trial_config(base: Config, values: Mapping[str, Any]) -> Config:
    """The config of one point of the space. `base`: what all trials share. Raises ConfigError."""
    keys = settings(without_seed(values))
    entry = keys.pop("entry", None)
    if entry is not None:
        keys = _of_entry(str(entry), base, keys) | keys
    return merged(base, {key: plain(value) for key, value in keys.items()} | {"seed": values.get("seed", 0)})


def _of_entry(text: str, base: Config, others: Mapping[str, Any]) -> dict[str, Any]:
    """The config keys that an entry stands for. `others`: what else the point sets."""
    adapter = base.adapter
    entry = Entry.parse(text, adapter.kind if "kind" in adapter.model_fields_set else None)
    if entry.rank and "adapter.rank" in others:
        raise ConfigError(f"the space gives '{text}' a rank and varies adapter.rank: leave one of them out")
    return entry.keys


def without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values as the point of the space that they came from."""
    return {key: value for key, value in values.items() if key != "seed"}


def trials_of(sweep: Sweep, base: Config, draws: int, seed: int = 0) -> tuple[list[Trial], list[str]]:
    """All trials of a grid or of random draws, and for each combination that no method admits a line of why it is
    left out.

    Raises ConfigError for a config that is bad otherwise.
    """
    trials: list[Trial] = []
    left_out: list[str] = []
    seen: set[str] = set()
    for point in points(sweep, draws, seed):
        if reason := _unsound(point):
            left_out.append(f"{label(point)}: {reason}")
            continue
        for run_seed in sweep.seeds:
            values = {**point, "seed": run_seed}
            config = trial_config(base, values)
            key = config.model_dump_json()
            if key in seen and sweep.random_stopping is None:  # the same run gives the same numbers
                continue
            seen.add(key)
            trials.append(Trial(f"{len(trials):03d},{label(point)},seed={run_seed}", values, config))
    if not trials:
        raise ConfigError(f"no trial is left of the space: {left_out[0]}")
    return trials, left_out


def _unsound(point: Mapping[str, Any]) -> str | None:
    """Why the method of a point does not fit its adapter, where the space crosses the two; None where it fits."""
    keys = settings(point)
    if "entry" in keys or "method.name" not in keys or "adapter.kind" not in keys:
        return None  # what a space names as a whole must be sound
    return why_not(keys["method.name"], keys["adapter.kind"])


def label(point: Mapping[str, Any]) -> str:
    """A point in words that a file's name may hold: `entry` bare, of other keys the last part of the name."""
    parts = []
    for key, value in settings(point).items():
        text = as_word(f"{value:.4g}" if isinstance(value, float) else value)
        parts.append(text if key in ("entry", "method.name") else f"{key.rsplit('.', 1)[-1]}={text}")
    return re.sub(r"[^\w.,=@+-]", "-", ",".join(parts))[:120]


def corners(sweep: Sweep, base: Config) -> list[Trial]:
    """Trials that stand for all that an adaptive search may try: every combination of what shapes privacy, data or
    resources, other keys at one value. Raises ConfigError where such a key is drawn from a range, which cannot be
    checked beforehand."""
    axes = {key: _to_check(key, axis) for key, axis in sweep.space.items()}
    trials = []
    for combination in itertools.product(*axes.values()):
        point = dict(zip(axes, combination, strict=True))
        values = {**point, "seed": sweep.seeds[0]}
        trials.append(Trial(label(point), values, trial_config(base, values)))
    return trials


def _to_check(key: str, axis: Any) -> list[Any]:
    """The values of an axis that stand for all of them."""
    if isinstance(axis, Categorical):
        return list(axis.categories)
    if not isinstance(axis, Domain):
        return [axis]
    if key.startswith(SHAPING) and key not in FREE:
        raise ConfigError(
            f"'{key}' decides what a trial costs or spends, so that optuna may only choose it from a list: "
            "give tune.choice([...])"
        )
    return [axis.sample(random_state=np.random.RandomState(0))]


def objective_of(sweep: Sweep, config: Config) -> tuple[str, str]:
    """(name, max or min) of what is sought. Raises ConfigError for what is no metric of the task."""
    task = TASKS[config.model.task]
    name = sweep.objective or task.metric
    if name not in task.reported:
        raise ConfigError(f"objective '{name}' is no metric of this task: choose {', '.join(task.reported)}")
    return name, "max" if task.reported[name] else "min"
