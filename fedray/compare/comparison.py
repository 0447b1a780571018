"""A whole comparison: tune every entry's rate, run each with its best one, write the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedray.compare.entries import Entry
from fedray.compare.request import Request, higher_is_better, read_request
from fedray.compare.results import Result, write_results
from fedray.compare.runs import Runs
from fedray.errors import FedrayError

Say = Callable[[str], None]
#: What each of an entry's rates gave on the validation split (None: the run failed); empty where there is one rate
#: only.
Tuning = dict[Entry, dict[float, float | None]]


def compare(argv: Sequence[str], say: Say) -> tuple[list[Result], Path]:
    """Run everything and write `compare.json`, `compare.csv` and `compare.png`. `say` is told of each run that ends.

    Raises ConfigError before anything runs when one of the configs is bad, FedrayError when a final run fails.
    """
    request = read_request(argv)
    higher = higher_is_better(request)
    runs = Runs()
    with runs.stopping(), ThreadPoolExecutor(request.jobs) as pool:
        tuning = _tune(request, runs, pool, say)
        best = {e: _best(e, tuning[e], higher[e]) if tuning[e] else request.rates[e][0] for e in request.entries}
        summaries = _finish(request, best, runs, pool, say)
    results = [Result(e, best[e], tuning[e], summaries[e], higher[e]) for e in request.entries]
    write_results(results, request.out)
    return results, request.out


def _tune(request: Request, runs: Runs, pool: Executor, say: Say) -> Tuning:
    """Run every rate of every entry that has more than one."""

    def judge(job: tuple[Entry, float]) -> float | None:
        entry, lr = job
        summary = runs.tuning(request.tuning_run(entry, lr), request.folder(entry, f"tune-{lr:g}"))
        outcome = f"{summary['final']:.4f} on validation" if summary else "failed: see its log"
        say(f"{entry.text}  lr {lr:g}: {outcome}")
        return summary["final"] if summary else None

    grid = [(entry, lr) for entry in request.entries if len(request.rates[entry]) > 1 for lr in request.rates[entry]]
    tuning: Tuning = {entry: {} for entry in request.entries}
    for (entry, lr), value in zip(grid, pool.map(judge, grid), strict=True):
        tuning[entry][lr] = value
    return tuning


def _best(entry: Entry, values: Mapping[float, float | None], higher: bool) -> float:
    """The rate with the best metric. Raises FedrayError where none gave one."""
    known = {lr: value for lr, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        raise FedrayError(
            f"{entry.text} failed at every learning rate of the grid: look into its run.log, or give other --lrs"
        )
    return (max if higher else min)(known, key=known.__getitem__)


def _finish(
    request: Request, best: Mapping[Entry, float], runs: Runs, pool: Executor, say: Say
) -> dict[Entry, list[dict[str, Any]]]:
    """Run every entry at its best rate with every seed: the summaries, in the seeds' order."""

    def final(job: tuple[Entry, int]) -> dict[str, Any]:
        entry, seed = job
        lr = best[entry]
        summary = runs.final(request.run(entry, lr, seed), request.folder(entry, f"lr-{lr:g}-seed-{seed}"))
        say(f"{entry.text}  lr {lr:g}, seed {seed}: {summary['final']:.4f}")
        return summary

    jobs = [(entry, seed) for entry in request.entries for seed in request.seeds]
    summaries: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in request.entries}
    for (entry, _), summary in zip(jobs, pool.map(final, jobs), strict=True):
        summaries[entry].append(summary)
    return summaries
