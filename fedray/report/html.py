"""`report.html`: one run on one page that needs nothing else: result, curves, rounds, and for a private run what left each client."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedray.errors import ConfigError
from fedray.federation.results import read_rounds
from fedray.report.words import TITLES, share, size

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #1b1f24; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d5d9de; }
table { border-collapse: collapse; font-size: 0.92em; display: block; overflow-x: auto; } td, th { padding: 0.25em 0.8em 0.25em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #9aa1a9; } .n { text-align: right !important; font-variant-numeric: tabular-nums; }
.big { font-size: 1.25em; } .warn { background: #fff1d6; padding: 0.6em 1em; border-left: 4px solid #d9870b; } .high { color: #a61b1b; font-weight: 600; } svg { max-width: 100%; height: auto; }
"""


def write_report(folder: Path) -> Path:
    """Make `report.html` of a run directory. Raises ConfigError where there is no finished round."""
    folder = Path(folder)
    if not (folder / "rounds.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"'{folder}' is no run directory with a finished round")
    records = read_rounds(folder)
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else None
    privacy = json.loads((folder / "privacy.json").read_text()) if (folder / "privacy.json").is_file() else None
    parts = [_head(summary, records), _curves(summary, records), _rounds(records)]
    if privacy is not None:
        parts.append(_privacy(privacy))
    parts += ["<h2>Config</h2><pre>", html.escape((folder / "config.yaml").read_text()), "</pre>"]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>fedray {html.escape(folder.name)}</title><style>{_STYLE}</style><h1>{html.escape(folder.name)}</h1>{''.join(parts)}</html>"
    out, part = folder / "report.html", folder / ".report.html.part"
    part.write_text(page)
    part.replace(out)
    return out


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    cells = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i in right else ''}>{html.escape(str(c))}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    names = "".join(f"<th{' class=n' if i in right else ''}>{html.escape(h)}</th>" for i, h in enumerate(head))
    return f"<table><tr>{names}</tr>{cells}</table>"


def _head(summary: dict | None, records: list[dict]) -> str:
    if summary is None:
        return f"<p class=warn>This run is not finished: {len(records)} rounds so far.</p>"
    metric = TITLES[summary["metric"]]
    text = (
        f"<p class=big>{html.escape(summary['method'])} on {html.escape(summary['adapter'])}: {metric} {summary['initial']:.4f} before, "
        f"<b>{summary['final']:.4f}</b> after {summary['rounds']} rounds with {summary['clients']} clients.</p>"
        f"<p>{summary['trainable_params']:,} numbers train. {size(summary['bytes_up'])} up and {size(summary['bytes_down'])} down, "
        f"{summary['wall_seconds']:.0f} s. Factor averaging would have lost up to {share(summary['aggregation_error'], '.2%')} of a round's update; "
        f"this method lost at most {share(summary['exactness'], '.1e')}.</p>"
    )
    if summary["final_by_group"]:
        rows = [
            (g, f"{summary['initial_by_group'].get(g, float('nan')):.4f}", f"{v:.4f}")
            for g, v in summary["final_by_group"].items()
        ]
        text += _table(("group", "before", "after"), rows, (1, 2))
    return text


def _curves(summary: dict | None, records: list[dict]) -> str:
    """Metric, loss and epsilon by round, those that there are, as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    metric = (
        summary["metric"]
        if summary
        else next((m for r in records if r["metrics"] for m in TITLES if m in r["metrics"]), None)
    )
    curves = []
    measured = [(r["round"], r["metrics"][metric]) for r in records if r["metrics"]] if metric else []
    if measured:
        curves.append((TITLES[metric], ([(0, summary["initial"])] if summary else []) + measured))
    losses = [(r["round"], r["train_loss"]) for r in records if r["train_loss"] is not None]
    if losses:
        curves.append(("training loss", losses))
    spent = [(r["round"], max(r["epsilon"].values())) for r in records if r.get("epsilon")]
    if spent:
        curves.append(("epsilon spent, largest of the clients", spent))
    if not curves:
        return ""
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3), squeeze=False)
    for axis, (title, points) in zip(axes[0], curves, strict=True):
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axis.set(title=title, xlabel="round")
        axis.grid(alpha=0.3)
        axis.ticklabel_format(useOffset=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _rounds(records: list[dict]) -> str:
    rows = [
        (
            r["round"],
            ", ".join(r["cohort"]) if r["cohort"] is not None else "(a secret)",
            "; ".join(f"{d['client']}: {d['reason']}" for d in r["dropped"]),
            f"{r['train_loss']:.4f}" if r["train_loss"] is not None else "-",
            size(r["bytes_up"]),
            size(r["bytes_down"]),
            share(r["aggregation_error"], ".2%"),
            share(r["exactness"], ".1e"),
            f"{sum(r['seconds'].values()):.1f}",
        )
        for r in records
    ]
    head = ("round", "cohort", "left out", "loss", "up", "down", "averaging would lose", "lost", "s")
    return "<h2>Rounds</h2>" + _table(head, rows, range(3, 9))


def _privacy(told: dict) -> str:
    given = told["guarantee"]
    text = "<h2>Privacy</h2>"
    if given["void"]:
        text += f"<p class=warn>{html.escape(given['void'])}.</p>"
    elif given.get("weak"):
        text += f"<p class=warn>{html.escape(given['weak'])}.</p>"
    else:
        text += f"<p class=big>epsilon {given['epsilon']:.4g} at delta {given['delta']:g}, by {given['unit']}.</p>"
    text += (
        f"<p>A unit is {html.escape(given['what_a_unit_is'])}. Neighbouring relation: {given['relation']}. Holds {html.escape(given['trust'])}. "
        f"Accountant: {html.escape(given['accountant'])}.</p>"
    )
    releases = {c: len(e) for c, e in told["releases"].items()}
    rows = [
        (c, f"{e:.4g}", given["budget"] or "none", releases.get(c, releases.get("(every client)", 0)))
        for c, e in given["epsilon_by_client"].items()
    ]
    text += _table(("client", "epsilon spent", "budget", "releases"), rows, (1, 2, 3))
    plans = [
        (
            c,
            f"{p['rate']:g}",
            f"{p['clip']:g}",
            f"{p['noise']:.4g}",
            p["steps"],
            f"{p['delta']:g}",
            "; ".join(
                f"{b['what']}: noise {b['noise']:.4g}, rate {b['rate']:g}, {b['steps']} times" for b in p["before"]
            )
            or "-",
        )
        for c, p in told["plans"].items()
    ]
    text += "<h2>Mechanisms</h2>" + _table(
        ("client", "rate", "clip", "noise multiplier", "steps", "delta", "before training"), plans, range(1, 6)
    )
    left = [(e["what"], e["when"], e["guarantee"], e["place"]) for e in told["left_each_client"]]
    text += "<h2>What left each client</h2>" + _table(
        ("what", "when", "under which guarantee", "where in the code"), left
    )
    missing = sorted(told["not_guaranteed"], key=lambda e: ("high", "medium", "low").index(e["severity"]))
    listed = "".join(
        f"<tr><td class={e['severity']}>{e['severity']}</td><td>{html.escape(e['what'])}</td><td>{html.escape(e['place'])}</td></tr>"
        for e in missing
    )
    return (
        text
        + f"<h2>What is not guaranteed</h2><table><tr><th>severity</th><th>what</th><th>where in the code</th></tr>{listed}</table>"
    )
