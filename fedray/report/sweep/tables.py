"""The tables of a sweep: a row for each trial, and a row for each point of the space over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedray.sweep.folder import SweepFolder, TrialFolder
from fedray.sweep.space import settings
from fedray.sweep.trials import without_seed

#: Beside the knobs, the columns of the table of trials.
COLUMNS = (
    "trial",
    "status",
    "seed",
    "rounds",
    "objective",
    "bytes",
    "epsilon",
    "delta",
    "exactness",
    "aggregation_error",
    "trainable_params",
    "seconds",
)
#: Beside the knobs, the columns of the table of points.
POINT_COLUMNS = ("mean", "lowest", "highest", "seeds", "bytes", "epsilon", "seconds", "trial")


def trials_table(out: Path) -> pd.DataFrame:
    """One row a trial: the space's keys, then COLUMNS. status: finished, stopped (by the scheduler), failed,
    unfinished or unstarted; bytes of all clients both ways, of finished trials start included; objective of the last
    evaluated round. Raises ConfigError for a folder that holds no sweep."""
    folder = SweepFolder(out)
    kept = folder.settings
    listed = {trial["name"]: trial["values"] for trial in kept["trials"]}
    begun = {trial.name: trial.values for trial in folder.planned()}
    rows = [
        {**_knobs(values), **_outcome(folder.trial(name), kept["objective"]), "trial": name, "seed": values["seed"]}
        for name, values in sorted((listed | begun).items())
    ]
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    knobs = [column for column in table.columns if column not in COLUMNS]
    return table[[*knobs, *COLUMNS]]


def _knobs(values: dict[str, Any]) -> dict[str, Any]:
    """A trial's values by config key, a list as one word."""
    keys = settings(without_seed(values))
    return {key: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v for key, v in keys.items()}


def _outcome(trial: TrialFolder, objective: str) -> dict[str, Any]:
    """What COLUMNS say of one trial, as far as it has come."""
    records = trial.records
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS), "status": trial.status, "rounds": len(records)}
    if records:
        row |= _so_far(records, objective)
    if row["status"] == "finished":
        summary = trial.summary
        row["bytes"] = summary["bytes_up"] + summary["bytes_down"]
        row |= {key: summary[key] for key in ("epsilon", "delta", "trainable_params")}
    if row["epsilon"] is None and records and not records[-1]["epsilon"]:
        row["epsilon"] = math.inf  # no privacy: nothing bounds what it tells
    return row


def _so_far(records: Sequence[dict[str, Any]], objective: str) -> dict[str, Any]:
    """What the finished rounds say."""
    evaluated = [record for record in records if record["metrics"]]
    return {
        "objective": evaluated[-1]["metrics"].get(objective) if evaluated else None,
        "bytes": sum(record["bytes_up"] + record["bytes_down"] for record in records),
        "epsilon": max((records[-1]["epsilon"] or {}).values(), default=None),
        "exactness": _most(records, "exactness"),
        "aggregation_error": _most(records, "aggregation_error"),
        "seconds": sum(sum(record["seconds"].values()) for record in records),
    }


def _most(records: Sequence[dict[str, Any]], key: str) -> float | None:
    return max((record[key] for record in records if record[key] is not None), default=None)


def points_table(trials: pd.DataFrame, seeds: int, single: bool = False) -> pd.DataFrame:
    """One row a point of the space, over its seeds: mean, lowest, highest and number of the objective, mean bytes,
    largest epsilon. Only points whose every seed finished. `single`: each trial is a point of its own, as where only
    the best single run is shown."""
    knobs = [*knobs_of(trials), *(("trial",) if single else ())]
    done = trials[trials["status"] == "finished"]
    if done.empty:
        return pd.DataFrame(columns=[*knobs, *POINT_COLUMNS])
    grouped = done.groupby(knobs, dropna=False, sort=False)
    table = (
        grouped.agg(
            mean=("objective", "mean"),
            lowest=("objective", "min"),
            highest=("objective", "max"),
            seeds=("seed", "nunique"),
            bytes=("bytes", "mean"),
            epsilon=("epsilon", "max"),
            seconds=("seconds", "median"),
            name=("trial", "first"),
        )
        .reset_index()
        .drop(columns="trial", errors="ignore")
        .rename(columns={"name": "trial"})
    )
    return table[table["seeds"] == seeds].reset_index(drop=True)


def best_of(points: pd.DataFrame, maximise: bool) -> pd.Series | None:
    """The point with the best mean; of equals the one that moves less."""
    if points.empty:
        return None
    return points.sort_values(["mean", "bytes"], ascending=[not maximise, True], kind="stable").iloc[0]


def knobs_of(trials: pd.DataFrame) -> list[str]:
    """The keys of the space that take more than one value (all of them where there is one trial)."""
    knobs = [column for column in trials.columns if column not in COLUMNS]
    varied = [knob for knob in knobs if worded(trials[knob]).nunique() > 1]
    return varied or knobs


def worded(values: pd.Series) -> pd.Series:
    """A knob's values as words, so that none is a value too."""
    return values.map(_word)


def _word(value: Any) -> str:
    if value is None or value != value:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
