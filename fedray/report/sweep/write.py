"""Everything that is written of a sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from fedray.config.sections import Config, OutputSection
from fedray.report.sweep.effects import effects, pareto, shares, tied
from fedray.report.sweep.pictures import draw_pictures
from fedray.report.sweep.privacy import privacy_of
from fedray.report.sweep.tables import best_of, knobs_of, points_table, trials_table
from fedray.sweep.folder import SweepFolder


def write_sweep(out: Path) -> dict[str, Any]:
    """Write `trials.csv|parquet`, `points.csv`, `effects.csv`, `best.yaml`, `summary.json` and the pictures; returns
    the summary.

    Raises ConfigError for a folder that holds no sweep.
    """
    out = Path(out)
    kept = SweepFolder(out).settings
    maximise = kept["mode"] == "max"
    trials = trials_table(out)
    points = points_table(trials, trials["seed"].nunique(), single=bool(kept["random_stopping"]))
    for cost in ("bytes", "epsilon"):
        points[f"pareto_{cost}"] = pareto(points, cost, maximise)
    fixed = tied(kept)
    knobs = [knob for knob in knobs_of(trials) if knob not in fixed]
    mattered = effects(points, knobs)
    trials.to_csv(out / "trials.csv", index=False)
    _one_type_a_column(trials).to_parquet(out / "trials.parquet", index=False)
    points.to_csv(out / "points.csv", index=False)
    mattered.to_csv(out / "effects.csv", index=False)
    best = best_of(points, maximise)
    summary = {
        "space": kept["space"],
        "objective": kept["objective"],
        "mode": kept["mode"],
        "trials": trials["status"].value_counts().to_dict(),
        "left_out": kept["left_out"],
        "best": None if best is None else _write_best(out, best),
        "knobs": shares(mattered),
        "privacy": privacy_of(out),
    }
    draw_pictures(out, points, mattered, knobs, kept)
    (out / "summary.json").write_text(json.dumps(_no_infinity(summary), indent=2))
    return summary


def _write_best(out: Path, best: pd.Series) -> dict[str, Any]:
    """Write the best point's config; returns what the summary says of it."""
    trial = SweepFolder(out).trial(best["trial"])
    (out / "best.yaml").write_text(reproducible(trial.config).to_yaml())
    return {
        "trial": trial.name,
        "mean": best["mean"],
        "seeds": int(best["seeds"]),
        "final": trial.summary["final"],
    }


def reproducible(config: Config) -> Config:
    """The config of a trial as `fedray run --config` makes it again: without its run directory and what the sweep
    shared."""
    worker = config.worker.model_copy(update={"cache": None})
    return config.model_copy(update={"output": OutputSection(), "worker": worker})


def _one_type_a_column(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of mixed values as words, which parquet asks for."""
    mixed = [
        c for c in table.columns if table[c].map(type).nunique() > 1 and not pd.api.types.is_numeric_dtype(table[c])
    ]
    return table.assign(**{c: table[c].map(lambda v: None if v is None else str(v)) for c in mixed})


def _no_infinity(value: Any) -> Any:
    """JSON has no infinity: it becomes the word."""
    if isinstance(value, dict):
        return {k: _no_infinity(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_infinity(v) for v in value]
    return "infinite" if isinstance(value, float) and math.isinf(value) else value
