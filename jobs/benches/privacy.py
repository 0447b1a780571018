"""What privacy costs a client: a DP-SGD step."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benches.measure import (
    MIB,
    device_here,
    median_ratio,
    peak_bytes,
    standing_bytes,
    table,
    threads,
    timed_once,
)
from benches.models import encoder
from fedray.adapters import ADAPTERS, attach
from fedray.config.read import from_dict
from fedray.privacy.dpsgd import Mechanism, SampleHooks, private_step
from fedray.privacy.keys import Key
from fedray.training.engine import TorchEngine


def private(console: Console, repeats: int) -> None:
    """A DP-SGD step (per-sample gradients, clip, noise, optimizer) against the plain step on the same batch, in
    turn."""
    shown = table(
        "a step with DP-SGD, BERT of 6 layers of 384, all linear, rank 8, 16 x 64 tokens, "
        f"{device_here()} ({threads()}), {repeats} in turn",
        (
            "adapter",
            "trained numbers",
            "plain, median s",
            "DP-SGD, median s",
            "times plain (median of turns)",
            "plain, peak MiB",
            "DP-SGD, peak MiB",
            "times plain, all memory",
        ),
    )
    for kind in ("lora", "lora-sb", "abba", "ravan"):
        shown.add_row(kind, *_private_row(kind, repeats))
    console.print(shown)


def _losses(forward: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(forward(inputs), inputs["labels"], reduction="none")


def _mean_loss(forward: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return _losses(forward, inputs).mean()


def _private_row(kind: str, repeats: int) -> list[str]:
    device, key, mechanism, turn = device_here(), Key(bytes(32)), Mechanism(1.0, 1.0, 16.0), itertools.count()
    batch = {
        "input_ids": torch.randint(0, 1000, (16, 64), device=device),
        "attention_mask": torch.ones(16, 64, dtype=torch.long, device=device),
        "labels": torch.zeros(16, dtype=torch.long, device=device),
    }
    model: Any = encoder(kind, 8, 384, 6).to(device).train()
    for name, parameter in attach.factors(model).items():
        parameter.requires_grad_(name.rsplit(".", 1)[1] in ADAPTERS[kind].trains)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine = TorchEngine(model, parameters, from_dict({"federation": {"max_grad_norm": 1.0}}).federation)

    def plain() -> None:
        engine.step([batch], _mean_loss, 1e-4)

    plain()
    standing, plain_peak = standing_bytes(model), peak_bytes(plain, device)
    hooks = SampleHooks(model)  # asleep in plain steps

    def noisy() -> None:
        private_step(engine, hooks, [batch], _losses, 1e-4, mechanism, key.stream("noise", next(turn)), check=False)

    noisy()
    seconds: dict[Callable[[], None], list[float]] = {plain: [], noisy: []}
    for i in range(repeats):
        for call in (plain, noisy) if i % 2 else (noisy, plain):
            seconds[call].append(timed_once(call, device))
    noisy_peak = peak_bytes(noisy, device)
    return [
        f"{sum(p.numel() for p in parameters.values()):,}",
        f"{statistics.median(seconds[plain]):.4f}",
        f"{statistics.median(seconds[noisy]):.4f}",
        f"{median_ratio(seconds[noisy], seconds[plain]):.3f}",
        f"{plain_peak / MIB:.1f}",
        f"{noisy_peak / MIB:.1f}",
        f"{(standing + noisy_peak) / (standing + plain_peak):.3f}",
    ]
