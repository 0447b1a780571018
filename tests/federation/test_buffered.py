"""Rounds that wait for nobody in particular: the steps by hand, live ones on Ray, and their replay."""

import json
import os
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import ray
import torch
from support import final_tensors, rounds, run, same_bits

from fedray.config.build import make_method, make_spec
from fedray.errors import ConfigError, FedrayError
from fedray.federation import checkpoint, worker_ray
from fedray.federation import run as inline
from fedray.federation import run_ray as runs
from fedray.federation.buffered import staleness_weight
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.federation.wire import Packet
from fedray.federation.worker import Worker
from fedray.training.local import LocalTrainer

#: The steps of a run of four clients, two a step: everybody starts from version 0; who has arrived, from the next.
LOG = [
    [("client-0", 0), ("client-1", 0)],
    [("client-1", 1), ("client-2", 0)],
    [("client-0", 1), ("client-3", 0)],
    [("client-1", 2), ("client-3", 3)],
]
OPTIONS = {
    "method__name": "fedit",
    "method__weights": "equal",
    "federation__clients": 4,
    "federation__rounds": len(LOG),
}


def logged(folder: Path, log, make_config, **options) -> str:
    """The directory of a run with that log."""
    folder.mkdir()
    live = make_config(**{"engine": "ray", "federation__buffer": len(log[0])} | OPTIONS | options)
    (folder / "config.yaml").write_text(live.to_yaml())
    (folder / "rounds.jsonl").write_text("".join(json.dumps({"arrivals": step}) + "\n" for step in log))
    return str(folder)


def replay(make_config, folder, **options):
    return make_config(**{"federation__buffer": 2, "federation__replay": str(folder)} | OPTIONS | options)


@pytest.mark.parametrize("method", ["fedit", "ffa", "fed-sb"])
def test_the_steps_are_those_of_the_paper(make_config, tmp_path, method):
    """By hand: every version is kept, every client trained from its own, and the weighted changes added."""
    kind = "lora-sb" if method == "fed-sb" else "lora"
    options = {"method__name": method, "adapter": {"kind": kind, "rank": 2}}
    options |= {"federation__optimizer": "sgd", "federation__lr": 0.3}  # Adam would magnify a last digit
    config = replay(make_config, logged(tmp_path / "log", LOG, make_config, **options), **options)
    folder = run(config)

    trainer, method = LocalTrainer(config, "cpu", 1), make_method(config)
    spec = make_spec(config, trainer.layers, trainer.data.clients)
    state = method.init(spec, trainer.describe()[1], trainer.start_from_weights(spec.adapter))
    view = method.view(spec, method.broadcast(state), None)
    versions = [{n: t.clone() for n, t in view.tensors.items()}]
    for step in LOG:
        new = {n: t.double() for n, t in versions[-1].items()}
        for client, version in step:
            start = type(view)(versions[version], view.base, view.trained)
            sent = trainer.train(start, client, version).tensors
            weight = (1 + len(versions) - 1 - version) ** -0.5 / len(step)
            for name, tensor in sent.items():
                new[name] += weight * (tensor.double() - versions[version][name].double())
        versions.append({n: t.float() for n, t in new.items()})
    found = final_tensors(folder)
    moved = 0.0
    for name, tensor in versions[-1].items():
        if f"tensors/{name}" in found:
            torch.testing.assert_close(found[f"tensors/{name}"], tensor, rtol=0, atol=1e-6)
            moved += (tensor - versions[0][name]).abs().max().item()
    assert moved > 1e-3
    assert [[tuple(a) for a in r["arrivals"]] for r in rounds(folder)] == [sorted(step) for step in LOG]
    assert [r["cohort"] for r in rounds(folder)] == [sorted(client for client, _ in step) for step in LOG]


def test_an_update_that_is_not_late_counts_whole():
    assert staleness_weight(0) == 1.0 and staleness_weight(3) == 0.5


def test_a_buffer_of_all_clients_is_the_round_that_it_was(make_config, tmp_path):
    every = [f"client-{i}" for i in range(4)]
    log = [[(client, version) for client in every] for version in range(3)]
    options = OPTIONS | {"federation__rounds": 3}
    whole = run(make_config(**options))
    log = logged(tmp_path / "log", log, make_config, **options)
    config = make_config(federation__buffer=4, federation__replay=log, **options)
    one, other = final_tensors(whole), final_tensors(run(config))
    assert all(torch.equal(one[n], other[n]) for n in one)


# --- live -----------------------------------------------------------------------------------------------------------

SLOW = {"client-0": {"local_steps": 40}}


def live(make_config, **options):
    worker = {"cpus": 1, "count": 2}
    more = {"federation__rounds": 6, "clients": SLOW, "federation__buffer": 2, "worker": worker}
    return make_config(engine="ray", **OPTIONS | more | options)


def check_log(folder, size=2):
    seen = set()
    for record in rounds(folder):
        assert len(record["arrivals"]) == size == len(record["cohort"])
        for client, version in record["arrivals"]:
            assert 0 <= version < record["round"] and (client, version) not in seen  # nobody trains from one twice
            seen.add((client, version))
    return max(record["round"] - 1 - v for record in rounds(folder) for _, v in record["arrivals"])


def replayed(make_config, folder, **options):
    more = {"federation__rounds": 6, "clients": SLOW} | options
    return run(replay(make_config, folder, **more))


def test_a_slow_client_keeps_nobody_waiting_and_the_run_is_replayed_to_the_last_bit(make_config, ray_session):
    config = live(make_config, federation__rounds=20)
    execute(prepare(config))
    folder = Path(config.output.dir)
    assert check_log(folder) >= 2  # others went on, and were evaluated, while the slow one trained
    same_bits(folder, replayed(make_config, folder, federation__rounds=20))


@pytest.mark.slow
def test_a_worker_that_dies_is_asked_again_from_the_same_version(make_config, ray_session, monkeypatch):
    class Dies(Worker):
        def train(self, client, round, *args):
            flag = Path(self.trainer.config.output.dir) / "flag"
            if client == "client-0" and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train(client, round, *args)

    monkeypatch.setattr(worker_ray, "Worker", Dies)
    config = live(make_config)
    execute(prepare(config))
    folder = Path(config.output.dir)
    check_log(folder)
    assert not any(record["dropped"] for record in rounds(folder))
    same_bits(folder, replayed(make_config, folder))


@pytest.mark.slow
def test_a_coordinator_that_dies_goes_on_from_the_checkpoint_and_its_log_from_there(
    make_config, ray_session, monkeypatch
):
    started = []

    class Spy:
        def __init__(self, real):
            self.real = real

        def options(self, **options):
            return Spy(self.real.options(**options))

        def remote(self, *args):
            started.append(self.real.remote(*args))
            return started[-1]

    class Killer(Silent):
        def progress(self, round, done, cohort):
            if round == 3 and len(started) == 1:
                ray.kill(started[0])

    monkeypatch.setattr(runs, "CoordinatorActor", Spy(runs.CoordinatorActor))
    config = live(make_config, federation__local_steps=20)
    execute(prepare(config), Killer())
    folder = Path(config.output.dir)
    assert len(started) == 2
    check_log(folder)
    same_bits(folder, replayed(make_config, folder, federation__local_steps=20))


@pytest.mark.slow
def test_who_fails_is_left_out_and_too_few_end_the_run(make_config, ray_session, monkeypatch):
    class Fails(Worker):
        def train(self, client, round, *args):
            if client in self.trainer.config.model_dump()["clients"]:
                self.trainer.task = None  # its step raises
            return super().train(client, round, *args)

    monkeypatch.setattr(worker_ray, "Worker", Fails)
    config = live(make_config, federation__buffer=4)
    with pytest.raises(FedrayError, match=r"clients reported and 4 are needed \(federation.buffer 4\)"):
        execute(prepare(config))


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method__name": "fedex"}, "fedex averages something else"),
        ({"method__name": "rolora"}, "rolora averages something else"),
        ({"method__name": "fedsa"}, "fedsa averages something else"),
        ({"privacy": {"noise": 1.0}}, "privacy and secure sums"),
        ({"federation__wire": "int8"}, "federation.wire measures"),
        ({"federation__cohort": 2}, "federation.cohort draws"),
        ({"federation__quorum": 0.5}, "federation.quorum"),
        ({"federation__keep_optimizer": True}, "keep_optimizer"),
        ({"worker": {"batch_clients": 2}}, "batch_clients"),
        ({"engine": "inline"}, "engine inline"),
    ],
)
def test_what_cannot_be_buffered_is_refused(make_config, options, words):
    with pytest.raises(ConfigError, match=words):
        make_config(**{"engine": "ray", "federation__buffer": 2} | OPTIONS | options)


def test_a_log_that_is_none_is_refused_before_anything_starts(make_config, tmp_path):
    with pytest.raises(ConfigError, match="give the same buffer"):
        make_config(federation__replay=str(tmp_path), **OPTIONS)
    with pytest.raises(ConfigError, match=r"has no rounds.jsonl"):
        prepare(replay(make_config, tmp_path))
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(ConfigError, match="is of a run without federation.buffer"):
        prepare(replay(make_config, tmp_path))
    log = logged(tmp_path / "log", LOG, make_config)
    with pytest.raises(ConfigError, match=r"is of a run with another federation.buffer \(2, now 1\)"):
        prepare(replay(make_config, log, federation__buffer=1))
    with pytest.raises(ConfigError, match=r"is of a run with another seed \(0, now 4\)"):
        prepare(replay(make_config, log, seed=4))
    with pytest.raises(ConfigError, match="federation.buffer 9 is more than the 4 clients"):
        prepare(make_config(engine="ray", federation__buffer=9, **OPTIONS))


def test_a_log_that_is_too_short_says_so(make_config, tmp_path):
    config = replay(make_config, logged(tmp_path / "log", LOG[:2], make_config))
    with pytest.raises(FedrayError, match=r"0 of 4 clients reported and 2 are needed \(federation.buffer 2\)"):
        run(config)


def test_a_replay_is_not_gone_on_with(make_config, tmp_path, monkeypatch):
    config = replay(make_config, logged(tmp_path / "log", LOG, make_config))
    real, saves = checkpoint.save, []

    def dies(*args):
        real(*args)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    again = config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})
    with pytest.raises(ConfigError, match="holds a replay, which begins at the first round"):
        prepare(again)


class Judged(Worker):
    """Whose updates of some clients are too large."""

    bad: ClassVar[tuple[str, ...]] = ()

    def train(self, client, round, *args):
        update, kept, report = super().train(client, round, *args)
        if client in self.bad:
            update = Packet(update.manifest, update.vector + np.float32(100.0))
        return update, kept, report


def test_who_is_judged_away_leaves_room_for_the_next_and_is_not_said_to_have_arrived(
    make_config, tmp_path, monkeypatch
):
    log = [[("client-0", 0), ("client-1", 0), ("client-2", 0), ("client-3", 0)]]
    options = {"federation__rounds": 1, "federation__max_update_norm": 50.0, "federation__buffer": 2}
    monkeypatch.setattr(Judged, "bad", ("client-0", "client-2"))
    monkeypatch.setattr(inline, "Worker", Judged)
    folder = logged(tmp_path / "log", log, make_config, **options)
    (record,) = rounds(run(replay(make_config, folder, **options)))
    assert record["cohort"] == ["client-1", "client-3"] == [client for client, _ in record["arrivals"]]
    assert sorted(one["client"] for one in record["dropped"]) == ["client-0", "client-2"]
