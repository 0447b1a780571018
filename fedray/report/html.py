"""`report.html`: one run on one page that needs nothing else: result, curves, rounds, and for a private run what left
each client.

Every page is put together by `Markup.format` and `Markup.join`, which escape whatever is no `Markup` itself: a run
directory may come from others, and so may each string in it. Attributes are always quoted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.channels.fixed_masks import NOT_SECURE, were_fixed
from fedray.federation.results import read_rounds
from fedray.report.words import measured, share, size, title

_STYLE = Markup("""
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #1b1f24; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d5d9de; }
table { border-collapse: collapse; font-size: 0.92em; display: block; overflow-x: auto; } \
td, th { padding: 0.25em 0.8em 0.25em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #9aa1a9; } .n { text-align: right !important; font-variant-numeric: tabular-nums; }
.big { font-size: 1.25em; } .warn { background: #fff1d6; padding: 0.6em 1em; border-left: 4px solid #d9870b; } \
.high { color: #a61b1b; font-weight: 600; } svg { max-width: 100%; height: auto; }
""")


def write_report(folder: Path) -> Path:
    """Make `report.html` of a run directory. Raises ConfigError where there is no finished round."""
    folder = Path(folder)
    if not (folder / "rounds.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"'{folder}' is no run directory with a finished round")
    summary, records = _json(folder / "summary.json"), read_rounds(folder)
    open_sums = were_fixed(folder) or (summary or {}).get("masks_were_fixed")
    warnings = [_warning(NOT_SECURE)] if open_sums else []
    parts = [_head(summary, records), *warnings, _curves(summary, records), _rounds(records)]
    if (privacy := _json(folder / "privacy.json")) is not None:
        parts.append(_privacy(privacy))
    parts.append(Markup("<h2>Config</h2><pre>{}</pre>").format((folder / "config.yaml").read_text()))
    page = Markup(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fedray {run}</title><style>{style}</style>'
        "<h1>{run}</h1>{parts}</html>"
    ).format(run=folder.name, style=_STYLE, parts=_joined(parts))
    out, part = folder / "report.html", folder / ".report.html.part"
    part.write_text(page)
    part.replace(out)
    return out


def _json(file: Path) -> dict[str, Any] | None:
    """What a file of the run directory holds; None where it is not there."""
    return json.loads(file.read_text()) if file.is_file() else None


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _warning(text: str) -> Markup:
    return Markup('<p class="warn">{}.</p>').format(text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> Markup:
    """`numbers`: the columns that are aligned to the right."""
    right = set(numbers)
    names = _joined(Markup("<th{}>{}</th>").format(_align(i in right), name) for i, name in enumerate(head))
    cells = _joined(
        Markup("<tr>{}</tr>").format(
            _joined(Markup("<td{}>{}</td>").format(_align(i in right), cell) for i, cell in enumerate(row))
        )
        for row in rows
    )
    return Markup("<table><tr>{}</tr>{}</table>").format(names, cells)


def _align(number: bool) -> Markup:
    return Markup(' class="n"' if number else "")


def _head(summary: dict | None, records: list[dict]) -> Markup:
    if summary is None:
        return _warning(f"This run is not finished: {len(records)} rounds so far")
    text = Markup(
        '<p class="big">{method} on {adapter}: {metric} {initial:.4f} before, '
        "<b>{final:.4f}</b> after {rounds} rounds with {clients} clients.</p>"
    ).format(**summary | {"metric": title(summary["metric"])})
    text += Markup(
        "<p>{:,} numbers train. {} up and {} down, {:.0f} s. Factor averaging would have lost up to {} of a round's "
        "update; this method lost at most {}.</p>"
    ).format(
        summary["trainable_params"],
        size(summary["bytes_up"]),
        size(summary["bytes_down"]),
        summary["wall_seconds"],
        share(summary["aggregation_error"], ".2%"),
        share(summary["exactness"], ".1e"),
    )
    if summary["final_by_group"]:
        rows = [
            (g, f"{summary['initial_by_group'].get(g, float('nan')):.4f}", f"{v:.4f}")
            for g, v in summary["final_by_group"].items()
        ]
        text += _table(("group", "before", "after"), rows, (1, 2))
    return text


Curve = tuple[str, list[tuple[int, float]]]


def _curves(summary: dict | None, records: list[dict]) -> Markup:
    """Metric, loss and epsilon by round, those that there are, as one SVG."""
    losses = [(r["round"], r["train_loss"]) for r in records if r["train_loss"] is not None]
    spent = [(r["round"], max(r["epsilon"].values())) for r in records if r.get("epsilon")]
    candidates: list[Curve] = [
        _metric(summary, records),
        ("training loss", losses),
        ("epsilon spent, largest of the clients", spent),
    ]
    curves = [curve for curve in candidates if curve[1]]
    return _drawn(curves) if curves else Markup("")


def _metric(summary: dict | None, records: list[dict]) -> Curve:
    """The task's metric, from before the first round where the run is finished; no points where none was measured."""
    evaluated = [(record["round"], record["metrics"]) for record in records if record["metrics"]]
    if summary is not None:
        name = summary["metric"]
    else:
        name = next((t.metric for _, metrics in evaluated for t in TASKS.values() if t.metric in metrics), None)
    if name is None or not evaluated:
        return "", []
    start = [(0, summary["initial"])] if summary else []
    return title(name), start + [(round, metrics[name]) for round, metrics in evaluated]


def _drawn(curves: Sequence[Curve]) -> Markup:
    """One plot a curve, side by side, as SVG (matplotlib escapes what it writes)."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3), squeeze=False)
    for axis, (name, points) in zip(axes[0], curves, strict=True):
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axis.set(xlabel="round")
        axis.set_title(name, parse_math=False)
        axis.grid(alpha=0.3)
        axis.ticklabel_format(useOffset=False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])


def _rounds(records: list[dict]) -> Markup:
    rows = [
        (
            r["round"],
            ", ".join(r["cohort"]) if r["cohort"] is not None else "(a secret)",
            "; ".join(f"{d['client']}: {d['reason']}" for d in r["dropped"]),
            f"{r['train_loss']:.4f}" if r["train_loss"] is not None else "-",
            size(r["bytes_up"]),
            size(r["bytes_down"]),
            measured(r, "aggregation_error", ".2%"),
            measured(r, "exactness", ".1e"),
            f"{sum(r['seconds'].values()):.1f}",
        )
        for r in records
    ]
    head = ("round", "cohort", "left out", "loss", "up", "down", "averaging would lose", "lost", "s")
    return Markup("<h2>Rounds</h2>") + _table(head, rows, range(3, 9))


def _privacy(statement: dict) -> Markup:
    """What `privacy.json` says."""
    guarantee = statement["guarantee"]
    return _joined(
        (
            Markup("<h2>Privacy</h2>"),
            _guarantee(guarantee),
            _spent(guarantee, statement["releases"]),
            Markup("<h2>Mechanisms</h2>"),
            _mechanisms(statement["plans"]),
            Markup("<h2>What left each client</h2>"),
            _table(
                ("what", "when", "under which guarantee", "where in the code"),
                [(e["what"], e["when"], e["guarantee"], e["place"]) for e in statement["left_each_client"]],
            ),
            *_threats(statement.get("who_learns_what", [])),
            Markup("<h2>What is not guaranteed</h2>"),
            _not_guaranteed(statement["not_guaranteed"]),
        )
    )


def _threats(lines: list[dict]) -> tuple[Markup, ...]:
    """Nothing of a statement from before it had them."""
    if not lines:
        return ()
    return Markup("<h2>Who learns what</h2>"), _table(("who", "learns"), [(e["who"], e["learns"]) for e in lines])


def _guarantee(given: dict) -> Markup:
    if warning := given["void"] or given.get("weak"):
        text = _warning(warning)
    else:
        text = Markup('<p class="big">epsilon {epsilon:.4g} at delta {delta:g}, by {unit}.</p>').format(**given)
    return text + Markup(
        "<p>A unit is {what_a_unit_is}. Neighbouring relation: {relation}. Holds {trust}. Accountant: {accountant}.</p>"
    ).format(**given)


def _spent(given: dict, releases: dict) -> Markup:
    counts = {client: len(entries) for client, entries in releases.items()}
    every = counts.get("(every client)", 0)
    rows = [
        (client, f"{epsilon:.4g}", given["budget"] or "none", counts.get(client, every))
        for client, epsilon in given["epsilon_by_client"].items()
    ]
    return _table(("client", "epsilon spent", "budget", "releases"), rows, (1, 2, 3))


def _mechanisms(plans: dict) -> Markup:
    rows = [
        (
            client,
            f"{plan['rate']:g}",
            f"{plan['clip']:g}",
            f"{plan['noise']:.4g}",
            plan["steps"],
            f"{plan['delta']:g}",
            "; ".join(map(_release, plan["before"])) or "-",
        )
        for client, plan in plans.items()
    ]
    head = ("client", "rate", "clip", "noise multiplier", "steps", "delta", "before training")
    return _table(head, rows, range(1, 6))


def _release(release: dict) -> str:
    return f"{release['what']}: noise {release['noise']:.4g}, rate {release['rate']:g}, {release['steps']} times"


_SEVERITIES = ("high", "medium", "low")


def _not_guaranteed(entries: list[dict]) -> Markup:
    """The severest first, by colour too; a word that is no severity of ours comes before all."""
    row = Markup('<tr><td class="{severity}">{severity}</td><td>{what}</td><td>{place}</td></tr>')
    unknown = Markup("<tr><td>{severity}</td><td>{what}</td><td>{place}</td></tr>")
    ranks = {severity: rank for rank, severity in enumerate(_SEVERITIES)}
    rows = _joined(
        (row if entry["severity"] in ranks else unknown).format(**entry)
        for entry in sorted(entries, key=lambda entry: ranks.get(entry["severity"], -1))
    )
    return Markup("<table><tr><th>severity</th><th>what</th><th>where in the code</th></tr>{}</table>").format(rows)
