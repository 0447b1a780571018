"""Workers of several ranks on Ray: clients of one, two and partitioned ranks in one run, and ranks that die in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from support import final_tensors, rounds, run, same_bits

from fedray.errors import ConfigError, RankError
from fedray.federation import crew_ray
from fedray.federation.channels import statement
from fedray.federation.channels.registry import words_of
from fedray.federation.placement import Node, place, place_apart
from fedray.federation.prepare import prepare
from fedray.ranks import ALONE

#: Six CPUs, as far as Ray knows; each config's run, and whom to kill in which round: the first process whose title
#: has the word, as soon as the round has begun.
RUNS = """
import json, os, signal, sys, threading, time
import psutil, ray, yaml
from fedray.config.read import from_dict
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute

def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""

def family(word):
    return [p for p in psutil.Process().children(recursive=True) if word in title(p)]

class Killer(Silent):
    def __init__(self, kills):
        self.kills = kills
    def progress(self, round, done, cohort):
        if self.kills and self.kills[0][0] == round:
            _, word = self.kills.pop(0)
            victims = family(word)
            assert victims, (word, [title(p) for p in psutil.Process().children(recursive=True)])
            victims[0].send_signal(signal.SIGKILL)

ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for config, kills in json.loads(sys.argv[1]):
    listener, began = Killer(kills), time.monotonic()
    execute(prepare(from_dict(config)), listener)
    assert not listener.kills
    end = time.monotonic() + 30
    while family("RankActor") and time.monotonic() < end:
        time.sleep(0.2)
    assert not family("RankActor"), "a rank outlives its run"
    print("took", round(time.monotonic() - began, 1))
"""

OPTIONS = {"method__name": "fedex", "federation__local_steps": 4, "federation__lr": 3e-4, "seed": 3}
#: One round: in the next, noise follows from a broadcast whose last digits the ranks have changed.
PRIVATE = {"privacy": {"noise": 1.0}, "federation__rounds": 1}
MIXED = {"client-0": {"ranks": 2, "zero_stage": 3}, "client-1": {"zero_stage": 1}}


def folders(configs, kills) -> dict[str, Path]:
    """Of runs by name, one after the other on the same Ray."""
    todo = [[json.loads(c.model_dump_json(exclude_unset=True)), kills.get(n, [])] for n, c in configs.items()]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS, json.dumps(todo)],
        env=env,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: Path(config.output.dir) for name, config in configs.items()}


@pytest.fixture(scope="module")
def disturbed(make_config):
    """A mixed run in which another rank is killed in round 2, and a first one (or a worker of one) in round 3."""
    config = make_config(engine="ray", clients=MIXED, **OPTIONS)
    return folders({"run": config}, {"run": [(2, "ray::RankActor"), (3, "ray::WorkerActor")]})["run"]


def alike(alone: Path, ranks: Path) -> None:
    one, other = final_tensors(alone), final_tensors(ranks)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
    for a, b in zip(rounds(alone), rounds(ranks), strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], abs=1e-4)
        assert not b.get("dropped")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ray")
def test_clients_of_several_ranks_and_of_one_make_the_run_that_one_rank_makes(make_config, disturbed):
    alike(run(make_config(**OPTIONS)), disturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ray")
def test_so_they_do_where_they_are_private(make_config):
    options = OPTIONS | PRIVATE
    config = make_config(engine="ray", clients=MIXED, **options)
    alike(run(make_config(**options)), folders({"private": config}, {})["private"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ray")
def test_ranks_that_are_killed_cost_nothing_but_time(make_config, disturbed):
    left_alone = make_config(engine="ray", clients=MIXED, **OPTIONS)
    same_bits(folders({"run": left_alone}, {})["run"], disturbed)


# --- what follows when a rank fails ---------------------------------------------------------------------------------


@ray.remote
class Other:
    """The other rank, as the first one reaches it."""

    def __init__(self):
        self.how = "answers"

    def will(self, how):
        self.how = how

    def do(self, call, arguments):
        if self.how == "raises alike":
            raise FloatingPointError("the loss became nan")
        if self.how == "is out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.how == "waits":
            import time

            time.sleep(60)
        if self.how == "dies":
            os._exit(1)
        return self.how


@pytest.fixture
def crew(ray_session, monkeypatch):
    monkeypatch.setattr(crew_ray, "IN_STEP_SECONDS", 2.0)

    def ends(why):
        raise SystemExit(why)

    monkeypatch.setattr(crew_ray, "_end", ends)
    one = object.__new__(crew_ray.RayCrew)
    one._others, one._out_of_step, one.ranks = [Other.options(num_cpus=0).remote()], False, ALONE
    yield one
    ray.kill(one._others[0])


def will(crew, how):
    ray.get(crew._others[0].will.remote(how))


def test_all_ranks_answer(crew):
    assert crew.do("train", (), lambda: "mine") == ("mine", ["answers"])


def raises(error):
    def own():
        raise error

    return own


def test_what_all_raise_alike_is_the_clients_failure_and_the_group_goes_on(crew):
    will(crew, "raises alike")
    with pytest.raises(FloatingPointError):
        crew.do("train", (), raises(FloatingPointError("the loss became nan")))
    will(crew, "answers")
    assert crew.do("train", (), lambda: "mine") == ("mine", ["answers"])


def test_a_rank_that_fails_where_this_one_waits_is_named_and_the_group_is_made_anew(crew):
    will(crew, "is out of memory")
    with pytest.raises(RankError, match="on rank 1: OutOfMemoryError: CUDA out of memory"):
        crew.do("train", (), raises(RuntimeError("Connection closed by peer")))
    assert crew.do("reset", (), lambda: None) == (None, [])  # of a failed call, by the worker
    with pytest.raises(SystemExit, match="out of step"):
        crew.do("train", (), lambda: "mine")


def test_a_rank_that_waits_for_this_one_which_failed_is_out_of_step(crew):
    will(crew, "waits")
    with pytest.raises(torch.OutOfMemoryError):
        crew.do("train", (), raises(torch.OutOfMemoryError("here")))
    with pytest.raises(SystemExit, match="out of step"):
        crew.do("train", (), lambda: "mine")


def test_a_failure_that_only_another_rank_has_is_never_taken_for_success(crew):
    will(crew, "raises alike")
    with pytest.raises(RankError, match="on rank 1: FloatingPointError"):
        crew.do("train", (), lambda: "mine")


@pytest.mark.parametrize("own", [lambda: "mine", raises(RuntimeError("Connection closed by peer"))])
def test_a_rank_that_dies_ends_this_one_too(crew, own):
    will(crew, "dies")
    with pytest.raises(SystemExit, match="rank 1 died"):
        crew.do("train", (), own)


# --- placement and the config ---------------------------------------------------------------------------------------


def test_every_rank_has_its_share(make_config):
    def seats(nodes, clients=MIXED, **worker):
        config = make_config(engine="ray", clients=clients, worker=worker)
        return place_apart(config, nodes, ["client-0", "client-1", "client-2", "client-3"])

    found = seats([Node({"CPU": 5.0}, {})])
    assert [(s.clients, s.ranks, s.zero_stage) for s in found.seats] == [
        (("client-0",), 2, 3),
        (("client-1",), 1, 1),
        (("client-2", "client-3"), 1, 0),
        (("client-2", "client-3"), 1, 0),
    ]
    assert found.cpus == 1 and "client-0 on any node, of 2 ranks of 1 CPU" in found.reason
    spread = seats([Node({"CPU": 1.0}, {})] * 5)  # a worker's ranks may lie on several nodes
    assert len(spread.seats) == 4
    least = seats([Node({"CPU": 4.0}, {})])  # everyone's first worker before anyone's second
    assert len(least.seats) == 3
    with pytest.raises(ConfigError, match="1 worker of 1 CPU for client-2, client-3 do not fit on the nodes, where 0"):
        seats([Node({"CPU": 3.0}, {})])
    with pytest.raises(ConfigError, match="1 worker of 2 ranks of 1 CPU for client-0 do not fit on .* or the ranks"):
        seats([Node({"CPU": 1.0}, {})])
    gpus = seats([Node({"CPU": 16.0, "GPU": 6.0}, {})], MIXED | {"client-3": {"gpus": 0.5}})
    assert [(s.gpus, s.ranks) for s in gpus.seats] == [(1.0, 2), (1.0, 1), (1.0, 1), (0.5, 1)]
    assert gpus.seats[0].config_of(make_config(engine="ray", clients=MIXED)).worker.zero_stage == 3


def test_alike_workers_of_several_ranks_are_counted_with_them(make_config):
    config = make_config(engine="ray", worker={"ranks": 2})
    assert place(config, 3, 8, 0).workers == 3 and place(config, 3, 4, 0).workers == 2
    assert place(config, 3, 16, 4).workers == 2 and "2 ranks of 1 GPU" in place(config, 3, 16, 4).reason
    with pytest.raises(ConfigError, match="3 workers x 2 ranks x 1 GPUs = 6 GPUs, but there are 4: lower"):
        place(make_config(engine="ray", worker={"ranks": 2, "count": 3}), 3, 16, 4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"worker": {"ranks": 2, "backend": "torch"}}, "needs worker.backend deepspeed"),
        ({"worker": {"ranks": 5}}, "have 4 examples at once"),
        ({"worker": {"ranks": 2}, "engine": "inline"}, "need engine ray"),
        ({"clients": {"client-0": {"ranks": 5}}}, "clients.client-0.ranks 5 have 4 examples"),
        ({"clients": {"client-0": {"zero_stage": 2}}, "engine": "inline"}, "need engine ray"),
        ({"worker": {"ranks": 2, "batch_clients": 2}}, "deal out one client's batches"),
        ({"worker": {"offload": "all", "zero_stage": 2}}, "needs worker.zero_stage 3"),
        ({"worker": {"offload": "optimizer"}}, "needs worker.zero_stage 1"),
        ({"worker": {"offload": "optimizer", "zero_stage": 1, "backend": "torch"}}, "is DeepSpeed's"),
    ],
)
def test_what_ranks_cannot_be_is_refused(make_config, options, words):
    with pytest.raises(ConfigError, match=words):
        make_config(**{"engine": "ray"} | options)


def test_prepare_places_mixed_workers(make_config, monkeypatch):
    from fedray.federation import prepare as preparing

    monkeypatch.setattr(preparing, "nodes_there", lambda: [Node({"CPU": 6.0}, {})])
    assert prepare(make_config(engine="ray", clients=MIXED)).placement.workers == 3


def test_a_private_runs_statement_names_the_network_between_ranks(make_config):
    def said(**options):
        config = make_config(engine="ray", privacy={"noise": 1.0}, **options)
        return [limit.what for limit in statement._limits(config, words_of(config))]

    assert not any("ranks say to each other" in words for words in said())
    assert any("ranks say to each other" in words for words in said(clients=MIXED))
    assert any("ranks say to each other" in words for words in said(worker={"ranks": 2}))
