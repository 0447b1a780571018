"""Thirty seeded schedules of chaos on a cluster of several nodes (`tests/chaos.py`); and a hundred rounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import STROKES, schedule
from support import ROOT, same_bits

SEEDS = 30

#: A run of a hundred rounds on Ray, and what its processes hold after so many of them.
HUNDRED = """
import gc, json, sys
import psutil, ray
from fedray.config.read import from_dict
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute

def held():
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            for name in ("ray::WorkerActor", "ray::CoordinatorActor"):
                if name in title:
                    found.setdefault(name, []).append(process.memory_info().rss - process.memory_info().shared)
        except psutil.Error:
            pass
    found["driver"] = [psutil.Process().memory_info().rss - psutil.Process().memory_info().shared]
    return {name: sum(sizes) for name, sizes in found.items()}

class Looks(Silent):
    seen = {}
    def round(self, record):
        if record["round"] in (40, 100):
            self.seen[record["round"]] = held()

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
listener = Looks()
execute(prepare(from_dict(json.loads(sys.argv[1]))), listener)
print("HELD", json.dumps([listener.seen[40], listener.seen[100]]))
"""


def test_schedules_have_every_stroke_as_often_as_the_others():
    names, first = zip(*[(name, strokes[0]) for name, strokes in map(schedule, range(SEEDS))], strict=True)
    assert {name: names.count(name) for name in names} == {"ranks": 10, "private": 10, "secure": 10}
    strokes = [stroke for seed in range(SEEDS) for *_, stroke in schedule(seed)[1]]
    assert set(strokes) == set(STROKES) and min(map(strokes.count, STROKES)) >= 4
    assert schedule(7) == schedule(7) and all(0 <= r < 4 and 0 <= pause <= 1 for r, pause, _ in first)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_whatever_dies_a_run_ends_as_if_nothing_had(tiny, tmp_path):
    """Nobody is dropped (the quorum is everyone), so that all adapters are those of the undisturbed run."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos.py"), str(tmp_path), str(tiny), "0", str(SEEDS)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"plan"')]
    assert len(told) == 3 + SEEDS, done.stdout[-3000:] + done.stderr[-3000:]
    struck = [stroke for one in told for stroke in one.get("struck", [])]
    for one in told:
        assert one.get("code") == 0 and one["left"] == [], one
        same_bits(tmp_path / f"undisturbed-{one['config']}", tmp_path / one["plan"])
    planned = sum(len(one["strokes"]) for one in told)
    landed = [stroke for stroke in struck if "nothing there" not in stroke]
    assert len(landed) > 0.8 * planned and min(map(landed.count, STROKES)) >= 3, (planned, struck)
    for one in told:  # a disk that is full, or a driver that is gone, ends the job, which is started again
        ended = sum(stroke in ("driver", "full disk") for stroke in one["struck"][:-1])
        assert one["starts"] > (1 if ended else 0), one


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("method", ["fedit", "fedex", "rolora"])
def test_a_hundred_rounds_leave_memory_flat(make_config, method):
    options = {"federation__rounds": 100, "federation__evaluate_every": 10, "worker": {"cpus": 1, "count": 2}}
    config = make_config(engine="ray", method__name=method, **options)
    values = json.dumps(config.model_dump(mode="json", exclude_unset=True))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUNDRED, values],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    early, late = json.loads(done.stdout.rsplit("HELD ", 1)[1].splitlines()[0])
    assert set(early) == {"ray::WorkerActor", "ray::CoordinatorActor", "driver"}
    print(early, late)
    assert all(late[name] < 1.05 * early[name] for name in early), (early, late)
    assert len((Path(config.output.dir) / "rounds.jsonl").read_text().splitlines()) == 100
