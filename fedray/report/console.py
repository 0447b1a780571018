"""The terminal side of a run: the plan, a live progress bar, one line a round, and the result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedray.compare import Result
from fedray.data.tasks import TASKS
from fedray.federation.channels.statement import WEAK
from fedray.federation.prepare import Prepared
from fedray.plan import Plan, plan
from fedray.privacy.keys import TEST_KEY
from fedray.report.words import TITLES, number, share, size


def plan_table(costs: Plan) -> Table:
    """Every method side by side."""
    title = f"a round, per client ({costs.cohort} clients a round), and a run of {costs.costs[0].rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("method", "exact", "trains", "up", "down", "down, round 1", "sent once", "run, up", "run, down"):
        table.add_column(column, justify="left" if column in ("method", "exact") else "right")
    for i, c in enumerate(costs.costs):
        cells = (
            c.method,
            c.exact,
            number(c.trainable),
            size(c.up),
            size(c.down),
            size(c.first_down),
            size(c.once) if c.once else "-",
            size(c.run_up),
            size(c.run_down),
        )
        table.add_row(*cells, style="bold" if i == 0 else None)
    return table


def privacy_table(costs: Plan) -> Table:
    """What each client's privacy will cost: with noised counts, so about."""
    first = next(iter(costs.privacy.values()))
    title = f"privacy by {first.unit}, {first.relation}, delta {first.delta:g}; the signal is what clipped terms add up to when all agree"
    table = Table(title=title, title_justify="left")
    for column in (
        "client",
        "rate",
        "steps",
        "clip",
        "noise multiplier",
        "epsilon, whole run",
        "signal to noise, a step at best",
    ):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client, own in costs.privacy.items():
        table.add_row(
            client,
            f"{own.rate:g}",
            f"{own.steps}",
            f"{own.clip:g}",
            f"{own.noise:.4g}",
            f"{own.epsilon:.4g}",
            f"{own.signal_to_noise(costs.costs[0].trainable):.3g}",
        )
    return table


def print_plan(console: Console, costs: Plan, placement: str | None = None) -> None:
    """Model, memory, placement, and the table of methods."""
    memory = costs.memory
    console.print(
        f"model    {costs.model}: {number(costs.base_parameters)} parameters, {costs.adapted_layers} layers adapted, {number(costs.heads)} in heads"
    )
    text = f"memory   about {size(memory.total)} a worker: base {size(memory.base)}, adapter and optimizer {size(memory.adapter_and_optimizer)}, activations {size(memory.activations)} (estimate)"
    if memory.host_copy_of_moved_layers:
        text += f"; and {size(memory.host_copy_of_moved_layers)} of host memory for the original weights"
    console.print(text, soft_wrap=True)
    if placement:
        console.print(f"workers  {placement}")
    console.print(plan_table(costs))
    if own := costs.costs[0].start_up:
        down = costs.costs[0].start_down
        console.print(
            f"before round 1 each client sends {size(own)} and receives {size(down)} for the subspace; both are counted in the run"
        )
    if costs.privacy:
        console.print(privacy_table(costs))
    if costs.clients > costs.cohort:
        console.print("a client that sat rounds out also downloads the base updates it missed (fedex, flora)")


UNKNOWN_COUNTS = "privacy  noise and epsilon are planned when the clients have told their noised numbers of examples"


def print_comparison(console: Console, results: list[Result]) -> None:
    """One line an entry; bytes are of the whole run, all clients."""
    table = Table(
        title=f"final {results[0].row()['metric'].replace('_', ' ')}, {len(results[0].finals)} seeds",
        title_justify="left",
    )
    rows = [result.row() for result in results]
    private = any(row["epsilon"] is not None for row in rows)
    for column in (
        "method",
        "mean",
        "st. dev.",
        "seeds",
        "lr",
        "trains",
        "up",
        "down",
        "averaging would lose",
        "lost",
        *(("epsilon",) if private else ()),
        "s",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['mean']:.4f}",
            f"{row['st_dev']:.4f}",
            ", ".join(f"{v:.4f}" for v in row["finals"]),
            f"{row['lr']:g}{' (edge)' if row['lr_at_edge_of_grid'] else ''}",
            f"{row['trainable_params']:,}",
            size(row["bytes_up"]),
            size(row["bytes_down"]),
            share(row["aggregation_error"], ".1%"),
            share(row["exactness"], ".1e"),
            *((f"{row['epsilon']:.3g}",) if private else ()),
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    if private:
        runs = sum(len(result.tuning) + len(result.finals) for result in results)
        console.print(
            f"epsilon is of one run at delta {rows[0]['delta']:g}; the {runs} runs behind this table, tuning included, are releases of the same data, and their sum is not accounted for",
            soft_wrap=True,
        )
    if any(result.at_edge for result in results):
        console.print("(edge): the best learning rate is the grid's first or last; give --lrs that reach further")


def print_sweep(console: Console, out: Path, summary: dict[str, Any], rows: int = 12) -> None:
    """The best points, what mattered, what all trials together have told, and where everything is."""
    points = pd.read_csv(out / "points.csv")
    maximise = summary["mode"] == "max"
    knobs = [
        c
        for c in points.columns
        if c
        not in (
            "mean",
            "lowest",
            "highest",
            "seeds",
            "bytes",
            "epsilon",
            "seconds",
            "trial",
            "pareto_bytes",
            "pareto_epsilon",
        )
    ]
    counts = ", ".join(f"{n} {status}" for status, n in summary["trials"].items())
    table = Table(title=f"{summary['objective'].replace('_', ' ')}, best first ({counts})", title_justify="left")
    private = points["epsilon"].map(math.isfinite).any()
    for column in (
        *knobs,
        "mean",
        *(("lowest", "highest") if (points["seeds"] > 1).any() else ()),
        "moved",
        *(("epsilon",) if private else ()),
        "front",
    ):
        table.add_column(column, justify="left" if column in knobs or column == "front" else "right")
    for _, row in points.sort_values("mean", ascending=not maximise, kind="stable").head(rows).iterrows():
        fronts = [
            name
            for name, there in (("bytes", row["pareto_bytes"]), ("epsilon", private and row["pareto_epsilon"]))
            if there
        ]
        table.add_row(
            *(
                f"{row[k]:g}"
                if isinstance(row[k], float) and not math.isnan(row[k])
                else "-"
                if row[k] != row[k]
                else str(row[k])
                for k in knobs
            ),
            f"{row['mean']:.4f}",
            *((f"{row['lowest']:.4f}", f"{row['highest']:.4f}") if (points["seeds"] > 1).any() else ()),
            size(row["bytes"]),
            *(("none" if math.isinf(row["epsilon"]) else f"{row['epsilon']:.3g}",) if private else ()),
            ", ".join(fronts),
        )
    console.print(table)
    if summary["knobs"]:
        console.print(
            "what mattered: "
            + ", ".join(f"{knob} {part:.0%}" for knob, part in summary["knobs"].items())
            + " of the variance of finished points",
            soft_wrap=True,
        )
    if privacy := summary["privacy"]:
        console.print(sweep_privacy(privacy), soft_wrap=True)
    if summary["best"]:
        console.print(
            f"best: {summary['best']['trial']}, {summary['best']['final']:.4f}; fedray run --config {out / 'best.yaml'} makes it again",
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"written to {out}: trials.csv, trials.parquet, points.csv, effects.csv, summary.json, pictures", soft_wrap=True
    )


def sweep_privacy(privacy: dict[str, Any]) -> str:
    """What all trials together have told, in a sentence that a privacy officer can use."""
    if privacy["void"]:
        return "privacy: none, since the noise keys were fixed for a test"
    if privacy["without_privacy"]:
        return f"privacy: {privacy['without_privacy']} of {privacy['trials']} trials ran without it on the same data, so nothing bounds what the sweep as a whole has told"
    if not privacy["composed"]:
        return "privacy: nothing has been released yet"
    worst = max(privacy["composed"].items(), key=lambda item: item[1])
    text = f"privacy: the {privacy['trials']} trials together have spent epsilon {worst[1]:.4g} at delta {privacy['delta']:g} of {worst[0]}'s data"
    if len(privacy["composed"]) == 1:
        text = f"privacy: the {privacy['trials']} trials together have spent epsilon {worst[1]:.4g} at delta {privacy['delta']:g} of each {privacy['unit']}'s data"
    if privacy["budget"] is not None:
        text += f", of a budget of {privacy['budget']:g}"
    if "best_alone" in privacy:
        text += f"; the best alone, if no other trial and not their number is ever shown: {privacy['best_alone']:.4g} (Papernot and Steinke, 2022)"
    return text


def run_privacy(summary: dict[str, Any]) -> str:
    """The guarantee of one run, in a sentence that does not promise more than there is."""
    if summary["keys_were_fixed"]:
        return f"not private: the noise keys were fixed by {TEST_KEY}, a word for tests"
    text = f"epsilon {summary['epsilon']:.4g} at delta {summary['delta']:g}"
    if summary["epsilon"] > WEAK:
        return f"hardly private: {text} bounds next to nothing; raise privacy.noise, or give a privacy.epsilon below {WEAK:g}"
    return f"private: {text} (the largest of the clients); against whom, what left each client, and what is not guaranteed, is in privacy.json and report.html"


class ConsoleListener:
    """Prints a run as it goes."""

    def __init__(self, console: Console):
        self.console = console
        self.progress_bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self.metric = ""
        self.metric_key = ""

    def started(self, prepared: Prepared) -> None:
        config = prepared.config
        self.metric_key = TASKS[config.model.task].metric
        self.metric = TITLES[self.metric_key]
        counts, names = prepared.rows, prepared.data.clients
        units = prepared.units() if config.privacy.on else None
        # A private run's counts are released with noise only, and clients with nodes of their own keep theirs.
        shown = counts and not units
        named = ", ".join(f"{n} ({counts[n]})" if shown else n for n in names[:7]) + (", ..." if len(names) > 7 else "")
        if config.privacy.on and config.siloed:
            self.console.print(UNKNOWN_COUNTS)
        print_plan(
            self.console,
            plan(config, prepared.cohort, len(prepared.data.classes) or 2, units),
            prepared.placement.reason,
        )
        self.console.print(f"clients  {len(names)}{', with rows' if shown else ''}: {named}", soft_wrap=True)
        self.console.print(
            f"method   {config.method.name} on {config.adapter.kind} of rank {config.adapter.rank}, "
            f"{config.federation.rounds} rounds of {config.federation.local_steps} steps of {config.federation.batch_size}"
        )
        self.progress_bar.start()
        self._task = self.progress_bar.add_task("starting workers", total=prepared.cohort)

    def evaluated(self, record: dict[str, Any]) -> None:
        if begun := record.get("start"):
            energy = f", {begun['energy']:.1%} of the gradient's energy captured" if begun["energy"] is not None else ""
            self.progress_bar.console.print(
                f"start    from {begun['source']}: up {size(begun['bytes_up'])}  down {size(begun['bytes_down'])}{energy}  {begun['seconds']:.1f} s"
            )
        self.progress_bar.console.print(f"before   {self.metric} {record['metrics'][self.metric_key]:.4f}")

    def progress(self, round: int, done: int, cohort: int) -> None:
        self.progress_bar.update(self._task, description=f"round {round}", completed=done, total=cohort)

    def round(self, record: dict[str, Any]) -> None:
        metric = f"{self.metric} {record['metrics'][self.metric_key]:.4f}  " if record["metrics"] else ""
        left_out = f"  left out: {', '.join(d['client'] for d in record['dropped'])}" if record["dropped"] else ""
        loss = f"loss {record['train_loss']:.4f}  " if record["train_loss"] is not None else ""
        spent = f"epsilon {max(record['epsilon'].values()):.3f}  " if record["epsilon"] else ""
        self.progress_bar.console.print(
            f"round {record['round']:>3}  {loss}{spent}{metric}up {size(record['bytes_up'])}  "
            f"down {size(record['bytes_down'])}  factor averaging would lose {share(record['aggregation_error'], '.2%')}, lost "
            f"{share(record['exactness'], '.1e')}  {sum(record['seconds'].values()):.1f} s{left_out}",
            soft_wrap=True,
        )
        self.progress_bar.update(self._task, description="evaluating", completed=0)
        if (record.get("store_error") or 0.0) > 1e-3:
            self.note(
                f"the base's dtype lost {record['store_error']:.1%} of the base update's size: "
                "use --model.dtype float32, or a method that leaves the base alone (ffa, fra)"
            )

    def note(self, text: str) -> None:
        self.progress_bar.console.print(f"note     {text}", soft_wrap=True)

    def finished(self, summary: dict[str, Any], folder: str) -> None:
        self.close()
        if summary["final_by_group"]:
            table = Table(title=f"held-out {self.metric}", title_justify="left")
            for column in ("client", "before", "after", "change"):
                table.add_column(column, justify="left" if column == "client" else "right")
            rows = [*summary["final_by_group"], "overall"]
            before = summary["initial_by_group"] | {"overall": summary["initial"]}
            after = summary["final_by_group"] | {"overall": summary["final"]}
            for name in rows:
                table.add_row(
                    name,
                    f"{before[name]:.4f}",
                    f"{after[name]:.4f}",
                    f"{after[name] / before[name] - 1:+.1%}",
                    style="bold" if name == "overall" else None,
                )
            self.console.print(table)
        else:
            self.console.print(f"held-out {self.metric}: {summary['initial']:.4f} before, {summary['final']:.4f} after")
        self.console.print(
            f"moved {size(summary['bytes_up'])} up and {size(summary['bytes_down'])} down in {summary['rounds']} rounds, "
            f"{summary['wall_seconds']:.0f} s in all",
            soft_wrap=True,
        )
        if summary["exactness"] is not None:
            self.console.print(
                f"plain factor averaging (FedIT) would have lost up to {share(summary['aggregation_error'], '.2%')} of a round's update; "
                f"{summary['method']} lost at most {summary['exactness']:.1e}",
                soft_wrap=True,
            )
        if summary["epsilon"] is not None:
            self.console.print(run_privacy(summary), soft_wrap=True)
        self.console.print(f"results in {folder} (adapter/ loads with plain PEFT; report.html)", soft_wrap=True)

    def close(self) -> None:
        if self._task is not None:
            self.progress_bar.stop()
