"""ABBA's memory and step against LoRA's and LoHa's at as many trained numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

from benches.measure import MIB, device_here, median_ratio, peak_bytes, standing_bytes, table, threads, timed_once
from benches.models import encoder, layer

Step = Callable[[], None]
KINDS = ("lora", "abba", "loha")
WIDTH, RANK, TOKENS = 4096, 32, 512
#: Multiply-adds a token of the one layer: the frozen weight twice (forward, gradient of the input), thin factors of q
#: columns three times each way.
WORK = {"lora": 2 * WIDTH**2 + 3 * 32 * 2 * WIDTH, "abba": 2 * WIDTH**2 + 3 * 256 * 2 * WIDTH}


def abba(console: Console, repeats: int) -> None:
    """A training step (forward, backward, AdamW) of LoRA, ABBA and LoHa with the same number of parameters, in turn."""
    device = device_here()
    encoders = {kind: encoder(kind, 8, 384, 6).to(device) for kind in KINDS}
    steps = {kind: _encoder_step(model, device) for kind, model in encoders.items()}
    _compare(console, "BERT, 6 layers of 384, rank 8, 16 x 64 tokens", encoders, steps, repeats, {})
    layers = {kind: layer(kind, RANK, WIDTH).to(device) for kind in KINDS}
    steps = {kind: _layer_step(model, device) for kind, model in layers.items()}
    title = f"one {WIDTH} x {WIDTH} layer, rank {RANK}, {TOKENS} tokens"
    _compare(console, title, layers, steps, repeats, {kind: f"{n / WORK['lora']:.2f}" for kind, n in WORK.items()})


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _encoder_step(model: nn.Module, device: str) -> Step:
    optimizer = _optimizer(model)
    inputs = {
        "input_ids": torch.randint(0, 1000, (16, 64), device=device),
        "labels": torch.zeros(16, dtype=torch.long, device=device),
    }

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _layer_step(model: nn.Module, device: str) -> Step:
    optimizer, x = _optimizer(model), torch.randn(TOKENS, WIDTH, device=device)

    def step() -> None:
        model(x.requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def _compare(
    console: Console,
    title: str,
    models: dict[str, nn.Module],
    steps: dict[str, Step],
    repeats: int,
    floors: dict[str, str],
) -> None:
    """One table. `floors`: the least ratio of arithmetic, where it is known."""
    device = device_here()
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(repeats):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
            seconds[kind].append(timed_once(steps[kind], device))
    shown = table(
        f"{title}, {device} ({threads()}), {repeats} steps in turn",
        (
            "adapter",
            "trained numbers",
            "median s a step",
            "times LoRA (median of turns)",
            "standing MiB",
            "peak MiB in a step",
            "times LoRA, all",
            "floor of its arithmetic",
        ),
    )
    standing = {kind: standing_bytes(model) for kind, model in models.items()}
    peaks = {kind: peak_bytes(step, device) for kind, step in steps.items()}
    for kind, model in models.items():
        shown.add_row(
            kind,
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
            f"{statistics.median(seconds[kind]):.4f}",
            f"{median_ratio(seconds[kind], seconds['lora']):.2f}",
            f"{standing[kind] / MIB:.1f}",
            f"{peaks[kind] / MIB:.1f}",
            f"{(standing[kind] + peaks[kind]) / (standing['lora'] + peaks['lora']):.3f}",
            floors.get(kind, "-"),
        )
    console.print(shown)
