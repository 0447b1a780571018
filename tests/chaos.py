"""Seeded chaos on a cluster of several nodes: `python tests/chaos.py FOLDER MODELS FIRST LAST` runs the schedules of
these seeds, one after the other, and prints a JSON line for each.

FOLDER takes the runs; MODELS is the folder of the tests' tiny models. A schedule is one to three strokes, each as soon
as a round is done and a random time has passed: SIGKILL to a worker, to another rank of one, to the coordinator or to
the driver; a node that goes, and another that comes; a disk on which the coordinator can write nothing more. Whoever
started the run starts it again (`--output.resume`) where the driver has ended without a result.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray
import yaml
from ray.cluster_utils import Cluster

ROUNDS = 4
#: By stroke, the title of the process that is struck.
PROCESSES = {"worker": "ray::WorkerActor", "rank": "ray::RankActor", "coordinator": "ray::CoordinatorActor"}
STROKES = [*PROCESSES, "driver", "node", "full disk"]
#: A file that the coordinator writes may have so many bytes on a full disk.
LEFT = 2048
#: A run that takes longer has hung.
LONGEST = 240.0


def configs(models: Path) -> dict[str, dict]:
    """What the schedules run, by name."""
    common = {
        "model": {"path": str(models / "llama")},
        "data": {"source": str(models / "text.jsonl"), "max_length": 48},
        "federation": {"clients": 3, "rounds": ROUNDS, "local_steps": 12, "batch_size": 4, "lr": 0.003},
        "worker": {"cpus": 1, "count": 1},
        "adapter": {"rank": 2, "alpha": 4},
    }
    kept = {"federation": common["federation"] | {"keep_optimizer": True}}
    two = {"clients": {"client-1": {"ranks": 2, "zero_stage": 2}}}
    return {
        "ranks": common | kept | two | {"method": {"name": "fedex"}},
        "private": common | {"method": {"name": "ffa"}, "privacy": {"noise": 1.0}},
        "secure": common | {"method": {"name": "fedit"}, "privacy": {"secure_aggregation": True}},
    }


def schedule(seed: int) -> tuple[str, list[tuple[int, float, str]]]:
    """The config's name, and (rounds done, seconds after that, stroke)."""
    draw = random.Random(seed)
    name = ["ranks", "private", "secure"][seed % 3]
    possible = STROKES if name == "ranks" else [s for s in STROKES if s != "rank"]
    first = possible[seed // 3 % len(possible)]  # each stroke comes as often as the others
    strokes = [first, *draw.choices(possible, k=draw.randint(0, 2))]
    rounds = sorted(draw.choices(range(ROUNDS), k=len(strokes)))
    return name, [(r, round(draw.uniform(0.0, 1.0), 2), s) for r, s in zip(rounds, strokes, strict=True)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def processes(word: str) -> list[psutil.Process]:
    """Of this cluster, whose nodes are this process's children."""
    return [p for p in psutil.Process().children(recursive=True) if title(p).startswith(word)]


class Field:
    """The cluster, and the run on it."""

    def __init__(self, folder: Path, config: dict):
        self.folder, self.config = folder, config
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.driver: subprocess.Popen | None = None
        self.before = set(psutil.pids())

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(self.config | {"output": {"dir": str(self.folder), "track": None}}))
        command = [sys.executable, "-W", "ignore", "-m", "fedray.cli", "run", "--config", str(file), "--output.resume"]
        env = os.environ | {"RAY_ADDRESS": self.cluster.address}
        with self.folder.with_suffix(".log").open("ab") as log:
            self.driver = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def rounds(self) -> int:
        file = self.folder / "rounds.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def strike(self, stroke: str) -> bool:
        """Whether there was anything to strike."""
        if stroke == "driver":
            self.driver.kill()
            return True
        if stroke == "node":
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=2))
            return True
        victims = processes(PROCESSES["coordinator" if stroke == "full disk" else stroke])
        for victim in victims[:1]:
            if stroke == "full disk":
                resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (LEFT, resource.RLIM_INFINITY))
            else:
                victim.send_signal(signal.SIGKILL)
        return bool(victims)

    def run(self, strokes: list[tuple[int, float, str]]) -> dict:
        """The run to its end, started again as often as it takes."""
        began, starts, struck, strokes = time.monotonic(), 1, [], list(strokes)
        self.start()
        while not (self.folder / "summary.json").is_file():
            if time.monotonic() - began > LONGEST:
                return {"error": "the run hangs", "struck": struck, "starts": starts}
            if self.driver.poll() is not None:
                if starts > 2 + len(struck):
                    return {"error": f"exit code {self.driver.returncode}", "struck": struck, "starts": starts}
                starts += 1
                self.start()
            elif strokes and self.rounds() >= strokes[0][0] and self.there(strokes[0][2]):
                _, pause, stroke = strokes.pop(0)
                time.sleep(pause)
                struck.append(stroke if self.strike(stroke) else f"{stroke} (nothing there)")
            time.sleep(0.02)
        code = self.driver.wait(timeout=60)
        return {"code": code, "struck": struck, "starts": starts, "seconds": round(time.monotonic() - began, 1)}

    def there(self, stroke: str) -> bool:
        """Before the first round is under way, there is nobody to strike."""
        return stroke in ("driver", "node") or bool(processes(PROCESSES["coordinator"]))

    def left(self) -> list[str]:
        """What outlives the run, after a while."""
        end = time.monotonic() + 30
        while (names := [n for n in PROCESSES.values() if self.outlive(n)]) and time.monotonic() < end:
            time.sleep(0.2)
        return names

    def outlive(self, word: str) -> bool:
        """Also of a node that went: what nobody is the parent of any more."""
        return any(title(p).startswith(word) for p in psutil.process_iter() if p.pid not in self.before)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def main(folder: Path, models: Path, first: int, last: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plans = {"undisturbed-" + name: (name, []) for name in configs(models)}
    plans |= {f"seed-{seed}": schedule(seed) for seed in range(first, last)}
    needed = {name for plan, (name, _) in plans.items() if plan.startswith("seed")}
    for plan, (name, strokes) in plans.items():
        if name not in needed:
            continue
        field = Field(folder / plan, configs(models)[name])
        try:
            result = field.run(strokes)
            result["left"] = field.left()
        finally:
            field.close()
        print(json.dumps({"plan": plan, "config": name, "strokes": strokes} | result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
