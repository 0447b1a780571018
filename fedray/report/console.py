"""The terminal side of a run: the plan, a live progress bar, one line a round, and the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedray.data.tasks import TASKS
from fedray.federation.channels.fixed_masks import NOT_SECURE
from fedray.federation.channels.statement import WEAK
from fedray.federation.prepare import Prepared
from fedray.plan import plan
from fedray.privacy.keys import TEST_KEY
from fedray.report.plan import UNKNOWN_COUNTS, print_plan
from fedray.report.words import measured, share, size, title


def run_privacy(summary: dict[str, Any]) -> str:
    """The guarantee of one run, in a sentence that does not promise more than there is."""
    if summary["keys_were_fixed"]:
        return f"not private: the noise keys were fixed by {TEST_KEY}, a word for tests"
    text = f"epsilon {summary['epsilon']:.4g} at delta {summary['delta']:g}"
    if summary["epsilon"] > WEAK:
        return (
            f"hardly private: {text} bounds next to nothing; raise privacy.noise, "
            f"or give a privacy.epsilon below {WEAK:g}"
        )
    return (
        f"private: {text} (the largest of the clients); against whom, what left each client, and what is not "
        "guaranteed, is in privacy.json and report.html"
    )


class ConsoleListener:
    """Prints a run as it goes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress_bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None
        self._told: set[str] = set()  # of which clients it was said that rows are cut
        self.metric = ""
        self.metric_key = ""

    def started(self, prepared: Prepared) -> None:
        config = prepared.config
        self.metric_key = TASKS[config.model.task].metric
        self.metric = title(self.metric_key)
        units = prepared.units() if config.privacy.on else None
        if config.privacy.on and config.siloed:
            self.console.print(UNKNOWN_COUNTS)
        costs = plan(config, prepared.cohort, len(prepared.data.classes) or 2, units)
        print_plan(self.console, costs, prepared.placement.reason)
        # A private run's counts are released with noise only, and clients with nodes of their own keep theirs.
        self.console.print(_clients(prepared.data.clients, {} if units else prepared.rows), soft_wrap=True)
        self.console.print(
            f"method   {config.method.name} on {config.adapter.kind} of rank {config.adapter.rank}, "
            f"{config.federation.rounds} rounds of {config.federation.local_steps} steps "
            f"of {config.federation.batch_size}"
        )
        self.progress_bar.start()
        self._task = self.progress_bar.add_task("starting workers", total=prepared.cohort)

    def evaluated(self, record: dict[str, Any]) -> None:
        if begun := record.get("start"):
            energy = f", {begun['energy']:.1%} of the gradient's energy captured" if begun["energy"] is not None else ""
            self.progress_bar.console.print(
                f"start    from {begun['source']}: up {size(begun['bytes_up'])}  down {size(begun['bytes_down'])}"
                f"{energy}  {begun['seconds']:.1f} s"
            )
        self.progress_bar.console.print(f"before   {self.metric} {record['metrics'][self.metric_key]:.4f}")

    def progress(self, round: int, done: int, cohort: int) -> None:
        self.progress_bar.update(self._task, description=f"round {round}", completed=done, total=cohort)

    def round(self, record: dict[str, Any]) -> None:
        self.progress_bar.console.print(self._round(record), soft_wrap=True)
        self.progress_bar.update(self._task, description="evaluating", completed=0)
        for client, rows in (record.get("shortened") or {}).items():
            if client not in self._told:
                self._told.add(client)
                self.note(
                    f"{client}: {rows} of its rows do not train whole: data.max_length cuts them; raise it, or "
                    "split them"
                )
        if (record.get("store_error") or 0.0) > 1e-3:
            self.note(
                f"the base's dtype lost {record['store_error']:.1%} of the base update's size: "
                "use --model.dtype float32, or a method that leaves the base alone (ffa, fra)"
            )

    def _round(self, record: dict[str, Any]) -> str:
        """The line of a round."""
        metric = f"{self.metric} {record['metrics'][self.metric_key]:.4f}  " if record["metrics"] else ""
        left_out = f"  left out: {', '.join(d['client'] for d in record['dropped'])}" if record["dropped"] else ""
        loss = f"loss {record['train_loss']:.4f}  " if record["train_loss"] is not None else ""
        spent = f"epsilon {max(record['epsilon'].values()):.3f}  " if record["epsilon"] else ""
        return (
            f"round {record['round']:>3}  {loss}{spent}{metric}up {size(record['bytes_up'])}  "
            f"down {size(record['bytes_down'])}  "
            f"factor averaging would lose {measured(record, 'aggregation_error', '.2%')}, "
            f"lost {measured(record, 'exactness', '.1e')}  {sum(record['seconds'].values()):.1f} s{left_out}"
        )

    def note(self, text: str) -> None:
        self.progress_bar.console.print(f"note     {text}", soft_wrap=True)

    def finished(self, summary: dict[str, Any], folder: str) -> None:
        self.close()
        if summary["final_by_group"]:
            self.console.print(_by_group(summary, f"held-out {self.metric}"))
        else:
            self.console.print(f"held-out {self.metric}: {summary['initial']:.4f} before, {summary['final']:.4f} after")
        self.console.print(
            f"moved {size(summary['bytes_up'])} up and {size(summary['bytes_down'])} down "
            f"in {summary['rounds']} rounds, {summary['wall_seconds']:.0f} s in all",
            soft_wrap=True,
        )
        if summary["exactness"] is not None:
            self.console.print(
                "plain factor averaging (FedIT) would have lost up to "
                f"{share(summary['aggregation_error'], '.2%')} of a round's update; "
                f"{summary['method']} lost at most {summary['exactness']:.1e}",
                soft_wrap=True,
            )
        if summary["epsilon"] is not None:
            self.console.print(run_privacy(summary), soft_wrap=True)
        if summary.get("masks_were_fixed"):
            self.console.print(NOT_SECURE, soft_wrap=True)
        self.console.print(f"results in {folder} (adapter/ loads with plain PEFT; report.html)", soft_wrap=True)

    def close(self) -> None:
        if self._task is not None:
            self.progress_bar.stop()


def _clients(names: Sequence[str], rows: dict[str, int]) -> str:
    """The first clients by name, with their rows where these may be shown."""
    shown = [f"{name} ({rows[name]})" if rows else name for name in names[:7]]
    more = ", ..." if len(names) > 7 else ""
    return f"clients  {len(names)}{', with rows' if rows else ''}: {', '.join(shown)}{more}"


def _by_group(summary: dict[str, Any], title: str) -> Table:
    """The metric of each group before and after the run, and of all of them."""
    table = Table(title=title, title_justify="left")
    for column in ("client", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "client" else "right")
    before = summary["initial_by_group"] | {"overall": summary["initial"]}
    after = summary["final_by_group"] | {"overall": summary["final"]}
    for name in (*summary["final_by_group"], "overall"):
        table.add_row(
            name,
            f"{before[name]:.4f}",
            f"{after[name]:.4f}",
            f"{after[name] / before[name] - 1:+.1%}",
            style="bold" if name == "overall" else None,
        )
    return table
