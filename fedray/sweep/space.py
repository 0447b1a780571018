"""A space: the Python file in which a person says what to try, and its points."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Sampler
from ray.tune.search.variant_generator import generate_variants

from fedray.config.read import known_keys
from fedray.errors import ConfigError, FedrayError, nearest
from fedray.privacy.selection import STOPPING

SEARCHES, STOPS = ("grid", "random", "optuna"), ("asha", "median", "none")


@dataclass(frozen=True)
class Sweep:
    """What to try. `space`: by config key (or any name, for several keys at once: the values are then mappings)
    Tune's `grid_search`, `choice`, `loguniform`, ...; the key `entry` takes `[ADAPTER+]METHOD[@RANK]`. `base`: config
    keys that all trials share.

    `samples`: how many draws (of random and optuna; grids are crossed with each). `seeds`: every trial is run with
    each. `objective`: a metric of the task (default: the one in `summary.json`). `stop`: asha, median or none, from
    round `grace` on; `reduction`: of asha. `random_stopping`: geometric or poisson: the number of draws is secret and
    random, `samples` on average, and the privacy of the best alone is told too. Raises ConfigError for what is no
    sweep.
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

    def __post_init__(self) -> None:
        _check_choice("search", self.search, SEARCHES)
        _check_choice("stop", self.stop, STOPS)
        _check_numbers(self)
        _check_search(self)
        if self.random_stopping is not None:
            _check_random_stopping(self)

    @property
    def adaptive(self) -> bool:
        """Whether the search chooses its trials one after the other, so that they are not known beforehand."""
        return self.search == "optuna"


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} '{value}' of the sweep is not known: choose {', '.join(allowed)}")


def _check_numbers(sweep: Sweep) -> None:
    if not sweep.space:
        raise ConfigError("the sweep's space is empty: give at least one key something to choose from")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError(f"the sweep's seeds {tuple(sweep.seeds)} must be different numbers, one or more")
    if min(sweep.samples, sweep.grace, sweep.max_concurrent or 1) < 1 or sweep.reduction <= 1:
        raise ConfigError("samples, grace and max_concurrent of a sweep are at least 1, and reduction is above 1")


def _grids(sweep: Sweep) -> list[str]:
    return [key for key, axis in sweep.space.items() if isinstance(axis, dict) and "grid_search" in axis]


def _check_search(sweep: Sweep) -> None:
    domains = [key for key, axis in sweep.space.items() if isinstance(axis, Domain)]
    if sweep.search == "grid" and domains:
        raise ConfigError(
            f"'{domains[0]}' draws its values, which search grid does not do: "
            "give tune.grid_search([...]), or search='random'"
        )
    if sweep.adaptive:
        _check_adaptive(sweep)


def _check_adaptive(sweep: Sweep) -> None:
    if grids := _grids(sweep):
        raise ConfigError(f"'{grids[0]}' is a grid, which optuna does not take: give tune.choice([...])")
    if len(sweep.seeds) > 1 and sweep.stop != "none":
        raise ConfigError(
            "optuna learns from the mean over the seeds, which a scheduler that stops some of them would spoil: "
            "stop='none', or one seed"
        )


def _check_random_stopping(sweep: Sweep) -> None:
    if sweep.random_stopping not in STOPPING:
        raise ConfigError(f"random_stopping '{sweep.random_stopping}' is not known: choose {', '.join(STOPPING)}")
    if sweep.search != "random" or sweep.stop != "none" or len(sweep.seeds) > 1 or _grids(sweep):
        raise ConfigError(
            "random_stopping holds for runs that are drawn alike and know nothing of each other: search='random', "
            "stop='none', one seed, and no grid_search"
        )


def in_words(value: Any) -> Any:
    """A sweep, or what is in it, as plain values that are the same whenever the same space file is read."""
    if isinstance(value, Sweep):  # how many run at a time is no part of what is asked
        return {k: in_words(v) for k, v in vars(value).items() if k != "max_concurrent"}
    if isinstance(value, Mapping):
        return {str(k): in_words(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_words(v) for v in value]
    return _leaf_in_words(value)


def _leaf_in_words(value: Any) -> Any:
    if isinstance(value, (Domain, Sampler)):
        return [type(value).__qualname__, {k: in_words(v) for k, v in sorted(vars(value).items())}]
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- the file ---------------------------------------------------------------------------------------------------------


def load_space(path: str) -> Sweep:
    """The SWEEP of a space file. Raises ConfigError for a file that cannot be read or holds none."""
    sweep = getattr(_module(path), "SWEEP", None)
    if not isinstance(sweep, Sweep):
        raise ConfigError(
            f"space '{path}' holds no SWEEP: write SWEEP = Sweep(space={{...}}), with `from fedray.sweep import Sweep`"
        )
    return sweep


def _module(path: str) -> ModuleType:
    """The space file, run."""
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
        raise ConfigError(f"space '{path}' cannot be read: {_fault(error, file)}") from error
    return module


def _fault(error: Exception, file: Path) -> str:
    """What is wrong with a space file, and on which of its lines."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{type(error).__name__}: {error} (line {lines[-1] if lines else None})"


# --- its points -------------------------------------------------------------------------------------------------------


def settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the space as config keys (and `entry`): values that are mappings give several keys. Raises
    ConfigError for unknown keys."""
    keys: dict[str, Any] = {}
    for key, value in point.items():
        keys |= value if isinstance(value, Mapping) else {key: value}
    _check_keys(keys)
    return keys


def _check_keys(keys: Iterable[str]) -> None:
    known = {*known_keys(), "entry"}
    for key in keys:
        if key not in known and not key.startswith("clients."):
            raise ConfigError(f"the space's key '{key}' is not known{nearest(key, known)}")
        if key.startswith("output.") or key == "seed":
            raise ConfigError(f"the space may not set {key}: the sweep does (seeds=..., --out)")


def points(sweep: Sweep, draws: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The points of a space that is known beforehand (grid, random), without the seeds."""
    state = np.random.RandomState(seed)
    for _ in range(draws if sweep.search == "random" else 1):
        for _, values in generate_variants(dict(sweep.space), random_state=state):
            yield dict(values)


def values_of(axis: Any) -> Sequence[Any]:
    """What an axis of a space takes its values from, where that is a list."""
    if isinstance(axis, Categorical):
        return axis.categories
    return axis["grid_search"] if isinstance(axis, dict) and "grid_search" in axis else [axis]
