"""Processes die: the whole job, the coordinator. Nothing is lost, and the result is the same to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from support import rounds, run, same_bits

from fedray.federation import run_ray as runs
from fedray.federation import worker_ray
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.federation.worker import Worker


@pytest.mark.parametrize("engine", ["ray", pytest.param("inline", marks=pytest.mark.slow)])
def test_a_job_killed_during_round_3_resumes_to_the_same_bits(make_config, engine, tmp_path):
    options = dict(federation__clients=5, federation__cohort=3, federation__rounds=4, federation__local_steps=15)
    whole = run(make_config(**options))
    config = make_config(engine=engine, **options)
    folder = Path(config.output.dir)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "fedray.cli", "run", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "rounds.jsonl").is_file() or len((folder / "rounds.jsonl").read_text().splitlines()) < 2:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert len(rounds(folder)) < 4 and not (folder / "summary.json").exists()
    subprocess.run([*command, "--output.resume"], env=environment, check=True, timeout=250, stdout=subprocess.DEVNULL)
    same_bits(whole, folder)


def test_a_coordinator_that_dies_in_a_round_is_restarted_from_the_last_checkpoint(
    make_config, ray_session, monkeypatch
):
    started, notes = [], []

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
            if round == 2 and len(started) == 1:
                ray.kill(started[0])

        def note(self, text):
            notes.append(text)

    monkeypatch.setattr(runs, "CoordinatorActor", Spy(runs.CoordinatorActor))
    options = dict(federation__keep_optimizer=True, federation__local_steps=30)
    config = make_config(engine="ray", **options)
    execute(prepare(config), Killer())
    assert len(started) == 2 and "restarted from the last checkpoint" in notes[0]
    same_bits(run(make_config(**options)), Path(config.output.dir))


def test_a_worker_that_cannot_start_again_is_lost_and_the_others_take_its_clients(
    make_config, ray_session, monkeypatch
):
    """Its data are gone from its machine, say."""

    class Dies(Worker):
        def __init__(self, config, *args, **options):
            self.flag = Path(config.output.dir) / "flag"
            if self.flag.exists():
                raise OSError("the data are gone")
            super().__init__(config, *args, **options)

        def train(self, client, round, *args):
            if client == "client-1" and round == 1 and not self.flag.exists():
                self.flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train(client, round, *args)

    monkeypatch.setattr(worker_ray, "Worker", Dies)
    options = dict(federation__local_steps=4, federation__clients=4)
    config = make_config(engine="ray", worker={"cpus": 1, "count": 2}, **options)
    execute(prepare(config))
    same_bits(run(make_config(**options)), Path(config.output.dir))
