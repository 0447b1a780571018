"""`fedray compare`: several methods and seeds on the same partitions and the same budget of examples, one table and one picture.

The learning rate is tuned for each method by a small grid on a validation split (`data.evaluate_on validation`: the source's own, or one carved
out of the training examples), never on the examples of the final metric: a comparison at one learning rate is void (METHODS.md 6.14). Every run is an ordinary run directory under `--out`; a finished one
is not repeated and one that was cut off is resumed, so a comparison can be stopped and started at will.
"""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.argv import split
from fedray.config.read import read_config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError, FedrayError
from fedray.federation.folder import check_lasting, differences, rooted
from fedray.federation.results import read_run_config
from fedray.methods import METHODS
from fedray.stopping import Terminated

_OWN = {
    "methods": "fedit,ffa,fedex,fra,flora",
    "seeds": "0,1,2",
    "lrs": "1e-3,3e-3,1e-2",
    "out": "runs/compare",
    "jobs": "1",
}


@dataclass(frozen=True)
class Entry:
    """One line of the comparison: `[ADAPTER+]METHOD[@RANK]`. An adapter that is not named is the config's own where it fits the
    method, else the method's first."""

    text: str
    adapter: str
    method: str
    rank: str | None

    @staticmethod
    def parse(text: str, own: str | None) -> Entry:
        """`own`: the adapter that the config names. Raises ConfigError for anything else."""
        found = re.fullmatch(r"(?:([\w-]+)\+)?([\w-]+)(?:@(\d+))?", text)
        if not found or found[2] not in METHODS:
            raise ConfigError(
                f"--methods '{text}' is not known: write [ADAPTER+]METHOD[@RANK] with a method of {', '.join(METHODS)}"
            )
        fits = METHODS[found[2]].adapters
        return Entry(text, found[1] or (own if own in fits else fits[0]), found[2], found[3])

    def flags(self, own: dict[str, str]) -> list[str]:
        """`own`: the comparison's flags, among them perhaps this entry's."""
        given = [part.split("=", 1) for part in re.split(r",(?=[\w.]+=)", own.get(f"set.{self.text}", "")) if part]
        for part in given:
            if len(part) != 2:
                raise ConfigError(f"--set.{self.text} '{part[0]}' is no setting: write key=value,key=value")
            if not part[0].startswith(("adapter.", "method.", "federation.proximal")) or part[0] in (
                "adapter.kind",
                "method.name",
                "method.weights",
            ):
                raise ConfigError(
                    f"--set.{self.text} may set keys of adapter and method, and not '{part[0]}': it is one for all entries"
                )
        rank = ["--adapter.rank", self.rank] if self.rank else []
        return [
            "--method.name",
            self.method,
            "--adapter.kind",
            self.adapter,
            *rank,
            *(f for k, v in given for f in (f"--{k}", v)),
        ]


@dataclass(frozen=True)
class Result:
    """One entry's outcome: the tuned rate, what each rate gave on the validation split (None: it diverged), and a summary a seed."""

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
    known = [v for v in values if v is not None]
    return max(known) if known else None


def split_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The comparison's own flags (with defaults) and those of the runs. `--lrs.ENTRY` is one entry's own grid, `--set.ENTRY
    key=value,key=value` what only its runs are given."""
    own, rest = split(argv, lambda name: name in _OWN or name.startswith(("lrs.", "set.")))
    return _OWN | own, rest


def compare(argv: list[str], say: Callable[[str], None]) -> tuple[list[Result], Path]:
    """Run everything and write `compare.json`, `compare.csv` and `compare.png`. `say` is told of each run that ends.

    Raises ConfigError before anything runs when one of the configs is bad, FedrayError when a final run fails.
    """
    own, rest = split_flags(argv)
    shared = read_config(rest)
    kind = shared.adapter.kind if "kind" in shared.adapter.model_fields_set else None
    entries = [Entry.parse(text, kind) for text in own["methods"].split(",")]
    try:
        seeds, jobs = [int(s) for s in own["seeds"].split(",")], int(own["jobs"])
        rates = {e: sorted(float(x) for x in own.get(f"lrs.{e.text}", own["lrs"]).split(",")) for e in entries}
    except ValueError as error:
        raise ConfigError(f"--seeds, --lrs and --jobs hold numbers: {error}") from None
    for flag in own.keys() - _OWN.keys():
        if flag.split(".", 1)[1] not in [e.text for e in entries]:
            raise ConfigError(f"--{flag} names no entry of --methods {own['methods']}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {own['seeds']} names a seed twice")
    if shared.data.evaluate_on != "test":
        raise ConfigError("data.evaluate_on is set by the comparison itself: it tunes on validation and ends on test")
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least one run at a time")
    if twice := next((e.text for e in entries if entries.count(e) > 1), None):
        raise ConfigError(f"--methods names {twice} twice: give the two different ranks, or two comparisons")
    for flag in ("--seed", "--federation.lr", "--output.dir", "--method.name", "--adapter.kind"):
        if flag in rest or any(word.startswith(f"{flag}=") for word in rest):
            raise ConfigError(f"{flag} is set by the comparison itself: use --seeds, --lrs, --out or --methods")
    check_lasting("--out", own["out"])
    out = Path(own["out"])
    higher = {}
    for e in entries:
        for lr in rates[e]:
            config = read_config([*rest, *e.flags(own), "--federation.lr", str(lr), "--seed", str(seeds[0])])
        higher[e] = TASKS[config.model.task].higher_is_better

    def folder(entry: Entry, name: str) -> Path:
        return out / entry.text.replace("+", "-").replace("@", "-rank-") / name

    def tune(job: tuple[Entry, float]) -> float | None:
        entry, lr = job
        flags = [
            *rest,
            *entry.flags(own),
            "--federation.lr",
            str(lr),
            "--seed",
            str(seeds[0]),
            "--data.evaluate_on",
            "validation",
        ]
        summary = _run(flags, folder(entry, f"tune-{lr:g}"), must=False)
        say(
            f"{entry.text}  lr {lr:g}: "
            + (f"{summary['final']:.4f} on validation" if summary else "failed: see its log")
        )
        return summary["final"] if summary else None

    def final(job: tuple[Entry, float, int]) -> dict[str, Any]:
        entry, lr, seed = job
        flags = [*rest, *entry.flags(own), "--federation.lr", str(lr), "--seed", str(seed)]
        summary = _run(flags, folder(entry, f"lr-{lr:g}-seed-{seed}"), must=True)
        say(f"{entry.text}  lr {lr:g}, seed {seed}: {summary['final']:.4f}")
        return summary

    with _stopping_children(), ThreadPoolExecutor(jobs) as pool:
        grid = [(entry, lr) for entry in entries if len(rates[entry]) > 1 for lr in rates[entry]]
        tuned: dict[Entry, dict[float, float | None]] = {entry: {} for entry in entries}
        for (entry, lr), value in zip(grid, pool.map(tune, grid), strict=True):
            tuned[entry][lr] = value
        best = {e: _best(e, tuned[e], higher[e]) if tuned[e] else rates[e][0] for e in entries}
        work = [(entry, best[entry], seed) for entry in entries for seed in seeds]
        summaries = list(pool.map(final, work))
    results = [
        Result(
            entry,
            best[entry],
            tuned[entry],
            [s for (e, _, _), s in zip(work, summaries, strict=True) if e == entry],
            higher[entry],
        )
        for entry in entries
    ]
    rows = [result.row() for result in results]
    (out / "compare.json").write_text(
        json.dumps([row | {"tuning": r.tuning} for row, r in zip(rows, results, strict=True)], indent=2)
    )
    with (out / "compare.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(rows).savefig(out / "compare.png", dpi=130)
    return results, out


#: Runs that go on now.
_children: list[subprocess.Popen] = []


@contextmanager
def _stopping_children() -> Iterator[None]:
    """Ctrl-C or SIGTERM in the comparison ends its runs too, each with its last round kept, and starts no other."""
    global _stopped
    _stopped = False
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        global _stopped
        _stopped = True
        for child in _children:
            child.terminate()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    for number in previous if ours else ():
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items() if ours else ():
            signal.signal(number, handler)


_stopped = False


def _best(entry: Entry, values: dict[float, float | None], higher: bool) -> float:
    known = {lr: v for lr, v in values.items() if v is not None and math.isfinite(v)}
    if not known:
        raise FedrayError(
            f"{entry.text} failed at every learning rate of the grid: look into its run.log, or give other --lrs"
        )
    return (max if higher else min)(known, key=known.__getitem__)


def _run(flags: list[str], folder: Path, must: bool) -> dict[str, Any] | None:
    """The summary of one run, from its directory where it is there already. None when it failed and need not succeed.

    Raises ConfigError when the directory holds a run of another config.
    """
    summary, log, failed = (
        folder / "summary.json",
        folder.parent / f"{folder.name}.log",
        folder.parent / f"{folder.name}.failed",
    )
    if folder.is_dir() and (found := differences(read_run_config(folder), rooted(read_config(flags)))):
        raise ConfigError(
            f"'{folder}' holds a run with another {found[0]} ({found[1]}, now {found[2]}): give another --out"
        )
    if summary.is_file():
        return json.loads(summary.read_text())
    if failed.is_file() and not must:  # the same config would fail again
        return None
    if _stopped:
        raise FedrayError("the comparison was stopped")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        command = [sys.executable, "-m", "fedray.cli", "run", *flags, "--output.dir", str(folder), "--output.resume"]
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _children.append(child)
        try:
            code = child.wait()
        finally:
            _children.remove(child)
    if code == 0:
        return json.loads(summary.read_text())
    said = (log.read_text().strip().splitlines() or ["it said nothing"])[-1].removeprefix("fedray: ")
    if code == 2:
        raise ConfigError(f"{said} (see {log})")
    if must:
        raise FedrayError(f"a run failed: {said} (see {log})")
    if "the loss became" in said or "not finite" in said:  # it diverged, and would again; any other failure may pass
        failed.write_text(said)
    return None


def picture(rows: list[dict[str, Any]]):
    """A matplotlib figure: final metric (mean, and smallest to largest over the seeds) against all bytes of a run, both directions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    order, place_of = sorted(rows, key=lambda r: (r["bytes_up"] + r["bytes_down"], r["mean"])), {}
    for row in order:  # methods that move the same bytes stand side by side
        x = (row["bytes_up"] + row["bytes_down"]) / 2**20
        while any(abs(math.log(x / other)) < 0.015 for other in place_of.values()):
            x *= 1.02
        place_of[row["method"]] = x
    for i, row in enumerate(order):
        error = [[row["mean"] - min(row["finals"])], [max(row["finals"]) - row["mean"]]]
        axes.errorbar(
            place_of[row["method"]], row["mean"], yerr=error, fmt="o", capsize=3, color=f"C{i % 10}", alpha=0.8
        )
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.25)  # room for the labels of the last points
    axes.set_xlabel("MiB moved in the whole run, all clients, up and down (start included)")
    better = "" if rows[0].get("higher_is_better", True) else " (lower is better)"
    axes.set_ylabel(f"final {rows[0]['metric'].replace('_', ' ')}{better}: mean, smallest to largest")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    figure.canvas.draw()
    place = axes.transData.transform
    taken: list[Bbox] = []  # no label on an error bar, its own apart
    for row in order:
        x = place_of[row["method"]]
        (left, low), (right, high) = place((x, min(row["finals"]))) - (3, 0), place((x, max(row["finals"]))) + (3, 0)
        taken.append(Bbox([[left, low], [right, high]]))
    for i, row in enumerate(
        order
    ):  # a label moves away from its point, in turn up and down, until it is clear of what is there
        x, y = place_of[row["method"]], row["mean"]
        label = axes.annotate(
            row["method"],
            (x, y),
            (8, 0),
            textcoords="offset points",
            color=f"C{i % 10}",
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": f"C{i % 10}"},
        )
        for step in range(1, 120):
            label.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # the words alone, without the line to the point
            if axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1 and not any(box.overlaps(other) for other in taken):
                break
            label.set_position((8, 3 * ((step + 1) // 2) * (1 if step % 2 else -1)))
        taken.append(box)
    return figure
