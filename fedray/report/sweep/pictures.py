"""The pictures of a sweep: the objective against what it costs, and what each knob did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedray.report.sweep.tables import POINT_COLUMNS, worded
from fedray.report.words import title

_MARKERS = "osD^vP*X<>"


def draw_pictures(
    out: Path, points: pd.DataFrame, mattered: pd.DataFrame, knobs: Sequence[str], kept: Mapping[str, Any]
) -> None:
    """Write `pareto_bytes.png`, `pareto_epsilon.png` (where a point is private) and `effects.png`; nothing without a
    point. `mattered`: what `effects` gives; `kept`: `sweep.json`."""
    if points.empty:
        return
    title = _title(kept)
    _write(Pareto(points, knobs, title, "bytes").draw(), out / "pareto_bytes.png")
    if points["epsilon"].map(math.isfinite).any():
        _write(Pareto(points, knobs, title, "epsilon").draw(), out / "pareto_epsilon.png")
    _write(effects_picture(points, mattered, title), out / "effects.png")


def _write(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _pyplot() -> Any:
    """pyplot, which draws into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _title(kept: Mapping[str, Any]) -> str:
    better = "higher" if kept["mode"] == "max" else "lower"
    return f"{title(kept['objective'])} ({better} is better)"


def _colouring_knob(points: pd.DataFrame) -> str:
    """The knob that colours the points: the method where it varies, else the first."""
    usual = next((knob for knob in ("entry", "method.name", "adapter.kind") if knob in points.columns), None)
    return usual or next(column for column in points.columns if column not in POINT_COLUMNS)


# --- the objective against a cost -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pareto:
    """Objective against a cost (`bytes` or `epsilon`): one colour and mark a method, bars from the lowest to the
    highest seed, the front as a line; the other knobs' values are written over the front's points alone. Each epsilon
    has its own place, methods side by side in it."""

    points: pd.DataFrame
    knobs: Sequence[str]
    title: str
    cost: str

    def draw(self) -> Any:
        """A matplotlib figure."""
        figure, axes = _pyplot().subplots(figsize=(10, 5.8), layout="constrained")
        points, knob = self.points, _colouring_knob(self.points)
        methods = worded(points[knob])
        names = list(dict.fromkeys(methods))
        x = points["bytes"] / 2**20 if self.cost == "bytes" else _side_by_side(points["epsilon"], methods, names)
        for i, name in enumerate(names):
            _plot_method(axes, x, points[methods == name], name, i)
        front = points[points[f"pareto_{self.cost}"]].sort_values([self.cost, "mean"])
        axes.plot(x[front.index], front["mean"], color="0.35", lw=1, zorder=0, label="Pareto front")
        self._label_axes(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))  # room for the names
        _name_front(axes, x, points, front, self._named_knobs(knob))
        axes.legend(title=knob, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure

    def _named_knobs(self, colouring: str) -> list[str]:
        """The knobs that neither colour nor place say."""
        said = {colouring} if self.cost == "bytes" else {colouring, "privacy.epsilon"}
        return [knob for knob in self.knobs if knob not in said]

    def _label_axes(self, axes: Any) -> None:
        if self.cost == "bytes":
            _label_bytes(axes)
        else:
            _label_epsilons(axes, self.points["epsilon"])
        axes.set_ylabel(self.title)
        axes.grid(alpha=0.3, axis="both" if self.cost == "bytes" else "y")


def _plot_method(axes: Any, x: pd.Series, points: pd.DataFrame, name: str, turn: int) -> None:
    axes.errorbar(
        x[points.index],
        points["mean"],
        yerr=[points["mean"] - points["lowest"], points["highest"] - points["mean"]],
        fmt=_MARKERS[turn % len(_MARKERS)],
        color=f"C{turn % 10}",
        capsize=2,
        ms=5,
        lw=1,
        alpha=0.75,
        label=name,
    )


def _label_bytes(axes: Any) -> None:
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.set_xlabel("MiB moved in the whole run, all clients, up and down")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _label_epsilons(axes: Any, epsilons: pd.Series) -> None:
    spent = sorted(set(_rounded(epsilons)))
    axes.set_xticks(range(len(spent)), ["none" if math.isinf(e) else f"{e:g}" for e in spent])
    axes.set_xlim(-0.6, len(spent) - 0.4)
    axes.set_xlabel("epsilon of one run (largest over the clients)")
    for edge in range(1, len(spent)):
        axes.axvline(edge - 0.5, color="0.9", lw=0.8, zorder=0)


def _rounded(epsilons: pd.Series) -> pd.Series:
    """What runs of one budget have spent differs in the third digit."""
    return epsilons.map(lambda e: e if math.isinf(e) else float(f"{e:.2g}"))


def _side_by_side(epsilons: pd.Series, methods: pd.Series, names: Sequence[str]) -> pd.Series:
    """Positions: the rank of the epsilon, moved by the method, and a little more by the turn of the point in its
    group."""
    spent = sorted(set(_rounded(epsilons)))
    place = _rounded(epsilons).map(spent.index)
    width = 0.8 / len(names)
    turn = epsilons.groupby([place, methods]).cumcount()
    most = max(1, turn.max())
    return place - 0.4 + width * (methods.map(list(names).index) + 0.2 + 0.6 * turn / most)


def _name_front(axes: Any, x: pd.Series, points: pd.DataFrame, front: pd.DataFrame, knobs: Sequence[str]) -> None:
    """The other knobs' values over the bars of the front's points, moved up until they cover no mark and no other
    label; a thin line leads from a label that had to move."""
    if not knobs:
        return
    axes.figure.canvas.draw()
    taken = [_mark(axes, place, row) for place, (_, row) in zip(x, points.iterrows(), strict=True)]
    for place, (_, row) in zip(x[front.index], front.iterrows(), strict=True):
        values = worded(row[list(knobs)])
        words = ", ".join(f"{knob.rsplit('.', 1)[-1]}={value}" for knob, value in zip(knobs, values, strict=True))
        note = axes.annotate(
            words,
            (place, row["highest"]),
            (0, 8),
            textcoords="offset points",
            fontsize=7.5,
            color="0.2",
            ha="center",
            va="bottom",
            # The front's line may pass behind it.
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        taken.append(_settle(axes, note, taken))


def _mark(axes: Any, x: float, row: pd.Series) -> Any:
    """The box of a point's mark and bar, in pixels."""
    from matplotlib.transforms import Bbox

    low, high = (axes.transData.transform((x, row[end])) for end in ("lowest", "highest"))
    return Bbox([[low[0] - 7, low[1] - 7], [high[0] + 7, high[1] + 7]])


def _settle(axes: Any, note: Any, taken: Sequence[Any]) -> Any:
    """Move a label up, and away from the sides, until it covers nothing; its box."""
    from matplotlib.text import Text

    for step in range(40):
        note.set_position((0, 8 + 4 * step))
        note.update_positions(axes.figure.canvas.get_renderer())
        box = Text.get_window_extent(note)
        if box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1:
            note.set_ha("left" if box.x0 < axes.bbox.x0 else "right")
            box = Text.get_window_extent(note)
        if not any(box.overlaps(other) for other in taken):
            break
    return box


# --- what each knob did -----------------------------------------------------------------------------------------------


def effects_picture(points: pd.DataFrame, mattered: pd.DataFrame, title: str) -> Any:
    """One panel a knob: the mean objective of each value, over the points behind it, and the share of variance in the
    title. A matplotlib figure."""
    order = list(dict.fromkeys(mattered["knob"]))
    columns = min(3, len(order))
    lines = math.ceil(len(order) / columns)
    size = (4.2 * columns, 3.6 * lines)
    figure, panels = _pyplot().subplots(lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for panel in panels.flat[len(order) :]:
        panel.set_axis_off()
    for panel, knob in zip(panels.flat, order, strict=False):
        _draw_panel(panel, points, mattered[mattered["knob"] == knob], knob)
    for row in panels:
        row[0].set_ylabel(title, fontsize=9)
    return figure


def _draw_panel(panel: Any, points: pd.DataFrame, effect: pd.DataFrame, knob: str) -> None:
    values, of_each = list(effect["value"]), worded(points[knob])
    for place, value in enumerate(values):
        means = points[of_each == value]["mean"]
        panel.plot([place] * len(means), means, "o", color="C0", alpha=0.3, ms=4)
    # A line only between values that have an order.
    style = "-D" if pd.api.types.is_numeric_dtype(points[knob]) else "D"
    panel.plot(range(len(values)), effect["mean"], style, color="C3", ms=5)
    crowded = sum(map(len, values)) > 28
    rotation, align = (35, "right") if crowded else (0, "center")
    panel.set_xticks(range(len(values)), values, rotation=rotation, ha=align, fontsize=8)
    panel.set_title(f"{knob}: {effect['variance_share'].iloc[0]:.0%} of the variance", fontsize=9)
    panel.margins(x=0.15)
    panel.grid(alpha=0.3)
