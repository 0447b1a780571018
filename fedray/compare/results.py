"""What a comparison gives: a result for each entry, and the table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.compare.entries import Entry
from fedray.compare.picture import picture


@dataclass(frozen=True)
class Result:
    """One entry's outcome: the tuned rate, what each rate gave on the validation split (None: it diverged), and a
    summary a seed."""

    entry: Entry
    lr: float
    tuning: dict[float, float | None]
    summaries: list[dict[str, Any]]
    higher_is_better: bool

    @property
    def finals(self) -> list[float]:
        return [s["final"] for s in self.summaries]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the grid's first or last: the grid may have missed a better one."""
        return len(self.tuning) > 2 and self.lr in (min(self.tuning), max(self.tuning))

    def row(self) -> dict[str, Any]:
        """The line of the table. Bytes are of the whole run and all clients; seconds the median run."""
        summaries = self.summaries
        return {
            "method": self.entry.text,
            "metric": summaries[0]["metric"],
            "higher_is_better": self.higher_is_better,
            "mean": statistics.mean(self.finals),
            "st_dev": statistics.stdev(self.finals) if len(self.finals) > 1 else 0.0,
            "finals": self.finals,
            "lr": self.lr,
            "lr_at_edge_of_grid": self.at_edge,
            "trainable_params": summaries[0]["trainable_params"],
            "bytes_up": statistics.median(s["bytes_up"] for s in summaries),
            "bytes_down": statistics.median(s["bytes_down"] for s in summaries),
            "aggregation_error": _most(s["aggregation_error"] for s in summaries),
            "exactness": _most(s["exactness"] for s in summaries),
            "epsilon": _most(s["epsilon"] for s in summaries),
            "delta": _most(s["delta"] for s in summaries),
            "seconds": statistics.median(s["wall_seconds"] for s in summaries),
        }


def _most(values: Iterable[float | None]) -> float | None:
    """The largest of what is known."""
    return max((value for value in values if value is not None), default=None)


def write_results(results: Sequence[Result], out: Path) -> None:
    """Write `compare.json`, `compare.csv` and `compare.png`."""
    rows = [result.row() for result in results]
    lines = [row | {"tuning": result.tuning} for row, result in zip(rows, results, strict=True)]
    (out / "compare.json").write_text(json.dumps(lines, indent=2))
    with (out / "compare.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(rows).savefig(out / "compare.png", dpi=130)
