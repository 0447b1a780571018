"""What a client of one trivial local step costs, fedray's engines beside Flower's and pfl-research's simulators."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benches.measure import table
from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute

#: One layer of a one-layer Llama, 512 -> 256, at rank 128: 98,304 trained numbers.
TARGET, RANK, HIDDEN, INNER, TEXT = "down_proj", 128, 256, 512, "a cat sat"
#: Clients of a pass, where they train together (worker.batch_clients).
TOGETHER = 50
PEERS = Path(__file__).parent / "peers"

Rounds = Callable[[], list[float]]


def overhead(console: Console, pythons: Sequence[str], clients: int, rounds: int = 6, turns: int = 3) -> None:
    """Milliseconds a client and round, medians over `turns` runs of each in turn. `pythons`: of environments that have
    a peer each. Raises ConfigError for one that has none."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root)
        runs: dict[str, Rounds] = {
            f"fedray, {where}{words}": partial(fedray_rounds, root, engine, clients, rounds, together)
            for together, words in ((1, ""), (TOGETHER, f", {TOGETHER} together"))
            for engine, where in (("inline", "one process"), ("ray", "Ray"))
        }
        for python in pythons:
            runs |= peer_runs(python, root, clients, rounds)
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                took[name].append(1e3 * statistics.median(run()) / clients)
    milliseconds = {name: statistics.median(values) for name, values in took.items()}
    title = f"{clients} clients of {(HIDDEN + INNER) * RANK:,} trained numbers, one step, {os.cpu_count()} CPUs"
    shown = table(title, ("what", "ms a client", "to one process", "to Ray"))
    for name, value in milliseconds.items():
        ratios = [value / milliseconds[ours] for ours in ("fedray, one process", "fedray, Ray")]
        shown.add_row(name, f"{value:.2f}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(shown)


def write_model(root: Path) -> None:
    """A one-layer Llama of random weights over bytes, and two texts a client."""
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=259,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(root / "model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "model")


def fedray_rounds(root: Path, engine: str, clients: int, rounds: int, together: int = 1) -> list[float]:
    """Seconds of the rounds after the first, in which engines are built."""
    text, out = root / f"text-{clients}.jsonl", tempfile.mkdtemp(dir=root)
    text.write_text(f"{json.dumps({'text': TEXT})}\n" * (2 * clients))
    config = from_dict(
        {
            "engine": engine,
            "model": {"path": str(root / "model")},
            "method": {"name": "fedit"},
            "adapter": {"rank": RANK, "targets": [TARGET]},
            "data": {"source": str(text), "max_length": 16},
            "federation": {
                "clients": clients,
                "rounds": rounds,
                "local_steps": 1,
                "batch_size": 1,
                "optimizer": "sgd",
                "evaluate_every": rounds,
            },
            "worker": {"cpus": 1, "backend": "torch", "batch_clients": together},
            "output": {"dir": f"{out}/run", "track": None},
        }
    )
    execute(prepare(config), Silent())
    records = [json.loads(line) for line in Path(f"{out}/run/rounds.jsonl").read_text().splitlines()]
    return [sum(v for k, v in r["seconds"].items() if k != "evaluate") for r in records[2:]]


def peer_runs(python: str, root: Path, clients: int, rounds: int) -> dict[str, Rounds]:
    """What the environment of this Python can run."""
    run = lambda script, *words: lambda: peer_rounds(python, script, clients, rounds, *words)  # noqa: E731
    if has(python, "flwr"):
        return {"Flower, Ray, no step": run("flower_rounds.py", (HIDDEN + INNER) * RANK)}
    if has(python, "pfl"):
        tokens = len(TEXT) + 1
        return {
            "pfl-research, one process": run("pfl_rounds.py", root / "model", TARGET, RANK, tokens),
            "pfl-research, a linear layer": run("pfl_rounds.py", "linear", TARGET, RANK, tokens),
        }
    raise ConfigError(f"--peer-python {python}: its environment has neither flwr[simulation] nor pfl: pip install one")


def has(python: str, module: str) -> bool:
    """Whether an environment has a module."""
    words = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", words], check=False).returncode == 0


def peer_rounds(python: str, script: str, clients: int, rounds: int, *words: object) -> list[float]:
    """Seconds of a peer's rounds after the first, with a Ray of its own."""
    command = [python, str(PEERS / script), str(clients), str(rounds), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        environment = {k: v for k, v in environment.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds
