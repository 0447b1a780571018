"""Sweeps: which trials, what is refused before anything runs, what they tell together, and whole sweeps on Ray."""

import io
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import ray
from dp_accounting import dp_event, pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle, tune
from ray.tune.experiment import Trial
from ray.util import placement_group_table
from support import ROOT

from fedray.cli import main
from fedray.config.read import read_config
from fedray.errors import ConfigError
from fedray.federation.placement import Node
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.privacy.accountant import ORDERS, Release, epsilon
from fedray.privacy.keys import Key
from fedray.privacy.ledger import Ledger
from fedray.privacy.selection import best_alone, composed, dominating, draw_runs
from fedray.report.live import LiveTable
from fedray.report.sweep.effects import effects, pareto, tied
from fedray.report.sweep.summary import sweep_privacy
from fedray.report.sweep.tables import points_table
from fedray.report.terminal import make_console
from fedray.sweep import Sweep
from fedray.sweep.budget import check_budget
from fedray.sweep.resources import bundles, cache_folder, check_placeable, placed
from fedray.sweep.run import read_sweep
from fedray.sweep.space import in_words, load_space
from fedray.sweep.space import settings as keys_of
from fedray.sweep.trials import corners, trials_of
from fedray.sweep.tuning import scheduler

SPACES = ROOT / "tune_spaces"


def space_file(folder: Path, text: str) -> str:
    path = folder / "space.py"
    path.write_text("from ray import tune\nfrom fedray.sweep import Sweep\n" + text)
    return str(path)


def tiny_flags(make_config, **overrides) -> list[str]:
    """The tiny config on the command line."""
    config = make_config(**overrides)
    path = Path(config.output.dir).parent / "c.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"output": config.output.model_copy(update={"dir": None}), "engine": "ray"})
    path.write_text(config.to_yaml())
    return ["--config", str(path)]


# --- which trials -------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed():
    sweep = Sweep(
        space={
            "entry": tune.grid_search(["fedex", "lora-sb+fed-sb@4"]),
            "federation.lr": tune.grid_search([0.1, 1e-3]),
            "privacy.epsilon": tune.grid_search([None, 3.0]),
        },
        seeds=(0, 7),
    )
    trials, left_out = trials_of(sweep, read_config(["--adapter.alpha", "4"]), 1)
    assert not left_out and len(trials) == 16 == len({t.name for t in trials})
    told = {
        (t.config.method.name, t.config.adapter.kind, t.config.federation.lr, t.config.privacy.epsilon, t.config.seed)
        for t in trials
    }
    assert told == set(itertools.product(["fedex"], ["lora"], [0.1, 1e-3], [None, 3.0], [0, 7])) | set(
        itertools.product(["fed-sb"], ["lora-sb"], [0.1, 1e-3], [None, 3.0], [0, 7])
    )
    assert all(t.config.adapter.alpha == 4 and "/" not in t.name for t in trials)
    assert {t.config.adapter.rank for t in trials if t.config.method.name == "fed-sb"} == {4}


def test_random_draws_are_the_same_every_time_and_equal_runs_are_made_once():
    sweep = Sweep(
        space={"federation.lr": tune.loguniform(1e-4, 1e-1), "adapter.rank": tune.choice([2, 4])},
        search="random",
        samples=9,
    )
    first, again = (trials_of(sweep, read_config([]), 9)[0] for _ in range(2))
    assert [t.values for t in first] == [t.values for t in again] and len(first) == 9
    assert all(1e-4 <= t.config.federation.lr <= 1e-1 for t in first)
    few = Sweep(space={"adapter.rank": tune.choice([2, 4])}, search="random", samples=20)
    assert sorted(t.config.adapter.rank for t in trials_of(few, read_config([]), 20)[0]) == [2, 4]


def test_pairs_that_no_method_admits_are_left_out_with_the_reason():
    sweep = Sweep(
        space={
            "method.name": tune.grid_search(["fedex", "fed-sb"]),
            "adapter.kind": tune.grid_search(["lora", "lora-sb"]),
        }
    )
    trials, left_out = trials_of(sweep, read_config([]), 1)
    assert {(t.config.method.name, t.config.adapter.kind) for t in trials} == {("fedex", "lora"), ("fed-sb", "lora-sb")}
    assert [line.split(": ")[0] for line in left_out] == ["fedex,kind=lora-sb", "fed-sb,kind=lora"]


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.py")), ids=lambda p: p.stem)
def test_every_space_that_ships_gives_configs_that_are_sound(path, tiny):
    sweep = load_space(str(path))
    flags = [w for k, v in keys_of(sweep.base).items() for w in (f"--{k}", str(v))]
    if path.stem == "heterogeneity":
        flags += [
            "--model.path",
            str(tiny / "bert"),
            "--model.task",
            "classification",
            "--data.source",
            str(tiny / "classes.csv"),
        ]
    if sweep.search == "optuna":
        assert len(corners(sweep, read_config(flags))) == 32
        return
    trials, left_out = trials_of(sweep, read_config(flags), sweep.samples)
    assert not left_out and len(trials) >= 8 and len({t.name for t in trials}) == len(trials)


@pytest.mark.parametrize(
    "text, words",
    [
        ("SWEEP = 3", "holds no SWEEP"),
        ("SWEEP = Sweep(space={})", "space is empty"),
        ("SWEEP = Sweep(space={'adapter.rnk': tune.grid_search([1])})", "did you mean adapter.rank"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([0])})", "adapter.rank"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.choice([1])})", "draws its values"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, search='grit')", "choose grid, random, optuna"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, stop='hyperband')", "choose asha, median, none"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, search='optuna')", "give tune.choice"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, seeds=(1, 1))", "different numbers"),
        ("SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, seed=1)", "cannot be read: TypeError"),
        ("SWEEP = Sweep(space={'entry': tune.grid_search(['fed-avg'])})", "is not known"),
        (
            "SWEEP = Sweep(space={'entry': tune.grid_search(['fedex@4']), 'adapter.rank': tune.grid_search([1])})",
            "leave one of them out",
        ),
        ("SWEEP = Sweep(space={'seed': tune.grid_search([1])})", "the space may not set seed"),
        ("SWEEP = Sweep(space={'output.dir': tune.grid_search(['x'])})", "the space may not set output.dir"),
        (
            (
                "SWEEP = Sweep(space={'method.name': tune.grid_search(['fed-sb']), 'adapter.kind': "
                "tune.grid_search(['lora'])})"
            ),
            "no trial is left",
        ),
        (
            (
                "SWEEP = Sweep(space={'model.task': tune.grid_search(['causal-lm', 'classification'])}, "
                "base={'model.path': 'x'})"
            ),
            "give data.source",
        ),
        (
            (
                "SWEEP = Sweep(space={'adapter.rank': tune.choice([1])}, search='random', stop='asha', "
                "random_stopping='poisson')"
            ),
            "stop='none'",
        ),
        (
            "SWEEP = Sweep(space={'adapter.rank': tune.choice([1])}, search='optuna', seeds=(0, 1), stop='asha')",
            "optuna learns from the mean",
        ),
        (
            (
                "SWEEP = Sweep(space={'adapter.rank': tune.grid_search([1])}, base={'privacy.unit': 'client', "
                "'privacy.sweep_epsilon': 3})"
            ),
            "privacy.unit",
        ),
        ("import nowhere", "ModuleNotFoundError"),
        ("SWEEP = (", "SyntaxError"),
    ],
)
def test_bad_spaces_are_refused_in_one_sentence(text, words, tmp_path, capsys, ray_session):
    assert main(["sweep", "--space", space_file(tmp_path, text), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert words in told.replace("\n", " ") and told.count("fedray: ") == 1 and "Traceback" not in told
    assert not (tmp_path / "out" / "trials").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "needs --space"),
        (["--space"], "--space needs a value"),
        (["--space", "none.py"], "does not exist"),
        (["--space", str(SPACES / "smoke.py"), "--seed", "3"], "--seed is set by the sweep"),
        (["--space", str(SPACES / "smoke.py"), "--seeds", "a"], "whole numbers"),
        (["--space", str(SPACES / "smoke.py"), "--track", "mlfow"], "choose mlflow, wandb"),
        (["--space", str(SPACES / "smoke.py"), "--adapter.rnk", "3"], "unknown key"),
        (["--space", str(SPACES / "smoke.py"), "--resume", "--out", str(SPACES)], "holds no sweep"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(flags, words, capsys):
    assert main(["sweep", *flags]) == 2
    told = capsys.readouterr().err
    assert words in told.replace("\n", " ") and "Traceback" not in told


def test_a_key_on_the_command_line_fixes_it():
    asked = read_sweep(["--space", str(SPACES / "smoke.py"), "--adapter.rank", "4", "--seeds", "1,2"])
    assert (
        "adapter.rank" not in asked.sweep.space
        and asked.notes
        and asked.base.adapter.rank == 4
        and asked.sweep.seeds == (1, 2)
    )


# --- resources ----------------------------------------------------------------------------------------------------


def test_what_can_never_be_placed_is_refused_with_the_arithmetic():
    two = bundles(read_config(["--worker.gpus", "1", "--federation.clients", "2"]), 2, 3)
    four = bundles(read_config(["--worker.gpus", "1", "--federation.clients", "4"]), 4, 3)
    assert (two.workers, four.workers) == (2, 4)
    one_node = [Node({"CPU": 8.0, "GPU": 3.0}, {})]
    check_placeable("a", two, one_node)
    with pytest.raises(
        ConfigError,
        match="4 workers of 1 CPU and 1 GPU = 4 CPUs and 4 GPUs, but the cluster has 8 CPUs, 3 GPUs: lower "
        "worker.count",
    ):
        check_placeable("a", four, one_node)
    # Enough together is not enough: no node has two GPUs free for one worker.
    wide = bundles(read_config(["--worker.gpus", "2", "--worker.count", "1"]), 2, 3)
    with pytest.raises(ConfigError, match="on 3 nodes, where 0 such workers fit"):
        check_placeable("a", wide, [Node({"CPU": 4.0, "GPU": 1.0}, {})] * 3)
    check_placeable("a", four, [Node({"CPU": 2.0, "GPU": 2.0}, {})] * 2)
    half = bundles(read_config(["--worker.gpus", "0.5", "--worker.count", "6"]), 2, 3)
    check_placeable("a", half, one_node)
    inline = bundles(read_config(["--engine", "inline", "--worker.cpus", "9"]), 2, 0)
    assert inline.workers == 0
    with pytest.raises(ConfigError, match="asks for 9 CPUs, but the cluster has 8 CPUs"):
        check_placeable("a", inline, one_node)


# --- what the trials tell together ----------------------------------------------------------------------------------


def accounted(releases) -> dp_event.DpEvent:
    return dp_event.ComposedDpEvent(
        [
            dp_event.SelfComposedDpEvent(
                dp_event.PoissonSampledDpEvent(r.rate, dp_event.GaussianDpEvent(r.noise)), r.steps
            )
            for r in releases
        ]
    )


@pytest.mark.parametrize("seed", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_sum_of_all_trials_is_what_an_independent_accountant_says(seed):
    draw = random.Random(seed)
    runs = [
        {
            c: [
                Release("count", 20.0),
                Release("training", draw.choice([0.9, 1.3, 2.0]), draw.choice([0.004, 0.02]), draw.choice([40, 150])),
            ]
            for c in "ab"
        }
        for _ in range(8)
    ]
    told = composed(runs, 1e-5, ["one"] * 8)
    for client in "ab":
        accountant = pld.PLDAccountant()
        accountant.compose(accounted([r for run in runs for r in run[client]]))
        assert told[client] == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)
    # Two splits: the worst of the four ways that an example may take through them, by the independent accountant too.
    ways = []
    for one, two in itertools.product("ab", repeat=2):
        accountant = pld.PLDAccountant()
        accountant.compose(accounted([r for i, run in enumerate(runs) for r in run[one if i < 5 else two]]))
        ways.append(accountant.get_epsilon(1e-5))
    assert composed(runs, 1e-5, ["one"] * 5 + ["two"] * 3)["(any client)"] == pytest.approx(max(ways), rel=0.02)
    # An example may be another client's in each run: too many ways to go through, and a bound over all of them.
    anywhere = composed(runs, 1e-5, list("01234567"))["(any client)"]
    assert anywhere >= max(told.values()) - 1e-6
    for pick in itertools.islice(itertools.product("ab", repeat=8), 0, 256, 51):
        assert anywhere >= epsilon([r for run, c in zip(runs, pick, strict=True) for r in run[c]], 1e-5) - 1e-6
    assert (
        composed(
            [{"a": [Release("training", 1.0)]}, {"a": [Release("a run without privacy", 0.0)]}], 1e-5, ["one"] * 2
        )["a"]
        == math.inf
    )


def test_dominating_releases_are_at_least_as_telling_as_any_clients():
    a = [Release("training", 1.0, 0.01, 10), Release("training", 2.0, 0.02, 5), Release("count", 20.0)]
    b = [Release("training", 3.0, 0.5, 2)]
    assert dominating([a, b]) == [Release("training", 1.0, 0.5, 15), Release("count", 20.0)]
    assert epsilon(dominating([a, b]), 1e-5) >= max(epsilon(a, 1e-5), epsilon(b, 1e-5))


@pytest.mark.parametrize(
    "noise, rate, steps, mean", [(1.0, 0.01, 500, 10.0), (2.0, 0.05, 300, 30.0), (0.8, 0.004, 1000, 5.0)]
)
def test_the_best_alone_is_what_dp_accounting_says_of_repeat_and_select(noise, rate, steps, mean):
    releases = [Release("count", 20.0), Release("training", noise, rate, steps)]
    for stopping, shape in (("geometric", 1.0), ("poisson", math.inf)):
        accountant = rdp.RdpAccountant(orders=ORDERS)
        accountant.compose(dp_event.RepeatAndSelectDpEvent(accounted(releases), mean, shape))
        assert best_alone(releases, 1e-5, stopping, mean) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
        assert best_alone(releases, 1e-5, stopping, mean) > epsilon(releases, 1e-5)
    assert best_alone([Release("training", 0.0)], 1e-5, "geometric", 3) == math.inf
    with pytest.raises(ValueError, match="drawn from geometric or poisson"):
        best_alone(releases, 1e-5, "uniform", 3)


def test_the_number_of_draws_has_the_distribution_that_the_theorem_asks_for():
    key = Key(b"k" * 32)
    for stopping, mean, variance in (("geometric", 4.0, 12.0), ("poisson", 4.0, 4.0)):
        drawn = pd.Series([draw_runs(stopping, mean, key.stream(stopping, i)) for i in range(20000)])
        assert drawn.mean() == pytest.approx(
            mean, abs=5 * math.sqrt(variance / 20000)
        ) and drawn.var() == pytest.approx(variance, rel=0.1)
        assert drawn.min() == (1 if stopping == "geometric" else 0)
    assert draw_runs("geometric", 1, key.stream("x")) == 1


def test_a_sweep_that_would_overspend_is_refused_before_it_starts(make_config, tmp_path, capsys, ray_session):
    flags = tiny_flags(
        make_config, method={"name": "ffa"}, privacy={"epsilon": 2.0, "delta": 1e-4, "sweep_epsilon": 2.5}
    )
    space = space_file(tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2, 3e-2])})")
    assert main(["sweep", "--space", space, "--out", str(tmp_path / "out"), *flags]) == 2
    assert (
        "3 trials together would spend epsilon" in capsys.readouterr().err
        and not (tmp_path / "out" / "trials").exists()
    )
    bare = space_file(tmp_path, "SWEEP = Sweep(space={'privacy.epsilon': tune.grid_search([None, 1.0])})")
    assert main(["sweep", "--space", bare, "--out", str(tmp_path / "out"), *flags, "--privacy.delta", "null"]) == 2
    assert "has no privacy.epsilon" in capsys.readouterr().err
    assert (
        main(["run", *flags, "--privacy.epsilon", "4"]) == 2
        and "above privacy.sweep_epsilon" in capsys.readouterr().err
    )


def test_the_budget_space_that_ships_can_be_afforded_and_more_of_it_cannot(tiny):
    """Twelve draws of the worst choice, not twelve of each."""
    sweep = load_space(str(SPACES / "budget.py"))
    base = [w for k, v in sweep.base.items() for w in (f"--{k}", str(v))]
    flags = [
        *base,
        "--model.path",
        str(tiny / "bert"),
        "--model.task",
        "classification",
        "--data.source",
        str(tiny / "classes.csv"),
        "--data.max_length",
        "48",
        "--federation.clients",
        "3",
        "--engine",
        "inline",
    ]
    trials = corners(sweep, read_config(flags))[::7]
    prepared = [prepare(t.config, (9, 9)) for t in trials]
    check_budget(trials, prepared, times=sweep.samples)
    with pytest.raises(ConfigError, match="24 trials together would spend epsilon"):
        check_budget(trials, prepared, times=2 * sweep.samples)


def test_a_budget_needs_a_delta_and_clients_that_stay_the_same(make_config, tmp_path, capsys, ray_session):
    flags = tiny_flags(make_config, method={"name": "ffa"}, privacy={"epsilon": 2.0, "sweep_epsilon": 9.0})
    space = space_file(tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2])}, seeds=(0, 1))")
    assert main(["sweep", "--space", space, "--out", str(tmp_path / "out"), *flags]) == 2
    assert "needs privacy.delta too" in capsys.readouterr().err
    flags = tiny_flags(make_config, method={"name": "ffa"}, privacy={"noise": 2.0, "unit": "client"})
    assert main(["sweep", "--space", space, "--out", str(tmp_path / "out"), *flags]) == 2
    assert "a client of one is no client of another" in " ".join(capsys.readouterr().err.split())


# --- results ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_the_pareto_front_is_what_nothing_beats(pairs, maximise):
    points = pd.DataFrame(pairs, columns=["mean", "bytes"])
    sign = 1 if maximise else -1
    for i, there in enumerate(pareto(points, "bytes", maximise)):
        v, c = sign * pairs[i][0], pairs[i][1]
        assert there == (not any((sign * w > v and b <= c) or (sign * w >= v and b < c) for w, b in pairs))


def test_effects_give_all_variance_to_the_knob_that_has_it():
    rows = [{"lr": lr, "rank": rank, "mean": 3.0 * lr + 0.0 * rank} for lr in (1, 2, 3) for rank in (4, 8)]
    found = effects(pd.DataFrame(rows), ["rank", "lr"]).drop_duplicates("knob").set_index("knob")["variance_share"]
    assert (
        found["lr"] == pytest.approx(1.0)
        and found["rank"] == pytest.approx(0.0)
        and list(found.index) == ["lr", "rank"]
    )
    both = pd.DataFrame([{"a": a, "b": b, "mean": 2.0 * a + 1.0 * b} for a in (0, 1) for b in (0, 1)])
    shares = effects(both, ["a", "b"]).drop_duplicates("knob").set_index("knob")["variance_share"]
    assert shares["a"] == pytest.approx(0.8) and shares["b"] == pytest.approx(0.2)
    # None is a value like any other: a run without privacy.
    some = effects(
        pd.DataFrame([{"e": e, "mean": m} for e, m in ((None, 1.0), (None, 1.0), (3.0, 0.0), (8.0, 0.5))]), ["e"]
    )
    assert (
        some["value"].tolist() == ["none", "3", "8"]
        and some["points"].tolist() == [2, 1, 1]
        and some["mean"].tolist() == [1.0, 0.0, 0.5]
    )


def test_a_rate_of_each_methods_own_is_no_knob():
    def kept(points: list[dict]) -> dict:
        return {"trials": [{"values": {"method": p, "adapter.rank": r, "seed": 0}} for p in points for r in (2, 8)]}

    own = [
        {"entry": e, "privacy.epsilon": eps, "federation.lr": lr}
        for e, eps, lr in (("ffa", None, 1), ("ffa", 8, 2), ("fedex", None, 3), ("fedex", 8, 2))
    ]
    assert tied(kept(own)) == {"federation.lr"}
    assert (
        tied(kept([*own, {"entry": "ffa", "privacy.epsilon": None, "federation.lr": 4}])) == set()
    )  # two rates of one method
    assert tied({"trials": []}) == set()


def test_where_only_the_best_run_is_shown_each_run_is_a_point():
    rows = [
        {
            "adapter.rank": r,
            "trial": f"{i}",
            "status": "finished",
            "seed": 0,
            "rounds": 1,
            "objective": v,
            "bytes": 1,
            "epsilon": 1.0,
            "seconds": 1.0,
        }
        for i, (r, v) in enumerate(((2, 0.9), (2, 0.95), (4, 0.5)))
    ]
    trials = pd.DataFrame(rows)
    assert points_table(trials, 1)["mean"].tolist() == [pytest.approx(0.925), 0.5]
    assert points_table(trials, 1, single=True).sort_values("mean")["mean"].tolist() == [0.5, 0.9, 0.95] and set(
        points_table(trials, 1, single=True)["trial"]
    ) == {"0", "1", "2"}


def test_the_same_space_is_the_same_whenever_it_is_read(tmp_path):
    text = (
        "SWEEP = Sweep(space={'federation.lr': tune.loguniform(1e-4, %s), 'adapter.rank': tune.choice([2, 4])}, "
        "search='random', samples=3, max_concurrent=%d)"
    )
    one, again, other = (
        in_words(load_space(space_file(tmp_path, text % at))) for at in (("1e-1", 2), ("1e-1", 5), ("1e-2", 2))
    )
    assert one == again != other and json.loads(json.dumps(one)) == one


# --- whole sweeps -------------------------------------------------------------------------------------------------


def actors(kind: str = "") -> list[dict]:
    """Actors that live, with `pid`; of one class."""
    told = ray._private.state.actors().values()
    return [a for a in told if a["State"] != "DEAD" and kind in a.get("ActorClassName", "")]


def groups() -> list[str]:
    return [g["state"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


def lines(out: Path) -> dict[str, list[dict]]:
    """Every trial's finished rounds, clock and all: a round that is done again has other seconds."""
    found = {
        p.parent.name: [json.loads(line) for line in p.read_text().splitlines()]
        for p in (out / "trials").glob("*/rounds.jsonl")
    }
    for record in itertools.chain(*found.values()):
        record["seconds"].pop("checkpoint", None)  # known only after the record is in the checkpoint
    return found


def kept(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> bool:
    return all(after[name][: len(old)] == old for name, old in before.items())


FOUR = (
    "SWEEP = Sweep(space={'entry': tune.grid_search(['fedex', 'ffa']), 'federation.lr': tune.grid_search([1e-2, 1e-9])}"
    ", base={'worker.count': 1}, %s)"
)


def test_a_whole_sweep_leaves_tables_pictures_and_a_config_that_gives_the_same_again(
    make_config, tmp_path, ray_session, capsys
):
    privacy = {"noise": 0.3, "key_dir": str(tmp_path / "keys")}
    flags = [*tiny_flags(make_config, privacy=privacy), "--engine", "inline"]
    out = tmp_path / "out"
    before = {a["ActorID"] for a in actors()}
    # One at a time, so that the rates that learn nothing come to rungs where others have been.
    space = space_file(tmp_path, FOUR % "stop='asha', grace=1, reduction=2, max_concurrent=1")
    assert main(["sweep", "--space", space, "--out", str(out), *flags]) == 0
    told = capsys.readouterr().out
    table = pd.read_csv(out / "trials.csv")
    assert len(table) == 4 and set(table["status"]) == {"finished", "stopped"} and (table["federation.lr"] > 0).all()
    assert pd.read_parquet(out / "trials.parquet")["trial"].tolist() == table["trial"].tolist()
    assert (
        all(table.loc[table["status"] == "stopped", "rounds"] < 3)
        and (table.loc[table["status"] == "finished", "rounds"] == 3).all()
    )
    summary = json.loads((out / "summary.json").read_text())
    done = table[table["status"] == "finished"]
    assert (
        summary["best"]["final"] == done["objective"].min() == summary["best"]["mean"]
        and summary["trials"] == table["status"].value_counts().to_dict()
    )
    # Fixed keys: the same noise, so the same bits; and they void the guarantee, which is said.
    config = read_config(["--config", str(out / "best.yaml"), "--output.dir", str(tmp_path / "again")])
    assert execute(prepare(config))["final"] == summary["best"]["final"]
    assert summary["privacy"]["void"] and "none, since the noise keys were fixed for a test" in told
    for name in ("points.csv", "effects.csv", "pareto_bytes.png", "pareto_epsilon.png", "effects.png"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "tune").glob("*/events.out.tfevents.*"))) == 4
    assert {a["ActorID"] for a in actors()} <= before and not groups()
    assert (
        main(["sweep", "--space", space, "--out", str(out), *flags]) == 2
        and "holds another sweep" in capsys.readouterr().err
    )
    files = {p: p.stat().st_mtime_ns for p in (out / "trials").glob("*/*")}
    assert main(["report", str(out)]) == 0 and summary == json.loads((out / "summary.json").read_text())
    assert files == {p: p.stat().st_mtime_ns for p in (out / "trials").glob("*/*")}


def test_what_all_trials_have_told_is_reported_from_their_ledgers(make_config, tmp_path, ray_session, capsys):
    flags = tiny_flags(
        make_config,
        method={"name": "ffa"},
        privacy={"epsilon": 2.0, "delta": 1e-4, "sweep_epsilon": 9.0},
        engine="inline",
    )
    out = tmp_path / "out"
    space = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 3e-2])}, base={'engine': 'inline', "
        "'federation.rounds': 2})",
    )
    assert main(["sweep", "--space", space, "--out", str(out), *flags]) == 0
    books = [Ledger.load(p) for p in (out / "trials").glob("*/checkpoint/ledger.json")]
    privacy = json.loads((out / "summary.json").read_text())["privacy"]
    assert len(books) == 2 == privacy["trials"]
    for client in ("client-0", "client-1", "client-2"):
        accountant = pld.PLDAccountant()
        accountant.compose(accounted([e.release for b in books for e in b.entries[client]]))
        assert privacy["composed"][client] == pytest.approx(accountant.get_epsilon(privacy["delta"]), rel=0.02)
    assert 2.0 < max(privacy["composed"].values()) <= 4.0
    assert "privacy: none, since the noise keys were fixed for a test" in capsys.readouterr().out
    assert (
        f"the 2 trials together have spent epsilon {max(privacy['composed'].values()):.4g} at delta"
        in sweep_privacy(privacy | {"void": False})
    )
    assert "nothing bounds what the sweep as a whole has told" in sweep_privacy(
        privacy | {"void": False, "without_privacy": 1}
    )


def test_a_trial_that_fails_fails_alone(make_config, tmp_path, ray_session, capsys):
    """In its first round, before it has reported anything."""
    flags = [*tiny_flags(make_config), "--engine", "inline"]
    out = tmp_path / "out"
    space = space_file(
        tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e30, 1e-2])}, max_concurrent=1)"
    )
    assert main(["sweep", "--space", space, "--out", str(out), *flags]) == 0, capsys.readouterr()
    table = pd.read_csv(out / "trials.csv")
    assert (
        table["status"].value_counts().to_dict() == {"failed": 1, "finished": 1}
        and table.loc[table["status"] == "failed", "federation.lr"].item() == 1e30
    )
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("failed: ") == 1 and "lower federation.lr" in told
    assert not cache_folder(out).exists()


@pytest.mark.slow
def test_a_trial_whose_place_is_taken_is_named_and_ends_alone(make_config, tmp_path, ray_session, capsys):
    flags = [*tiny_flags(make_config), "--engine", "inline", "--federation.rounds", "1"]
    out = tmp_path / "out"
    space = space_file(
        tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2])}, max_concurrent=1)"
    )
    (out / "keys").mkdir(parents=True)  # as a sweep that was stopped before its first trial
    blocked = out / "trials" / "000,lr=0.01,seed=0"
    blocked.parent.mkdir()
    blocked.write_text("a file where the run directory should be")
    blocked.rename(out / "trials" / "000,lr=0.01,seed=0")
    assert main(["sweep", "--space", space, "--out", str(out), "--resume", *flags]) == 0
    table = pd.read_csv(out / "trials.csv")
    assert (
        table["status"].tolist() == ["failed", "finished"] and "failed: 000,lr=0.01,seed=0" in capsys.readouterr().out
    )
    assert main(["sweep", "--space", space, "--out", str(out), "--resume", *flags]) == 0  # it is over, and stays so


def test_a_random_sweep_is_resumed_and_a_misspelt_objective_costs_nothing(make_config, tmp_path, ray_session, capsys):
    flags = [*tiny_flags(make_config), "--engine", "inline", "--federation.rounds", "1"]
    out, text = (
        tmp_path / "out",
        "SWEEP = Sweep(space={'federation.lr': tune.loguniform(1e-3, 1e-1)}, search='random', samples=2%s)",
    )
    space = space_file(tmp_path, text % "")
    assert main(["sweep", "--space", space, "--out", str(out), "--max-concurrent", "1", *flags]) == 0
    times = {p: p.stat().st_mtime_ns for p in out.glob("trials/*/summary.json")}
    assert main(["sweep", "--space", space, "--out", str(out), "--resume", "--max-concurrent", "2", *flags]) == 0
    assert len(times) == 2 and times == {p: p.stat().st_mtime_ns for p in out.glob("trials/*/summary.json")}
    capsys.readouterr()
    wrong = space_file(tmp_path, text % ", objective='acuracy'")
    assert main(["sweep", "--space", wrong, "--out", str(tmp_path / "wrong"), *flags]) == 2
    assert (
        "objective 'acuracy' is no metric of this task: choose bits_per_byte, loss" in capsys.readouterr().err
        and not (tmp_path / "wrong" / "trials").exists()
    )


@pytest.mark.slow
def test_median_stopping_and_seeds_of_an_adaptive_search(make_config, tmp_path, ray_session):
    flags = [*tiny_flags(make_config), "--engine", "inline"]
    median = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'federation.lr': tune.grid_search([3e-2, 2e-2, 1e-2, 1e-9])}, stop='median', grace=1, "
        "max_concurrent=1)",
    )
    assert main(["sweep", "--space", median, "--out", str(tmp_path / "median"), *flags]) == 0
    table = pd.read_csv(tmp_path / "median" / "trials.csv")
    assert (
        table.loc[table["federation.lr"] == 1e-9, "status"].item() == "stopped"
        and (table["status"] == "finished").sum() >= 1
    )
    seeds = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'federation.lr': tune.loguniform(1e-3, 1e-1)}, search='optuna', samples=2, seeds=(0, 7), "
        "max_concurrent=2)",
    )
    assert main(["sweep", "--space", seeds, "--out", str(tmp_path / "seeds"), *flags, "--federation.rounds", "1"]) == 0
    table = pd.read_csv(tmp_path / "seeds" / "trials.csv")
    assert table.groupby("federation.lr")["seed"].apply(sorted).tolist() == [[0, 7], [0, 7]]


def test_what_a_space_varies_together_is_not_overridden_in_silence(capsys, tmp_path):
    for flag, value in (("--adapter.rank", "4"), ("--federation.lr", "0.5"), ("--method.name", "ffa")):
        assert main(["sweep", "--space", str(SPACES / "ranks_methods.py"), flag, value]) == 2
        assert f"{flag} is what the space varies together with other keys" in " ".join(capsys.readouterr().err.split())


def test_optuna_searches_within_what_was_checked_and_ends_at_the_byte_budget(
    make_config, tmp_path, ray_session, capsys
):
    flags = [*tiny_flags(make_config), "--engine", "inline", "--federation.rounds", "9"]
    out = tmp_path / "out"
    space = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'entry': tune.choice(['fedex', 'ffa']), 'federation.lr': tune.loguniform(1e-3, 1e-1)}, "
        "search='optuna', samples=3, max_concurrent=1, "
        "base={'federation.max_bytes': 140000})",
    )
    assert main(["sweep", "--space", space, "--out", str(out), *flags]) == 0, capsys.readouterr()
    table = pd.read_csv(out / "trials.csv")
    assert len(table) == 3 and (table["status"] == "finished").all() and table["federation.lr"].nunique() == 3
    assert (
        (table["bytes"] <= 140000).all()
        and (table["rounds"] < 9).all()
        and (table["federation.lr"].between(1e-3, 1e-1)).all()
    )
    for name, rounds in zip(table["trial"], table["rounds"], strict=True):
        records = [json.loads(line) for line in (out / "trials" / name / "rounds.jsonl").read_text().splitlines()]
        moved = sum(r["bytes_up"] + r["bytes_down"] for r in records)
        last = records[-1]["bytes_up"] + records[-1]["bytes_down"]
        assert rounds == len(records) and (moved + last > 140000 and "federation.max_bytes" in records[-1]["stopped"])
    ranged = space_file(
        tmp_path, "SWEEP = Sweep(space={'federation.batch_size': tune.randint(2, 9)}, search='optuna', samples=3)"
    )
    assert main(["sweep", "--space", ranged, "--out", str(tmp_path / "b"), *flags]) == 2
    assert "may only choose it from a list" in " ".join(capsys.readouterr().err.split())


def test_units_that_differ_are_not_added_up(make_config, tmp_path, capsys, ray_session):
    flags = tiny_flags(make_config, method={"name": "ffa"}, privacy={"noise": 1.0})
    for key, values, words in (
        ("data.max_length", "[24, 48]", "what one private example is"),
        ("privacy.unit", "['example', 'client']", "the sweep varies privacy.unit"),
    ):
        space = space_file(tmp_path, f"SWEEP = Sweep(space={{'{key}': tune.grid_search({values})}})")
        assert main(["sweep", "--space", space, "--out", str(tmp_path / "out"), *flags]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    make_config, tmp_path, capsys, ray_session, monkeypatch
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    space = space_file(tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2])})")
    assert (
        main(["sweep", "--space", space, "--out", str(tmp_path / "out"), "--track", "mlflow", *tiny_flags(make_config)])
        == 2
    )
    assert "pip install 'fedray[track]'" in capsys.readouterr().err and not (tmp_path / "out" / "trials").exists()


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
def test_trackers_are_told_of_every_trial(make_config, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'fedray[track]'")
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'fedray[track]'")
    out = tmp_path / "out"
    space = space_file(
        tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2])}, base={'engine': 'inline'})"
    )
    # A process of its own: the workers of the session's Ray have their environment already.
    command = [
        sys.executable,
        "-m",
        "fedray.cli",
        "sweep",
        "--space",
        space,
        "--out",
        str(out),
        "--track",
        "mlflow,wandb",
        *tiny_flags(make_config),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"WANDB_MODE": "offline"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("out").experiment_id])
    finals = pd.read_csv(out / "trials.csv")["objective"]
    assert sorted(r.data.metrics["objective"] for r in runs) == pytest.approx(sorted(finals)) and {
        r.info.status for r in runs
    } == {"FINISHED"}
    assert len(list(tmp_path.rglob("offline-run-*"))) == 2


@pytest.mark.parametrize("stop", ["asha", "median"])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_resumed_scheduler_judges_by_the_trials_that_ended_before(stop, mode, tmp_path):
    """A trial worse than three earlier ones is stopped at once; without them, or beside trials that have not ended, it
    goes on."""
    good, bad = (0.9, 0.5) if mode == "max" else (0.5, 0.9)

    def verdict(out: Path, value: float) -> str:
        made = scheduler(
            Sweep(space={"seed": tune.grid_search([0])}, stop=stop, grace=1, reduction=2), 4, out, "accuracy"
        )
        made = cloudpickle.loads(cloudpickle.dumps(made))  # what a restored tuner holds
        made.set_search_properties("objective", mode)
        trial = Trial("fake", stub=True)
        made.on_trial_add(None, trial)
        controller = SimpleNamespace(get_live_trials=list, get_trials=list)
        told = (made.on_trial_result(controller, trial, {"round": r, "objective": value}) for r in (1, 2))
        return "STOP" if "STOP" in told else "CONTINUE"

    for name, value in (("a", good), ("b", good), ("c", good + 0.01)):
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True)
        rows = [{"round": r, "metrics": None if r == 3 else {"accuracy": value}} for r in (1, 2, 3, 4)]
        (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict(tmp_path, bad) == verdict(tmp_path / "nowhere", bad) == "CONTINUE"
    for name in "ab":
        (tmp_path / "trials" / name / "summary.json").touch()
    (tmp_path / "trials" / "c.stopped").touch()
    assert (
        verdict(tmp_path, bad) == "STOP" and verdict(tmp_path, good + 0.02 * (1 if mode == "max" else -1)) == "CONTINUE"
    )


def test_the_live_table_stays_in_place_and_counts_every_trial():
    class Fake:
        def __init__(self, i):
            self.trial_id, self.config, self.status = f"t{i}", {"trial": {"name": f"{i:03d},ffa"}}, "RUNNING"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    live, trials = (
        LiveTable(make_console(file=screen, width=100, height=40, force_terminal=True), 30, maximise=True),
        [Fake(i) for i in range(20)],
    )
    for i, trial in enumerate(trials):
        live.on_trial_start(0, trials, trial)
        live.on_trial_result(0, trials, trial, {"round": 1, "objective": i / 100, "bytes": 2048, "epsilon": 3.0})
    for trial in trials[:18]:
        live.on_trial_complete(0, trials, trial)
    live.on_trial_error(0, trials, trials[18])
    again = pickle.loads(pickle.dumps(live))  # Tune keeps it in its checkpoint
    live.close()
    told = screen.getvalue()
    assert "\x1b[1A" in told or "\x1b[2K" in told  # lines are written over
    last = told.rsplit("trial ", 1)[1]
    assert (
        "1 running, 10 waiting, 18 ended, 1 failed" in last
        and last.index("019,ffa") < last.index("017,ffa") < last.index("016,ffa")
        and "000,ffa" not in last
    )
    assert again.count == 30 and not again.seen
    plain = io.StringIO()
    live = LiveTable(make_console(file=plain, width=100), 2)
    live.on_trial_result(0, trials, trials[0], {"round": 2, "objective": 0.5})
    live.on_trial_complete(0, trials, trials[0])
    assert plain.getvalue() == "[1/2] 000,ffa  ended: 0.5000 after round 2\n"


GPU = """
import sys, time, threading
import ray
from fedray.cli import main
ray.init(address="local", num_cpus=6, num_gpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
most = [0]
def watch():
    while True:
        held = 3 - ray.available_resources().get("GPU", 0)
        most[0] = max(most[0], held)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
rc = main(sys.argv[1:])
time.sleep(1)
left = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD"]
groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
print("RC", rc, "MOST", most[0], "LEFT", len(left), len(groups), flush=True)
ray.shutdown()
"""


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
def test_trials_on_logical_gpus_run_one_at_a_time_and_one_that_never_fits_is_refused(make_config, tmp_path):
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(SPACES.parent)}
    flags = tiny_flags(
        make_config, worker={"cpus": 1, "gpus": 1.0}, federation={"rounds": 1, "local_steps": 1, "batch_size": 4}
    )
    space = space_file(tmp_path, "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2])})")

    def sweep(clients: int, out: str):
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            GPU,
            "sweep",
            "--space",
            space,
            "--out",
            str(tmp_path / out),
            *flags,
            "--federation.clients",
            str(clients),
        ]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)

    two = sweep(2, "two")
    assert "RC 0 MOST 2.0 LEFT 0 0" in two.stdout, two.stdout + two.stderr  # never both: 4 of 3 GPUs
    assert (pd.read_csv(tmp_path / "two" / "trials.csv")["status"] == "finished").all()
    four = sweep(4, "four")
    assert (
        "RC 2" in four.stdout
        and "4 workers of 1 CPU and 1 GPU = 4 CPUs and 4 GPUs, but the cluster has 6 CPUs, 3 GPUs" in four.stderr
    )
    assert not (tmp_path / "four").exists()


def killer(kind: str, when, seen: list):
    """A thread that kills one actor's process, by SIGKILL, when `when()` says so."""

    def work():
        end = time.monotonic() + 200
        while time.monotonic() < end:
            if when():
                found = [a for a in actors(kind) if a["State"] == "ALIVE" and a["Pid"]]
                if found:
                    seen.append(found[0]["Pid"])
                    os.kill(found[0]["Pid"], signal.SIGKILL)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["WorkerActor", "CoordinatorActor", "ImplicitFunc"])
def test_a_process_of_a_trial_that_dies_costs_no_finished_round(kind, make_config, tmp_path, ray_session):
    flags = tiny_flags(
        make_config, federation={"clients": 3, "rounds": 6, "local_steps": 6, "batch_size": 4, "lr": 0.01}
    )
    space = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'entry': tune.grid_search(['fedex', 'ffa'])}, base={'worker.count': 1}, "
        "max_concurrent=1)",
    )
    outs, seen, snapshot = [tmp_path / "calm", tmp_path / "killed"], [], {}
    assert main(["sweep", "--space", space, "--out", str(outs[0]), *flags]) == 0

    def two_rounds() -> bool:
        snapshot.update(lines(outs[1]) if (outs[1] / "trials").exists() else {})
        return any(len(v) >= 2 for v in snapshot.values())

    thread = killer(kind, two_rounds, seen)
    assert main(["sweep", "--space", space, "--out", str(outs[1]), *flags]) == 0
    thread.join(1)
    assert seen, "nothing was killed"
    assert kept(snapshot, lines(outs[1]))
    calm, killed = (pd.read_csv(out / "trials.csv") for out in outs)
    assert killed["objective"].tolist() == calm["objective"].tolist() and (killed["status"] == "finished").all()


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_goes_on_without_losing_a_trial_or_a_round(how, make_config, tmp_path):
    # Private, with real keys: what goes on must meet the same noise, and be charged once.
    flags = tiny_flags(
        make_config,
        federation={"clients": 3, "rounds": 5, "local_steps": 6, "batch_size": 4, "lr": 0.01},
        privacy={"noise": 0.8, "key_dir": str(tmp_path / "keys")},
    )
    space = space_file(
        tmp_path,
        "SWEEP = Sweep(space={'entry': tune.grid_search(['fedex', 'ffa', 'fedit'])}, base={'worker.count': 1}, "
        "max_concurrent=1)",
    )
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "fedray.cli", "sweep", "--space", space, "--out", str(out), *flags]
    env = {k: v for k, v in os.environ.items() if k != "FEDRAY_UNSAFE_TEST_KEY"} | {"PYTHONPATH": str(SPACES.parent)}
    first = subprocess.Popen(
        command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 250
    while time.monotonic() < end and not (
        list((out / "trials").glob("*/summary.json")) and any(1 <= len(v) < 5 for v in lines(out).values())
    ):
        time.sleep(0.1)
    if how is signal.SIGKILL:
        os.killpg(first.pid, how)
        first.wait()
        time.sleep(3)  # Ray's processes end when they miss their driver
    else:
        os.kill(first.pid, how)
        assert first.wait(120) == {signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    before, finished = lines(out), {p: p.stat().st_mtime_ns for p in (out / "trials").glob("*/summary.json")}
    assert finished and len(before) >= 2
    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        kept(before, lines(out))
        and finished.items() <= {p: p.stat().st_mtime_ns for p in (out / "trials").glob("*/summary.json")}.items()
    )
    assert (pd.read_csv(out / "trials.csv")["status"] == "finished").all() and len(pd.read_csv(out / "trials.csv")) == 3
    for path in (out / "trials").glob("*/checkpoint/ledger.json"):
        for entries in Ledger.load(path).entries.values():
            assert sum(e.release.steps for e in entries if e.release.what == "training") == 5 * 6
    files = [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]
    # When all is over nobody can take the noise away; what was answered, and what it cost, stays known.
    assert files and all(path.suffix in (".json", ".jsonl") for path in files)


def test_every_trial_has_a_second_place_of_its_own(tmp_path):
    config = read_config(["--output.checkpoints", "s3://bucket/sweep/"])
    places = {placed(config, 2, 0, tmp_path / "trials" / name)[0].output.checkpoints for name in ("a", "b")}
    assert places == {"s3://bucket/sweep/a", "s3://bucket/sweep/b"}


def test_the_ranks_of_a_trials_workers_have_bundles(tmp_path):
    needed = bundles(read_config(["--worker.ranks", "2", "--worker.gpus", "1", "--worker.count", "3"]), 4, 8)
    assert needed.processes == 6 and len(needed.factory().bundles) == 6
    assert needed.words == "3 workers of 2 ranks of 1 CPU and 1 GPU = 6 CPUs and 6 GPUs"
    with pytest.raises(ConfigError, match="for single runs"):
        bundles(read_config(["--clients.client-0.ranks", "2"]), 4, 8)
