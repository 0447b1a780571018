"""What a sweep found: one tidy table, what cannot be improved without giving something up, which knob mattered, and pictures of each.

Everything is read from the run directories, so it can be made again at any time, of an unfinished sweep too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedray.config.sections import Config, OutputSection
from fedray.errors import ConfigError
from fedray.federation.results import read_rounds, read_run_config
from fedray.privacy.ledger import Ledger
from fedray.privacy.selection import ANY_CLIENT, best_alone, composed, dominating
from fedray.report.words import TITLES
from fedray.sweep import settings, told

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


def read_sweep_folder(out: Path) -> dict[str, Any]:
    """`sweep.json`. Raises ConfigError where there is none."""
    file = Path(out) / "sweep.json"
    if not file.is_file():
        raise ConfigError(f"'{out}' is no folder of a sweep: it holds no sweep.json")
    return json.loads(file.read_text())


def trials_table(out: Path) -> pd.DataFrame:
    """One row a trial: the space's keys, then COLUMNS. status: finished, stopped (by the scheduler), failed, unfinished or unstarted; bytes of
    all clients both ways, of finished trials start included; objective of the last evaluated round. Raises ConfigError as `read_sweep_folder`."""
    kept, rows = read_sweep_folder(out), []
    listed = {t["name"]: t["values"] for t in kept["trials"]}
    begun = (
        {
            p.stem: json.loads(p.read_text())["values"]
            for p in sorted((out / "trials").glob("*.json"))
            if not p.name.endswith(".failed.json")
        }
        if (out / "trials").is_dir()
        else {}
    )
    for name, values in sorted((listed | begun).items()):
        point = {k: v for k, v in values.items() if k != "seed"}
        knobs = {k: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in settings(point).items()}
        rows.append(
            {**knobs, **_outcome(out / "trials", name, kept["objective"]), "trial": name, "seed": values["seed"]}
        )
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    knobs = [c for c in table.columns if c not in COLUMNS]
    return table[[*knobs, *COLUMNS]]


def _outcome(folder: Path, name: str, objective: str) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    run, failed = folder / name, folder / f"{name}.failed.json"
    records = read_rounds(run)
    stopped = (folder / f"{name}.stopped").exists()
    found["status"] = (
        "failed"
        if failed.is_file()
        else "finished"
        if (run / "summary.json").is_file()
        else "stopped"
        if stopped
        else "unfinished"
        if records
        else "unstarted"
    )
    evaluated = [r for r in records if r["metrics"]]
    found["rounds"] = len(records)
    if evaluated:
        found["objective"] = evaluated[-1]["metrics"].get(objective)
    if records:
        found["bytes"] = sum(r["bytes_up"] + r["bytes_down"] for r in records)
        found["epsilon"] = max((records[-1]["epsilon"] or {}).values(), default=None)
        for key in ("exactness", "aggregation_error"):
            found[key] = max((r[key] for r in records if r[key] is not None), default=None)
        found["seconds"] = sum(sum(r["seconds"].values()) for r in records)
    if found["status"] == "finished":
        summary = json.loads((run / "summary.json").read_text())
        found |= {
            "bytes": summary["bytes_up"] + summary["bytes_down"],
            "epsilon": summary["epsilon"],
            "delta": summary["delta"],
        }
        found["trainable_params"] = summary["trainable_params"]
    if found["epsilon"] is None and records and not records[-1]["epsilon"]:
        found["epsilon"] = math.inf  # no privacy: nothing bounds what it tells
    return found


def points_table(trials: pd.DataFrame, seeds: int, single: bool = False) -> pd.DataFrame:
    """One row a point of the space, over its seeds: mean, lowest, highest and number of the objective, mean bytes, largest epsilon. Only
    points whose every seed finished. `single`: each trial is a point of its own, as where only the best single run is shown."""
    knobs = [*knobs_of(trials), *(("trial",) if single else ())]
    done = trials[trials["status"] == "finished"]
    if done.empty:
        return pd.DataFrame(
            columns=[*knobs, "mean", "lowest", "highest", "seeds", "bytes", "epsilon", "seconds", "trial"]
        )
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


def worded(values: pd.Series) -> pd.Series:
    """A knob's values as words, so that none is a value too."""
    return values.map(lambda v: "none" if v is None or v != v else f"{v:g}" if isinstance(v, float) else str(v))


def knobs_of(trials: pd.DataFrame) -> list[str]:
    """The keys of the space that take more than one value (all of them where there is one trial)."""
    knobs = [c for c in trials.columns if c not in COLUMNS]
    varied = [k for k in knobs if worded(trials[k]).nunique() > 1]
    return varied or knobs


def tied(kept: dict[str, Any]) -> set[str]:
    """Keys that have no say of their own: of the keys that a space varies together, those that the ones before them decide, such as a learning
    rate of each method's own."""
    found = set()
    values = [t["values"] for t in kept["trials"]]
    for axis in {key for point in values for key, value in point.items() if isinstance(value, dict)}:
        table = pd.DataFrame([settings({axis: point[axis]}) for point in values if axis in point]).map(str)
        own: list[str] = []
        for key in table.columns:
            decided = own and (table.groupby(own)[key].nunique() == 1).all()
            (found.add if decided else own.append)(key)
    return found


def pareto(points: pd.DataFrame, cost: str, maximise: bool) -> pd.Series:
    """True for points that no other beats in the objective without a higher cost, or in cost without a worse objective."""
    value = points["mean"] if maximise else -points["mean"]
    worse = [
        ((value >= v) & (points[cost] <= c) & ((value > v) | (points[cost] < c))).any()
        for v, c in zip(value, points[cost], strict=True)
    ]
    return ~pd.Series(worse, index=points.index, dtype=bool)


def effects(points: pd.DataFrame, knobs: Sequence[str]) -> pd.DataFrame:
    """The mean objective for each value of each knob, over all other knobs, and the share of the points' variance that the knob alone
    accounts for (eta squared: the sum of squares between its values over that of all points)."""
    rows, total = [], ((points["mean"] - points["mean"].mean()) ** 2).sum()
    for knob in knobs:
        groups = points.groupby(worded(points[knob]), sort=False)["mean"]
        between = sum(len(g) * (g.mean() - points["mean"].mean()) ** 2 for _, g in groups)
        for value, g in groups:
            rows.append(
                {
                    "knob": knob,
                    "value": value,
                    "mean": g.mean(),
                    "points": len(g),
                    "variance_share": between / total if total > 0 else 0.0,
                }
            )
    return pd.DataFrame(rows, columns=["knob", "value", "mean", "points", "variance_share"]).sort_values(
        ["variance_share", "knob"], ascending=[False, True], kind="stable"
    )


def privacy_of(out: Path) -> dict[str, Any]:
    """What all trials together have told of each client's data: `composed` epsilon by client at `delta`, `trials` and how many were
    without privacy; with random stopping also what the best alone tells. Empty for a sweep without any private trial."""
    kept = read_sweep_folder(out)
    folders = sorted(p for p in (out / "trials").iterdir() if p.is_dir()) if (out / "trials").is_dir() else []
    configs = [read_run_config(p) for p in folders if (p / "config.yaml").is_file()]
    if not any(c.privacy.on for c in configs):
        return {}
    runs, splits = zip(*told(out), strict=True)
    ledgers = [Ledger.load(p / "checkpoint" / "ledger.json") for p in folders]
    delta = min((ledger.delta for ledger in ledgers if ledger is not None and ledger.delta is not None), default=None)
    if delta is None:
        return {}  # no trial has released anything yet
    bare = sum(not c.privacy.on for c in configs)
    found: dict[str, Any] = {
        "composed": composed(runs, delta, splits) if not bare else {ANY_CLIENT: math.inf},
        "delta": delta,
        "trials": len(runs),
        "without_privacy": bare,
        "unit": next(c.privacy.unit for c in configs if c.privacy.on),
        "void": any(ledger.fixed for ledger in ledgers if ledger is not None),
        "budget": configs[0].privacy.sweep_epsilon,
    }
    if kept["random_stopping"]:
        stopping, expected = kept["random_stopping"]
        found["best_alone"] = best_alone(
            dominating(dominating(run.values()) for run in runs), delta, stopping, expected
        )
        found["random_stopping"] = {"distribution": stopping, "mean": expected}
    return found


def best_of(points: pd.DataFrame, maximise: bool) -> pd.Series | None:
    """The point with the best mean; of equals the one that moves less."""
    if points.empty:
        return None
    return points.sort_values(["mean", "bytes"], ascending=[not maximise, True], kind="stable").iloc[0]


def reproducible(config: Config) -> Config:
    """The config of a trial as `fedray run --config` makes it again: without its run directory and what the sweep shared."""
    return config.model_copy(
        update={"output": OutputSection(), "worker": config.worker.model_copy(update={"cache": None})}
    )


def write_sweep(out: Path) -> dict[str, Any]:
    """Write `trials.csv|parquet`, `points.csv`, `effects.csv`, `best.yaml`, `summary.json` and the pictures; returns the summary.

    Raises ConfigError for a folder that holds no sweep.
    """
    out = Path(out)
    kept = read_sweep_folder(out)
    maximise = kept["mode"] == "max"
    trials = trials_table(out)
    seeds = trials["seed"].nunique()
    points = points_table(trials, seeds, single=bool(kept["random_stopping"]))
    knobs = [k for k in knobs_of(trials) if k not in tied(kept)]
    for cost in ("bytes", "epsilon"):
        points[f"pareto_{cost}"] = pareto(points, cost, maximise)
    found = effects(points, knobs)
    trials.to_csv(out / "trials.csv", index=False)
    _plain(trials).to_parquet(out / "trials.parquet", index=False)
    points.to_csv(out / "points.csv", index=False)
    found.to_csv(out / "effects.csv", index=False)
    best, told_best = best_of(points, maximise), None
    if best is not None:
        run = out / "trials" / best["trial"]
        (out / "best.yaml").write_text(reproducible(read_run_config(run)).to_yaml())
        told_best = {
            "trial": best["trial"],
            "mean": best["mean"],
            "seeds": int(best["seeds"]),
            "final": json.loads((run / "summary.json").read_text())["final"],
        }
    for name, draw in (
        ("pareto_bytes", _pareto_picture("bytes")),
        ("pareto_epsilon", _pareto_picture("epsilon")),
        ("effects", effects_picture),
    ):
        if not points.empty and (name != "pareto_epsilon" or points["epsilon"].map(math.isfinite).any()):
            figure = draw(points, found, knobs, kept)
            figure.savefig(out / f"{name}.png", dpi=130)
            _close(figure)
    summary = {
        "space": kept["space"],
        "objective": kept["objective"],
        "mode": kept["mode"],
        "trials": trials["status"].value_counts().to_dict(),
        "left_out": kept["left_out"],
        "best": told_best,
        "knobs": found.drop_duplicates("knob").set_index("knob")["variance_share"].to_dict() if not found.empty else {},
        "privacy": privacy_of(out),
    }
    (out / "summary.json").write_text(json.dumps(_no_infinity(summary), indent=2))
    return summary


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of mixed values as words: parquet has one type a column."""
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


# --- pictures -----------------------------------------------------------------------------------------------------

Draw = Callable[[pd.DataFrame, pd.DataFrame, Sequence[str], dict[str, Any]], Any]


def _close(figure: Any) -> None:
    from matplotlib import pyplot

    pyplot.close(figure)


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _title(kept: dict[str, Any]) -> str:
    better = "higher" if kept["mode"] == "max" else "lower"
    return f"{TITLES.get(kept['objective'], kept['objective'].replace('_', ' '))} ({better} is better)"


def _method_of(points: pd.DataFrame) -> tuple[str, pd.Series]:
    """The knob that colours the points: the method where it varies, else the first."""
    knob = next((k for k in ("entry", "method.name", "adapter.kind") if k in points.columns), None)
    knob = knob or next(
        c
        for c in points.columns
        if c not in ("mean", "lowest", "highest", "seeds", "bytes", "epsilon", "seconds", "trial")
    )
    return knob, worded(points[knob])


def _pareto_picture(cost: str) -> Draw:
    """Objective against a cost: one colour and mark a method, bars from the lowest to the highest seed, the front as a line; the other knobs'
    values are written over the front's points alone. Each epsilon has its own place, methods side by side in it."""

    def draw(points: pd.DataFrame, _: pd.DataFrame, knobs: Sequence[str], kept: dict[str, Any]):
        figure, axes = _figure(10, 5.8)
        knob, methods = _method_of(points)
        names, markers = list(dict.fromkeys(methods)), "osD^vP*X<>"
        x = points["bytes"] / 2**20 if cost == "bytes" else _side_by_side(points["epsilon"], methods, names)
        for i, name in enumerate(names):
            own = points[methods == name]
            error = [own["mean"] - own["lowest"], own["highest"] - own["mean"]]
            axes.errorbar(
                x[own.index],
                own["mean"],
                yerr=error,
                fmt=markers[i % len(markers)],
                color=f"C{i % 10}",
                capsize=2,
                ms=5,
                lw=1,
                alpha=0.75,
                label=name,
            )
        front = points[points[f"pareto_{cost}"]].sort_values([cost, "mean"])
        axes.plot(x[front.index], front["mean"], color="0.35", lw=1, zorder=0, label="Pareto front")
        if cost == "bytes":
            from matplotlib import ticker

            axes.set_xscale("log")
            axes.set_xlabel("MiB moved in the whole run, all clients, up and down")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            spent = sorted(set(_rounded(points["epsilon"])))
            axes.set_xticks(range(len(spent)), ["none" if math.isinf(e) else f"{e:g}" for e in spent])
            axes.set_xlim(-0.6, len(spent) - 0.4)
            axes.set_xlabel("epsilon of one run (largest over the clients)")
            for edge in range(1, len(spent)):
                axes.axvline(edge - 0.5, color="0.9", lw=0.8, zorder=0)
        axes.set_ylabel(_title(kept))
        axes.grid(alpha=0.3, axis="both" if cost == "bytes" else "y")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))  # room for the names
        _name_front(
            axes, x, points, front, [k for k in knobs if k != knob and (cost == "bytes" or k != "privacy.epsilon")]
        )
        axes.legend(title=knob, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure

    return draw


def _rounded(epsilons: pd.Series) -> pd.Series:
    """What runs of one budget have spent differs in the third digit."""
    return epsilons.map(lambda e: e if math.isinf(e) else float(f"{e:.2g}"))


def _side_by_side(epsilons: pd.Series, methods: pd.Series, names: Sequence[str]) -> pd.Series:
    """Positions: the rank of the epsilon, moved by the method, and a little more by the turn of the point in its group."""
    spent = sorted(set(_rounded(epsilons)))
    place = _rounded(epsilons).map(spent.index)
    width = 0.8 / len(names)
    turn = epsilons.groupby([place, methods]).cumcount()
    most = max(1, turn.max())
    return place - 0.4 + width * (methods.map(list(names).index) + 0.2 + 0.6 * turn / most)


def _name_front(axes, x: pd.Series, points: pd.DataFrame, front: pd.DataFrame, knobs: Sequence[str]) -> None:
    """The other knobs' values over the bars of the front's points, moved up until they cover no mark and no other label; a thin line leads from
    a label that had to move."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    if not knobs:
        return
    axes.figure.canvas.draw()
    taken = []  # every mark with its bar, then the labels
    for index, row in points.iterrows():
        low, high = (axes.transData.transform((x[index], row[end])) for end in ("lowest", "highest"))
        taken.append(Bbox([[low[0] - 7, low[1] - 7], [high[0] + 7, high[1] + 7]]))
    for index, row in front.iterrows():
        words = ", ".join(
            f"{k.rsplit('.', 1)[-1]}={value}" for k, value in zip(knobs, worded(row[list(knobs)]), strict=True)
        )
        behind = {
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.85,
            "pad": 0.8,
        }  # the front's line may pass there
        lead = {"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
        note = axes.annotate(
            words,
            (x[index], row["highest"]),
            (0, 8),
            textcoords="offset points",
            fontsize=7.5,
            color="0.2",
            ha="center",
            va="bottom",
            bbox=behind,
            arrowprops=lead,
        )
        for step in range(40):
            note.set_position((0, 8 + 4 * step))
            note.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(note)
            if box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1:
                note.set_ha("left" if box.x0 < axes.bbox.x0 else "right")
                box = Text.get_window_extent(note)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def effects_picture(points: pd.DataFrame, found: pd.DataFrame, knobs: Sequence[str], kept: dict[str, Any]):
    """One panel a knob: the mean objective of each value, over the points behind it, and the share of variance in the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = list(dict.fromkeys(found["knob"]))
    columns = min(3, len(order))
    lines = math.ceil(len(order) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), layout="constrained", sharey=True, squeeze=False
    )
    for i, panel in enumerate(panels.flat):
        if i >= len(order):
            panel.set_axis_off()
            continue
        own = found[found["knob"] == order[i]]
        values = list(own["value"])
        for j, value in enumerate(values):
            each = points[worded(points[order[i]]) == value]["mean"]
            panel.plot([j] * len(each), each, "o", color="C0", alpha=0.3, ms=4)
        # A line only between values that have an order.
        panel.plot(
            range(len(values)),
            own["mean"],
            "-D" if pd.api.types.is_numeric_dtype(points[order[i]]) else "D",
            color="C3",
            ms=5,
        )
        crowded = sum(map(len, values)) > 28
        panel.set_xticks(
            range(len(values)), values, rotation=35 if crowded else 0, ha="right" if crowded else "center", fontsize=8
        )
        panel.set_title(f"{order[i]}: {own['variance_share'].iloc[0]:.0%} of the variance", fontsize=9)
        panel.margins(x=0.15)
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel(_title(kept), fontsize=9)
    return figure
