"""What a person asks a comparison for, read and checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedray.argv import split
from fedray.compare.entries import Entry
from fedray.config.read import read_config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.folder import check_lasting

_DEFAULTS = {
    "methods": "fedit,ffa,fedex,fra,flora",
    "seeds": "0,1,2",
    "lrs": "1e-3,3e-3,1e-2",
    "out": "runs/compare",
    "jobs": "1",
}
#: Set by the comparison for each run.
_TAKEN = ("--seed", "--federation.lr", "--output.dir", "--method.name", "--adapter.kind")


@dataclass(frozen=True)
class Request:
    """`flags`: the comparison's own, with defaults; `shared`: the words that every run is given; `rates`: each
    entry's grid of learning rates, the smallest first; `jobs`: how many runs at a time."""

    flags: Mapping[str, str]
    shared: Sequence[str]
    entries: Sequence[Entry]
    rates: Mapping[Entry, Sequence[float]]
    seeds: Sequence[int]
    jobs: int

    @property
    def out(self) -> Path:
        return Path(self.flags["out"])

    def folder(self, entry: Entry, name: str) -> Path:
        """The run directory of that name."""
        return self.out / entry.text.replace("+", "-").replace("@", "-rank-") / name

    def run(self, entry: Entry, lr: float, seed: int, *more: str) -> list[str]:
        """The words that mean one run."""
        return [*self.shared, *entry.flags(self.flags), "--federation.lr", str(lr), "--seed", str(seed), *more]

    def tuning_run(self, entry: Entry, lr: float) -> list[str]:
        """The words of a run that a rate is judged by: with the first seed, on the validation split."""
        return self.run(entry, lr, self.seeds[0], "--data.evaluate_on", "validation")


def read_request(argv: Sequence[str]) -> Request:
    """The request that a command line means. `--lrs.ENTRY` is one entry's own grid, `--set.ENTRY key=value,key=value`
    what only its runs are given. Raises ConfigError, also for a config that the entries cannot share."""
    flags, shared = split(argv, lambda name: name in _DEFAULTS or name.startswith(("lrs.", "set.")))
    flags = _DEFAULTS | flags
    config = read_config(shared)
    adapter = config.adapter.kind if "kind" in config.adapter.model_fields_set else None
    entries = [Entry.parse(text, adapter) for text in flags["methods"].split(",")]
    try:
        seeds, jobs = [int(seed) for seed in flags["seeds"].split(",")], int(flags["jobs"])
        rates = {e: sorted(map(float, flags.get(f"lrs.{e.text}", flags["lrs"]).split(","))) for e in entries}
    except ValueError as error:
        raise ConfigError(f"--seeds, --lrs and --jobs hold numbers: {error}") from None
    request = Request(flags, shared, entries, rates, seeds, jobs)
    _check_entries_named(request)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {flags['seeds']} names a seed twice")
    if config.data.evaluate_on != "test":
        raise ConfigError("data.evaluate_on is set by the comparison itself: it tunes on validation and ends on test")
    _check_rest(request)
    check_lasting("--out", flags["out"])
    return request


def _check_entries_named(request: Request) -> None:
    texts = [entry.text for entry in request.entries]
    for flag in request.flags.keys() - _DEFAULTS.keys():
        if flag.split(".", 1)[1] not in texts:
            raise ConfigError(f"--{flag} names no entry of --methods {request.flags['methods']}")


def _check_rest(request: Request) -> None:
    if request.jobs < 1:
        raise ConfigError(f"--jobs {request.jobs}: at least one run at a time")
    if twice := next((entry.text for entry in request.entries if request.entries.count(entry) > 1), None):
        raise ConfigError(f"--methods names {twice} twice: give the two different ranks, or two comparisons")
    for flag in _TAKEN:
        if flag in request.shared:
            raise ConfigError(f"{flag} is set by the comparison itself: use --seeds, --lrs, --out or --methods")


def higher_is_better(request: Request) -> dict[Entry, bool]:
    """Of each entry's metric; reads the config of every rate on the way. Raises ConfigError for one that is bad or of
    a single run, and where clients count with their examples for one entry and alike for another."""
    higher, by_examples = {}, set()
    for entry in request.entries:
        configs = [read_config(request.run(entry, lr, request.seeds[0])) for lr in request.rates[entry]]
        if configs[-1].output.checkpoints is not None:
            raise ConfigError("output.checkpoints is the place of one run, and a comparison has many: leave it out")
        higher[entry] = TASKS[configs[-1].model.task].higher_is_better
        by_examples.add(configs[-1].by_examples)
    if len(by_examples) > 1:
        raise ConfigError(
            "with method.robust_rule clients count alike, and for the other entries with their examples: give "
            "--method.weights equal for all"
        )
    return higher
