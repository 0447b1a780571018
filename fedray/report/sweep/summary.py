"""A sweep's result, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from fedray.report.sweep.tables import POINT_COLUMNS
from fedray.report.words import size

_FRONTS = ("pareto_bytes", "pareto_epsilon")


def print_sweep(console: Console, out: Path, summary: dict[str, Any], rows: int = 12) -> None:
    """The best points, what mattered, what all trials together have told, and where everything is."""
    console.print(_points_table(pd.read_csv(out / "points.csv"), summary, rows))
    if summary["knobs"]:
        parts = ", ".join(f"{knob} {part:.0%}" for knob, part in summary["knobs"].items())
        console.print(f"what mattered: {parts} of the variance of finished points", soft_wrap=True)
    if privacy := summary["privacy"]:
        console.print(sweep_privacy(privacy), soft_wrap=True)
    if best := summary["best"]:
        console.print(
            f"best: {best['trial']}, {best['final']:.4f}; fedray run --config {out / 'best.yaml'} makes it again",
            soft_wrap=True,
        )
    console.print(
        f"written to {out}: trials.csv, trials.parquet, points.csv, effects.csv, summary.json, pictures", soft_wrap=True
    )


def _points_table(points: pd.DataFrame, summary: Mapping[str, Any], rows: int) -> Table:
    """The best `rows` of `points.csv`; lowest and highest where there are several seeds, epsilon where a run is
    private."""
    knobs = [column for column in points.columns if column not in (*POINT_COLUMNS, *_FRONTS)]
    several = ["lowest", "highest"] if (points["seeds"] > 1).any() else []
    private = ["epsilon"] if points["epsilon"].map(math.isfinite).any() else []
    counts = ", ".join(f"{count} {status}" for status, count in summary["trials"].items())
    title = f"{summary['objective'].replace('_', ' ')}, best first ({counts})"
    table = Table(title=title, title_justify="left")
    columns = [*knobs, "mean", *several, "moved", *private, "front"]
    words = {*knobs, "front"}
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right")
    order = points.sort_values("mean", ascending=summary["mode"] != "max", kind="stable").head(rows)
    for _, row in order.iterrows():
        cells = _cells(row, knobs, bool(private))
        table.add_row(*(cells[column] for column in columns))
    return table


def _cells(row: pd.Series, knobs: Sequence[str], private: bool) -> dict[str, str]:
    """A point by column, in words."""
    fronts = {"bytes": row["pareto_bytes"], "epsilon": private and row["pareto_epsilon"]}
    return {
        **{knob: _knob(row[knob]) for knob in knobs},
        **{column: f"{row[column]:.4f}" for column in ("mean", "lowest", "highest")},
        "moved": size(row["bytes"]),
        "epsilon": "none" if math.isinf(row["epsilon"]) else f"{row['epsilon']:.3g}",
        "front": ", ".join(name for name, there in fronts.items() if there),
    }


def _knob(value: Any) -> str:
    """A knob's value as a table of points has it: none is a gap in the file."""
    if value != value:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_privacy(privacy: Mapping[str, Any]) -> str:
    """What all trials together have told, in a sentence that a privacy officer can use."""
    if lost := privacy.get("lost"):
        return (
            f"privacy: not known, since trial '{lost[0]}' has lost its checkpoint/ledger.json, which says what it has "
            "told of the data; bring the file back, and call fedray report again"
        )
    if privacy["void"]:
        return "privacy: none, since the noise keys were fixed for a test"
    if privacy["without_privacy"]:
        return (
            f"privacy: {privacy['without_privacy']} of {privacy['trials']} trials ran without it on the same data, "
            "so nothing bounds what the sweep as a whole has told"
        )
    if not privacy["composed"]:
        return "privacy: nothing has been released yet"
    return _spent(privacy)


def _spent(privacy: Mapping[str, Any]) -> str:
    client, epsilon = max(privacy["composed"].items(), key=lambda item: item[1])
    whose = f"each {privacy['unit']}'s" if len(privacy["composed"]) == 1 else f"{client}'s"
    text = (
        f"privacy: the {privacy['trials']} trials together have spent epsilon {epsilon:.4g} "
        f"at delta {privacy['delta']:g} of {whose} data"
    )
    if privacy["budget"] is not None:
        text += f", of a budget of {privacy['budget']:g}"
    if "best_alone" in privacy:
        text += (
            "; the best alone, if no other trial and not their number is ever shown: "
            f"{privacy['best_alone']:.4g} (Papernot and Steinke, 2022)"
        )
    return text
