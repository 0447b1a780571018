"""A sweep from its command line to its folder: read it, check everything, run all trials, clean up."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.argv import split
from fedray.config.read import read_config
from fedray.config.sections import Config
from fedray.errors import ConfigError, FedrayError
from fedray.federation.cluster import nodes_there, ray_session
from fedray.federation.folder import check_lasting, rooted
from fedray.federation.placement import Node
from fedray.federation.prepare import Prepared, prepare
from fedray.privacy.keys import KeyStore
from fedray.privacy.selection import draw_runs
from fedray.stopping import interruption
from fedray.sweep.budget import check_budget
from fedray.sweep.folder import SweepFolder, TrialFolder
from fedray.sweep.resources import UNLIMITED, bundles, cache_folder, check_placeable
from fedray.sweep.space import Sweep, in_words, load_space, settings, values_of
from fedray.sweep.trial import Shared
from fedray.sweep.trials import Trial, as_word, corners, objective_of, trials_of
from fedray.sweep.tuning import TRACKERS, TRIAL_ATTEMPTS, Goal, listed_name, tuner

Say = Callable[[str], None]
#: Makes the live view, from the number of trials and whether more is better.
View = Callable[[int, bool], tune.Callback]


@dataclass(frozen=True)
class Request:
    """A sweep as a person asked for it, read and checked: what to run, where, and how. `base`: the config that all
    trials share; `notes`: what the person should know of how it was read."""

    sweep: Sweep
    space: str
    base: Config
    out: Path
    resume: bool
    trackers: tuple[str, ...]
    notes: tuple[str, ...] = ()


# --- reading ----------------------------------------------------------------------------------------------------------

_FLAGS = {"space", "out", "resume", "track", "seeds", "samples", "max-concurrent"}


def read_sweep(argv: Sequence[str]) -> Request:
    """`--space F.py [--out DIR] [--resume] [--seeds 0,1] [--samples N] [--max-concurrent N] [--track mlflow,wandb]` and
    config flags, which win over the space's base and fix a key of the space. Raises ConfigError."""
    flags, rest = split(argv, lambda name: name in _FLAGS, switches=("resume",))
    if "space" not in flags:
        raise ConfigError("fedray sweep needs --space F.py, a search space such as tune_spaces/smoke.py")
    sweep = load_space(flags["space"])
    change = _changes(flags)
    given = [word[2:] for word in rest if word.startswith("--")]
    _check_given(given, sweep)
    fixed = [key for key in sweep.space if key in given]
    sweep = replace(sweep, space={key: axis for key, axis in sweep.space.items() if key not in fixed}, **change)
    tracked = _tracked(flags)
    base = _base(sweep, rest)
    check_lasting("--out", flags.get("out"))
    default = Path("runs", f"sweep-{Path(flags['space']).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    out = Path(flags.get("out", default)).absolute()
    notes = tuple(f"{key} is fixed by the command line, and no longer part of the space" for key in fixed)
    return Request(sweep, flags["space"], base, out, "resume" in flags, tracked, notes)


def _changes(flags: dict[str, str]) -> dict[str, Any]:
    """What the flags change of the sweep itself."""
    change: dict[str, Any] = {}
    try:
        if "seeds" in flags:
            change["seeds"] = tuple(int(seed) for seed in flags["seeds"].split(","))
        for flag, name in (("samples", "samples"), ("max-concurrent", "max_concurrent")):
            if flag in flags:
                change[name] = int(flags[flag])
    except ValueError as error:
        raise ConfigError(f"--seeds, --samples and --max-concurrent hold whole numbers: {error}") from None
    return change


def _check_given(given: Sequence[str], sweep: Sweep) -> None:
    """Raises ConfigError for config flags that the sweep sets itself, or that would break what its space varies
    together."""
    for key in given:
        if key in ("seed", "output.dir", "output.resume", "output.track"):
            raise ConfigError(f"--{key} is set by the sweep itself: use --seeds, --out, --resume or --track")
    together = {key for axis in sweep.space.values() for value in values_of(axis) for key in _keys_within(value)}
    if "entry" in sweep.space or "entry" in together:
        together |= {"method.name", "adapter.kind"}
    for key in given:
        if key in together:
            raise ConfigError(
                f"--{key} is what the space varies together with other keys: leave it out, or write a space of your own"
            )


def _keys_within(value: Any) -> Iterable[str]:
    """The keys of a value that stands for several of them."""
    return value.keys() if isinstance(value, Mapping) else ()


def _tracked(flags: dict[str, str]) -> tuple[str, ...]:
    names = tuple(name for name in flags.get("track", "").split(",") if name)
    if strange := [name for name in names if name not in TRACKERS]:
        raise ConfigError(
            f"--track '{strange[0]}' is not known: choose {', '.join(TRACKERS)} "
            "(TensorBoard's files are always written)"
        )
    return names


def _base(sweep: Sweep, argv: Sequence[str]) -> Config:
    """What all trials share: a file of `--config`, over it the space's base, over that the flags, as if the base had
    been given in front of them."""
    words = [word for key, value in settings(sweep.base).items() for word in (f"--{key}", as_word(value))]
    return rooted(read_config([*words, *argv]))


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A sweep that has passed every check. `trials`: all of them, or, of an adaptive search, the corners of what it
    may try; `left_out`: a line for each combination that no method admits; `count`: how many trials there will be."""

    shared: Shared
    trials: list[Trial]
    left_out: list[str]
    count: int
    goal: Goal


def _check(request: Request, draws: int, seed: int, say: Say) -> Checked:
    """Find the trials and check all of them; `say` is told what is left out. Raises ConfigError."""
    sweep, base = request.sweep, request.base
    nodes = nodes_there()
    shared = Shared(sweep, base, str(request.out), sum(node.resources.get("GPU", 0.0) for node in nodes))
    trials, left_out = (corners(sweep, base), []) if sweep.adaptive else trials_of(sweep, base, draws, seed)
    metric, mode = objective_of(sweep, trials[0].config)
    for line in (*request.notes, *(f"left out: {text}" for text in left_out)):
        say(line)
    if len({trial.config.model.task for trial in trials}) > 1:
        raise ConfigError("the space varies model.task, whose metrics cannot be compared: make two sweeps")
    prepared = [_check_trial(trial, shared, nodes) for trial in trials]
    count = sweep.samples * len(sweep.seeds) if sweep.adaptive else len(trials)
    check_budget(trials, prepared, times=count if sweep.adaptive else None)
    rounds = max(trial.config.federation.rounds for trial in trials)
    return Checked(shared, trials, left_out, count, Goal(metric, mode, rounds))


def _check_trial(trial: Trial, shared: Shared, nodes: Sequence[Node]) -> Prepared:
    prepared = prepare(trial.config, UNLIMITED)
    if trial.config.worker.wait is None:
        needed = bundles(trial.config, len(prepared.data.clients), shared.gpus_there)
        check_placeable(trial.name, needed, nodes)
    return prepared


def _check_folder(request: Request) -> None:
    """Raises ConfigError where --out holds anything but this sweep, or this sweep without --resume."""
    folder, out = SweepFolder(request.out), request.out
    if not out.exists() or not any(out.iterdir()):
        return  # with --resume too: a job that is submitted again says the same
    if not folder.has_settings and not folder.keys.is_dir():
        raise ConfigError(f"--out '{out}' is not empty and holds no sweep: choose another")
    if not request.resume:
        raise ConfigError(f"--out '{out}' holds another sweep: choose another, or go on with it by --resume")
    if folder.has_settings:
        _check_same(folder.settings, request)


def _check_same(kept: dict[str, Any], request: Request) -> None:
    """Raises ConfigError where `sweep.json` says that something else was asked for."""
    now = json.loads(json.dumps({"base": _dump(request.base), "sweep": in_words(request.sweep)}))
    if kept["base"] != now["base"] or kept["sweep"] != now["sweep"]:
        raise ConfigError(
            f"--out '{request.out}' holds a sweep of another space or other flags: "
            "give the same to resume it, or another --out"
        )


def _dump(base: Config) -> dict[str, Any]:
    return base.model_dump(mode="json", exclude_unset=True)


def _draws(request: Request) -> tuple[int, int]:
    """How many draws of the space, and the seed that they come from: as asked and 0, or both secret, the same ones
    after a resume. Raises FedrayError where the secret number is 0."""
    sweep = request.sweep
    if sweep.random_stopping is None:
        return sweep.samples, 0
    request.out.mkdir(parents=True, exist_ok=True)
    key = KeyStore(SweepFolder(request.out).keys).key("sweep", "runs")
    draws = draw_runs(sweep.random_stopping, sweep.samples, key.stream("runs"))
    if draws == 0:
        raise FedrayError(
            "the secret number of runs came out as 0, which is part of the guarantee: nothing is released"
        )
    return draws, int(key.stream("points").integers(1)[0] % 2**32)


# --- doing it ---------------------------------------------------------------------------------------------------------


def run_sweep(request: Request, view: View, say: Say) -> Path:
    """Check everything, run all trials, and return the folder, where `fedray.report.sweep` finds them. Raises
    ConfigError before anything runs, KeyboardInterrupt when it was stopped."""
    _check_folder(request)
    _set_up_tune()
    draws, seed = _draws(request)
    folder, over = SweepFolder(request.out), False
    with ray_session():
        checked = _check(request, draws, seed, say)
        folder.write_settings(_settings(request, checked))
        goal = checked.goal
        say(f"{checked.count} trials, {goal.metric} ({goal.mode}), in {request.out}")
        try:
            live = view(checked.count, goal.mode == "max")
            results = tuner(checked.shared, checked.trials, goal, live, request.trackers).fit()
            _note_failures(folder, results)
            over = _is_over(folder, checked)
            _tell_failures(folder, checked, say)
        finally:
            _clean_up(folder, over)
    if not over:
        raise interruption()
    return request.out


def _set_up_tune() -> None:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own output, which scrolls; the live view has its place
    # A trial that fails before its first report fails alone.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")  # what a kill of the sweep may forget of an adaptive search


def _settings(request: Request, checked: Checked) -> dict[str, Any]:
    """`sweep.json`."""
    sweep = request.sweep
    return {
        "space": request.space,
        "base": _dump(request.base),
        "sweep": in_words(sweep),
        "objective": checked.goal.metric,
        "mode": checked.goal.mode,
        "trials": [] if sweep.adaptive else [{"name": t.name, "values": t.values} for t in checked.trials],
        "left_out": checked.left_out,
        "random_stopping": [sweep.random_stopping, sweep.samples] if sweep.random_stopping else None,
    }


def _trials(folder: SweepFolder, checked: Checked) -> list[TrialFolder]:
    """The trials of the list, or those that an adaptive search has begun."""
    if checked.shared.sweep.adaptive:
        return folder.begun()
    return [folder.trial(trial.name) for trial in checked.trials]


def _is_over(folder: SweepFolder, checked: Checked) -> bool:
    """Whether every trial has come to its end."""
    trials = _trials(folder, checked)
    return sum(trial.ended for trial in trials) >= max(checked.count, len(trials))


def _note_failures(folder: SweepFolder, results: tune.ResultGrid) -> None:
    """Write down which trials Tune has given up. It was not their own fault: --resume tries them again."""
    for result in (results[i] for i in range(len(results))):
        trial = _folder_of(folder, result) if result.error is not None else None
        if trial is not None and not trial.failed:
            lines = str(result.error).strip().splitlines() or [type(result.error).__name__]
            trial.fail(f"it was tried {TRIAL_ATTEMPTS} times: {lines[-1]}")


def _folder_of(folder: SweepFolder, result: tune.Result) -> TrialFolder | None:
    """The folder of one of Tune's results; None of a trial that had drawn nothing yet."""
    name = listed_name(result.config or {})
    if name is not None:
        return folder.trial(name)
    identity = Path(result.path).name
    return next((trial for trial in folder.begun() if trial.name.startswith(f"{identity},")), None)


def _tell_failures(folder: SweepFolder, checked: Checked, say: Say) -> None:
    for trial in _trials(folder, checked):
        if trial.failed:
            say(f"failed: {trial.name}: {trial.reason}")


def _clean_up(folder: SweepFolder, over: bool) -> None:
    """On every machine: remove what the trials shared, and, when the whole sweep is over, the noise keys of runs that a
    scheduler ended, so that nobody takes their noise away. A sweep that was stopped needs them to go on with the same
    noise."""
    keys = _left_keys(folder) if over else []
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node, soft=True) for node in nodes]
    ray.get([_remove.options(scheduling_strategy=p).remote(cache_folder(folder.out), keys) for p in places])


def _left_keys(folder: SweepFolder) -> list[tuple[str | None, str]]:
    """Where the keys of runs that did not finish lie, and the runs' names in the key store."""
    keys = []
    for trial in folder.runs():
        ledger = trial.ledger
        if ledger is not None and not trial.finished:
            keys.append((trial.config.privacy.key_dir, ledger.run))
    return keys


@ray.remote(num_cpus=0)
def _remove(cache: Path, keys: list[tuple[str | None, str]]) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    for folder, run in keys:
        KeyStore(folder).forget_run(run)
