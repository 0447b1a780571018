"""The picture of a comparison: the final metric against all bytes of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def picture(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: final metric (mean, and smallest to largest over the seeds) against all bytes of a run, both
    directions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    order = sorted(rows, key=lambda row: (_bytes(row), row["mean"]))
    places = _places(order)
    for i, row in enumerate(order):
        low, high = min(row["finals"]), max(row["finals"])
        error = [[row["mean"] - low], [high - row["mean"]]]
        place = places[row["method"]]
        axes.errorbar(place, row["mean"], yerr=error, fmt="o", capsize=3, color=f"C{i % 10}", alpha=0.8)
    _label_axes(axes, rows[0])
    figure.canvas.draw()
    _name_points(axes, order, places)
    return figure


def _bytes(row: Row) -> float:
    return row["bytes_up"] + row["bytes_down"]


def _places(order: Sequence[Row]) -> dict[str, float]:
    """Where each method stands, in MiB: those that move the same bytes side by side."""
    places: dict[str, float] = {}
    for row in order:
        x = _bytes(row) / 2**20
        while any(abs(math.log(x / other)) < 0.015 for other in places.values()):
            x *= 1.02
        places[row["method"]] = x
    return places


def _label_axes(axes: Any, row: Row) -> None:
    """`row`: any of them; all have one metric."""
    from matplotlib import ticker

    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.25)  # room for the labels of the last points
    axes.set_xlabel("MiB moved in the whole run, all clients, up and down (start included)")
    better = "" if row.get("higher_is_better", True) else " (lower is better)"
    axes.set_ylabel(f"final {row['metric'].replace('_', ' ')}{better}: mean, smallest to largest")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _name_points(axes: Any, order: Sequence[Row], places: Mapping[str, float]) -> None:
    """A label at each point, moved away from it until it is clear of every error bar and every other label."""
    from matplotlib.text import Text

    figure = axes.figure
    taken = [_bar(axes, row, places[row["method"]]) for row in order]
    for i, row in enumerate(order):
        label = axes.annotate(
            row["method"],
            (places[row["method"]], row["mean"]),
            (8, 0),
            textcoords="offset points",
            color=f"C{i % 10}",
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": f"C{i % 10}"},
        )
        for offset in _offsets():
            label.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # the words alone, without the line to the point
            inside = axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.set_position((8, offset))
        taken.append(box)


def _offsets() -> Iterator[int]:
    """How far a label moves up and down, in turn, in points."""
    for step in range(1, 120):
        yield 3 * ((step + 1) // 2) * (1 if step % 2 else -1)


def _bar(axes: Any, row: Row, place: float) -> Any:
    """The box of a point with its error bar, in pixels."""
    from matplotlib.transforms import Bbox

    low, high = axes.transData.transform([(place, min(row["finals"])), (place, max(row["finals"]))])
    return Bbox([[low[0] - 3, low[1]], [high[0] + 3, high[1]]])
