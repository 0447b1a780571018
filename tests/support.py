"""What several test modules use: (adapter, method) pairs, whole runs and what they leave, a Ray head, one trainer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from fedray.config.build import make_method, make_spec
from fedray.federation import run as inline
from fedray.federation import worker_ray
from fedray.federation.messages import Failure
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.federation.worker import Worker
from fedray.methods import METHODS, View
from fedray.training.local import LocalTrainer

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import this file

#: The checkout whose tests run; the package that they import may be installed elsewhere.
ROOT = Path(__file__).resolve().parent.parent
#: A real encoder and real data, beside the checkout; tests marked `shared` skip without it.
SHARED = ROOT.parent / "shared"
SCRIPTS = Path(sys.executable).parent


# --- every (adapter, method) pair of the table, and the variants of methods that have options ---------------------

#: id -> (adapter, method, options of the method section)
PAIRS = {f"{kind}+{name}": (kind, name, {}) for name, method in METHODS.items() for kind in method.adapters}
VARIANTS = {
    **{
        f"{kind}+{name}": (kind, method, options)
        for kind in ("lora", "abba")
        for name, (method, options) in {
            "fedex-reinit": ("fedex", {"assignment": "reinit"}),
            "fedex-truncated": ("fedex", {"residual_rank": 1}),
            "flora-truncated": ("flora", {"residual_rank": 2}),
            "fra-fold": ("fra", {"residual": "fold"}),
            "fra-balanced": ("fra", {"split": "balanced"}),
            "florist-half": ("florist", {"energy": 0.5}),
        }.items()
    },
    "lora+fedex-keep": ("lora", "fedex", {"assignment": "keep"}),
    "lora+fedask-wide": ("lora", "fedask", {"oversample": 25}),
}
ALL = PAIRS | VARIANTS

#: Exact in every round, within rounding: what says so, unless an option cuts it or folds the rest in. Others state
#: their error (`STATED`), an upper bound of it, or have no global model.
EXACT = {
    i
    for i, (_, method, options) in ALL.items()
    if options.get("residual") == "fold" or (METHODS[method].exact == "yes" and "residual_rank" not in options)
}
LINEAR = {i for i, (_, method, _) in ALL.items() if METHODS[method].linear}
BOUNDED = {i for i, (_, method, _) in ALL.items() if method == "fedask"}
PERSONAL = {i for i, (_, method, _) in ALL.items() if method == "fedsa"}
STATED = set(ALL) - EXACT - BOUNDED - PERSONAL


# --- whole runs ---------------------------------------------------------------------------------------------------


def run(config) -> Path:
    execute(prepare(config))
    return Path(config.output.dir)


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoint").glob("round-*"))[-1]
    return load_file(newest / "tensors.safetensors")


def rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same_bits(one: Path, other: Path) -> None:
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    quiet = [[{k: v for k, v in r.items() if k != "seconds"} for r in rounds(f)] for f in (one, other)]
    assert quiet[0] == quiet[1]


def options(pair: str) -> dict:
    """The config of one pair: cores learn slowly at LoRA's rate, and abba splits its rank in two."""
    kind, name, extra = ALL[pair]
    extra = extra | ({"fra_rounds": 1} if name == "fra-ffa" else {})
    adapter = {"kind": kind, "rank": 4 if kind == "abba" else 2} | ({"alpha": 4} if kind in ("lora", "abba") else {})
    federation = {
        "clients": 3,
        "rounds": 3,
        "local_steps": 2,
        "batch_size": 4,
        "lr": 0.2 if kind in ("lora-sb", "ravan") else 0.01,
    }
    return {"adapter": adapter, "method": {"name": name, **extra}, "federation": federation}


def sabotaged(make_config, monkeypatch, kind, **options):
    """In round 2 client 1 raises; or its process dies, or it is late, once; or a process dies evaluating, once."""

    class Sabotaged(Worker):
        def once(self):
            flag = Path(self.trainer.config.output.dir) / "flag"
            first = not flag.exists()
            flag.touch()
            return first

        def train(self, client, round, *args):
            if client == "client-1" and round == 1:
                if kind == "raises":
                    return None, None, Failure(client, "KeyError: 'ward'", "Traceback ...")
                if kind == "dies" and self.once():
                    os.kill(os.getpid(), 9)
                if kind == "late" and self.once():
                    time.sleep(60)
            return Worker.train(self, client, round, *args)

        def evaluate(self, part, client, share, header, *args):
            if kind == "dies evaluating" and header.round == 2 and share[0] == 1 and self.once():
                os.kill(os.getpid(), 9)
            return Worker.evaluate(self, part, client, share, header, *args)

    one = {"worker": {"cpus": 1, "count": 1}} if kind == "raises" else {}
    config = make_config(**{"engine": "ray"} | one | options)
    monkeypatch.setattr(worker_ray if config.engine == "ray" else inline, "Worker", Sabotaged)
    return config


# --- Ray, as a cluster has it --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Head:
    """A Ray head of its own, with token authentication; nothing of it is shared with the tests' embedded Ray."""

    def __init__(
        self,
        folder: Path,
        options: tuple[str, ...] | list[str] = ("--num-cpus=3",),
        variables: dict[str, str] | None = None,
    ):
        # Unix sockets need a short path.
        self.folder, self.temp = folder, Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
        self.token = self.temp / "token"
        self.token.write_text("0123456789abcdef" * 4)
        self.token.chmod(0o600)
        port, dashboard = free_port(), free_port()
        self.address, self.api = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FEDRAY_"))}
        self.env = kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_worker_niceness": "0",
            "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        }
        self.started = {"RAY_metrics_report_interval_ms": "1000", "FEDRAY_UNSAFE_TEST_KEY": "tests"} | (variables or {})
        self.log = (folder / "head.log").open("w")
        self.process = subprocess.Popen(
            [
                "ray",
                "start",
                "--head",
                "--block",
                *options,
                f"--port={port}",
                f"--dashboard-port={dashboard}",
                "--dashboard-host=127.0.0.1",
                "--include-dashboard=true",
                f"--temp-dir={self.temp}",
                "--disable-usage-stats",
                f"--metrics-export-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env=self.env | self.started,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 90
        while self.get("/api/version") is None:
            assert self.process.poll() is None and time.monotonic() < end, (folder / "head.log").read_text()
            time.sleep(0.5)
        # The dashboard answers before its agent takes jobs.
        while subprocess.run(
            self.command("true", options=("--no-wait",)), env=self.env, capture_output=True, timeout=60, check=False
        ).returncode:
            assert time.monotonic() < end, (folder / "head.log").read_text()
            time.sleep(0.5)

    def get(self, path: str, token: bool = True) -> bytes | int | None:
        """What the dashboard answers: a body, a status code that is an error, or None when nobody listens."""
        headers = {"Authorization": f"Bearer {self.token.read_text()}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.api + path, headers=headers), timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def join(self, *options: str) -> subprocess.Popen:
        """Another node of this cluster. Two that start at once may take each other's ports."""
        node = subprocess.Popen(
            [
                "ray",
                "start",
                "--block",
                f"--address={self.address}",
                *options,
                f"--temp-dir={self.temp}",
                "--disable-usage-stats",
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env=self.env | self.started,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        there, end = self.nodes(), time.monotonic() + 60
        while self.nodes() == there:
            assert node.poll() is None and time.monotonic() < end, (self.folder / "head.log").read_text()
            time.sleep(0.5)
        return node

    def nodes(self) -> int:
        return len(json.loads(self.get("/nodes?view=summary"))["data"]["summary"])

    def submit(self, *entrypoint: str, working_dir: Path | None = ROOT) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*entrypoint, working_dir=working_dir),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=580,
            check=False,
        )

    def command(self, *entrypoint: str, options: tuple[str, ...] = (), working_dir: Path | None = ROOT) -> list[str]:
        where = ("--working-dir", str(working_dir)) if working_dir else ()
        return ["ray", "job", "submit", "--address", self.api, *where, *options, "--", *entrypoint]

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", str(self.temp)], check=False)
        self.log.close()
        shutil.rmtree(self.temp, ignore_errors=True)


# --- one client's work, without a run -------------------------------------------------------------------------------


def stopped_after_two(config, monkeypatch):
    """Runs it in one process, and interrupts it in its third round; the config that goes on from there."""
    calls = []

    def dies(self, *args, real=inline.InlinePool.train):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(inline.InlinePool, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert len(rounds(Path(config.output.dir))) == 2
    return config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})


def trainer_and_view(config):
    trainer = LocalTrainer(config, "cpu", 1)
    method = make_method(config)
    spec = make_spec(config, trainer.layers, trainer.data.clients)
    state = method.init(spec, trainer.describe()[1], trainer.start_from_weights(spec.adapter))
    return trainer, method.view(state.spec, state, None)


def moved(view: View, seed=0) -> View:
    g = torch.Generator().manual_seed(seed)
    return View(
        {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in view.tensors.items()}, view.base, view.trained
    )


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[n] - other[n]).abs().max().item() for n in one)


OPTIONS = {
    "plain": {},
    "accumulate": {"federation__accumulate": 2},
    "sgd": {"federation__optimizer": "sgd", "federation__weight_decay": 0.1, "federation__lr": 0.5},
    "no-clip": {"federation__max_grad_norm": None},
    "tight-clip": {"federation__max_grad_norm": 0.01},
    "dropout": {"adapter__dropout": 0.2},
    "ffa": {"method__name": "ffa"},
    "proximal": {"federation__proximal": 0.5},
    "lora-sb": {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 3}},
    "abba": {"adapter": {"kind": "abba", "rank": 4, "alpha": 4}},
    "abba, the pair": {"method__name": "fra", "adapter": {"kind": "abba", "rank": 4, "alpha": 4}},
    "ravan": {"method__name": "ravan", "adapter": {"kind": "ravan", "rank": 2}},
}
