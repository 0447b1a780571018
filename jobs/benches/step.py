"""A client's local step under DeepSpeed, against the same loop in plain PyTorch."""

from __future__ import annotations

import statistics

import torch
from rich.console import Console

from benches.measure import median_ratio, table, threads
from fedray.adapters import ADAPTERS
from fedray.config.build import make_method
from fedray.config.read import from_dict
from fedray.methods import Spec, View
from fedray.training.local import LocalTrainer


def step(console: Console, rounds: int) -> None:
    """A client's local step on the built-in model, engines in turn so that drift of the machine hits both alike."""
    clients = {backend: _client(backend) for backend in ("torch", "deepspeed")}
    seconds: dict[str, list[float]] = {backend: [] for backend in clients}
    for round in range(1, rounds + 1):
        for backend in list(clients) if round % 2 else list(clients)[::-1]:
            trainer, view = clients[backend]
            seconds[backend].append(trainer.train(view, "xml", round, base_key="same").seconds / 4)
    shown = table(
        f"a client's step, built-in model, batch 8 x 256 ({threads()}, {rounds} rounds of 4 steps)",
        ("engine", "median s a step", "times plain PyTorch (median of the rounds)"),
    )
    shown.add_row("plain PyTorch", f"{statistics.median(seconds['torch']):.4f}", "1.00")
    ratio = median_ratio(seconds["deepspeed"], seconds["torch"])
    shown.add_row("DeepSpeed, ZeRO 0", f"{statistics.median(seconds['deepspeed']):.4f}", f"{ratio:.3f}")
    console.print(shown)


def _client(backend: str) -> tuple[LocalTrainer, View]:
    """A trainer that has trained once, and what it trains from."""
    config = from_dict(
        {"worker": {"backend": backend}, "engine": "inline", "federation": {"local_steps": 4, "batch_size": 8}}
    )
    trainer = LocalTrainer(config, "cpu", torch.get_num_threads())
    method = make_method(config)
    state = method.init(Spec(ADAPTERS["lora"](), trainer.layers, 0), trainer.describe()[1])
    view = method.view(state.spec, state, None)
    trainer.train(view, "xml", 0)
    return trainer, view
