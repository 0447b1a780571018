"""A comparison's table, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedray.compare.results import Result
from fedray.report.words import share, size

_COLUMNS = (
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
    "epsilon",
    "s",
)


def print_comparison(console: Console, results: Sequence[Result]) -> None:
    """One line an entry; bytes are of the whole run, all clients."""
    rows = [result.row() for result in results]
    private = any(row["epsilon"] is not None for row in rows)
    columns = [column for column in _COLUMNS if private or column != "epsilon"]
    metric = rows[0]["metric"].replace("_", " ")
    table = Table(title=f"final {metric}, {len(results[0].finals)} seeds", title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cells = _cells(row)
        table.add_row(*(cells[column] for column in columns))
    console.print(table)
    _print_notes(console, results, rows[0]["delta"] if private else None)


def _print_notes(console: Console, results: Sequence[Result], delta: float | None) -> None:
    """`delta`: of private runs."""
    if delta is not None:
        runs = sum(len(result.tuning) + len(result.finals) for result in results)
        console.print(
            f"epsilon is of one run at delta {delta:g}; the {runs} runs behind this table, tuning included, "
            "are releases of the same data, and their sum is not accounted for",
            soft_wrap=True,
        )
    if any(result.at_edge for result in results):
        console.print("(edge): the best learning rate is the grid's first or last; give --lrs that reach further")


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row by column, in words; epsilon only where there is one."""
    values = (
        row["method"],
        f"{row['mean']:.4f}",
        f"{row['st_dev']:.4f}",
        ", ".join(f"{value:.4f}" for value in row["finals"]),
        f"{row['lr']:g}{' (edge)' if row['lr_at_edge_of_grid'] else ''}",
        f"{row['trainable_params']:,}",
        size(row["bytes_up"]),
        size(row["bytes_down"]),
        share(row["aggregation_error"], ".1%"),
        share(row["exactness"], ".1e"),
        "" if row["epsilon"] is None else f"{row['epsilon']:.3g}",
        f"{row['seconds']:.0f}",
    )
    return dict(zip(_COLUMNS, values, strict=True))
