"""What a sweep's points say: which of them nothing beats, and which knob mattered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedray.report.sweep.tables import worded
from fedray.sweep.space import settings


def tied(kept: dict[str, Any]) -> set[str]:
    """Keys that have no say of their own: of the keys that a space varies together, those that the ones before them
    decide, such as a learning rate of each method's own. `kept`: `sweep.json`."""
    points = [trial["values"] for trial in kept["trials"]]
    axes = {key for point in points for key, value in point.items() if isinstance(value, dict)}
    decided: set[str] = set()
    for axis in axes:
        decided |= _decided(pd.DataFrame([settings({axis: point[axis]}) for point in points if axis in point]).map(str))
    return decided


def _decided(table: pd.DataFrame) -> set[str]:
    """Columns that take one value only for each combination of the free ones before them."""
    free: list[str] = []
    decided: set[str] = set()
    for key in table.columns:
        if free and (table.groupby(free)[key].nunique() == 1).all():
            decided.add(key)
        else:
            free.append(key)
    return decided


def pareto(points: pd.DataFrame, cost: str, maximise: bool) -> pd.Series:
    """True for points that no other beats in the objective without a higher cost, or in cost without a worse
    objective."""
    value = points["mean"] if maximise else -points["mean"]
    worse = [
        ((value >= v) & (points[cost] <= c) & ((value > v) | (points[cost] < c))).any()
        for v, c in zip(value, points[cost], strict=True)
    ]
    return ~pd.Series(worse, index=points.index, dtype=bool)


def effects(points: pd.DataFrame, knobs: Sequence[str]) -> pd.DataFrame:
    """The mean objective for each value of each knob, over all other knobs, and the share of the points' variance
    that the knob alone accounts for (eta squared: the sum of squares between its values over that of all points)."""
    rows, total = [], ((points["mean"] - points["mean"].mean()) ** 2).sum()
    for knob in knobs:
        groups = points.groupby(worded(points[knob]), sort=False)["mean"]
        between = sum(len(group) * (group.mean() - points["mean"].mean()) ** 2 for _, group in groups)
        share = between / total if total > 0 else 0.0
        rows += [
            {"knob": knob, "value": value, "mean": group.mean(), "points": len(group), "variance_share": share}
            for value, group in groups
        ]
    return pd.DataFrame(rows, columns=["knob", "value", "mean", "points", "variance_share"]).sort_values(
        ["variance_share", "knob"], ascending=[False, True], kind="stable"
    )


def shares(table: pd.DataFrame) -> dict[str, float]:
    """The share of variance of each knob, of what `effects` gives."""
    if table.empty:
        return {}
    first = table.drop_duplicates("knob")
    return dict(zip(first["knob"], first["variance_share"], strict=True))
