"""The live view of a sweep: one table in place, or a line for each trial that ends where the output is no terminal."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from fedray.report.terminal import make_console
from fedray.report.words import size

ENDED = ("ended", "failed")


class LiveTable(tune.Callback):
    """Follows Tune's trials. `count`: how many there will be (0: unknown). Nothing of it goes into Tune's
    checkpoints."""

    def __init__(self, console: Console | None = None, count: int = 0, maximise: bool = True, rows: int = 14):
        self.console, self.count, self.maximise, self.rows = console or make_console(), count, maximise, rows
        self.seen: dict[str, dict[str, Any]] = {}
        self._live: Live | None = None
        self._began = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "maximise": self.maximise, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        LiveTable.__init__(self, None, **state)

    @property
    def unfinished(self) -> int:
        """Trials that Tune knows and has not brought to an end."""
        return sum(row["state"] not in ENDED for row in self.seen.values())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._row(trial)["state"] = "running"
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._row(trial).update({k: result[k] for k in ("round", "objective", "bytes", "epsilon") if k in result})
        self._show()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "ended")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for trial in trials:
            row = self._row(trial)
            if trial.status in ("TERMINATED", "ERROR") and row["state"] not in ENDED:
                row["state"] = "ended" if trial.status == "TERMINATED" else "failed"

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the table as it stands."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()
            self._live = None

    def _row(self, trial: Any) -> dict[str, Any]:
        if trial.trial_id not in self.seen:
            self.seen[trial.trial_id] = {"name": _name(trial), "state": "waiting"}
        return self.seen[trial.trial_id]

    def _end(self, trial: Any, state: str) -> None:
        row = self._row(trial)
        row["state"] = state
        if not self.console.is_terminal:
            ended = sum(r["state"] in ENDED for r in self.seen.values())
            value = f"{row['objective']:.4f} after round {row['round']}" if "objective" in row else "no result"
            self.console.print(
                f"[{ended}/{max(self.count, len(self.seen))}] {row['name']}  {state}: {value}",
                soft_wrap=True,
            )
        self._show()

    def _show(self) -> None:
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=2, transient=False)
            self._live.start()
        self._live.update(self._table())

    def _table(self) -> Group:
        table = Table(title_justify="left")
        for column in ("trial", "", "round", "objective", "moved", "epsilon"):
            table.add_column(column, justify="left" if column in ("trial", "") else "right", no_wrap=column != "trial")
        # Those that run, then the best of those that ended: always as many lines as fit.
        running = [row for row in self.seen.values() if row["state"] == "running"]
        ended = sorted((row for row in self.seen.values() if row["state"] in ENDED), key=self._rank)
        for row in [*running, *ended][: self.rows]:
            table.add_row(*_cells(row))
        return Group(table, f"{self._counts()}; {time.monotonic() - self._began:.0f} s")

    def _rank(self, row: dict[str, Any]) -> float:
        """The best first, those without a result last."""
        if "objective" not in row:
            return float("inf")
        return -row["objective"] if self.maximise else row["objective"]

    def _counts(self) -> str:
        """How many trials are in which state; those that Tune has not seen yet wait."""
        rows = self.seen.values()
        states = {state: sum(row["state"] == state for row in rows) for state in ("running", "waiting", *ENDED)}
        states["waiting"] += max(0, self.count - len(rows))
        return ", ".join(f"{count} {state}" for state, count in states.items() if count)


def _name(trial: Any) -> str:
    """A trial of a list by its name, another by what was drawn for it."""
    listed = trial.config.get("trial")
    if listed:
        return listed["name"]
    return f"{trial.trial_id} " + ", ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in trial.config.items())


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    return (
        row["name"],
        row["state"],
        f"{row.get('round', '-')}",
        f"{row['objective']:.4f}" if "objective" in row else "-",
        size(row["bytes"]) if "bytes" in row else "-",
        f"{row['epsilon']:.3g}" if row.get("epsilon") is not None else "-",
    )
