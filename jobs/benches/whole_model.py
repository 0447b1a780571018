"""One aggregation of a whole model, as the coordinator does it."""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from rich.console import Console

from benches.measure import MIB, allocated, median_ratio, table, threads, timed, timed_once
from benches.rounds import moved_updates
from fedray.adapters import attach
from fedray.config.build import make_method, make_spec
from fedray.config.read import from_dict
from fedray.lowrank import weighted_sum
from fedray.training.model import skeleton

#: The cohort that every other is held against.
FEW = 10


def whole_model(console: Console, shape: str, clients: int, rank: int) -> None:
    """One aggregation of every linear layer, as the coordinator does it: means, SVDs, base updates, and what was lost;
    then the mean alone."""
    shown = table(
        f"{shape}, rank {rank}, every linear layer ({threads()})",
        (
            "method",
            "clients",
            "numbers a client",
            "aggregate s",
            f"against {FEW} clients",
            "peak MiB",
            "over the updates' own",
            "largest tensor MiB",
            "largest m x n MiB",
        ),
    )
    for method in ("fedit", "fedex", "fra", "flora", "fed-sb"):
        rows = {count: _alone(method, shape, count, rank) for count in sorted({FEW, clients})}
        for count, (seconds, words) in rows.items():
            numbers, *rest = words
            times = f"{seconds / rows[FEW][0]:.1f}"
            shown.add_row(method, str(count), numbers, f"{seconds:.2f}", times, *rest)
    console.print(shown)
    mean_rate(console, min(clients, FEW), 11_272_192)


def _alone(*arguments: Any) -> tuple[float, list[str]]:
    """A row, measured in a process of its own: what another one has left of the memory decides how fast this one gets
    any."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as alone:
        return alone.submit(_row, *arguments).result()


def _row(name: str, shape: str, clients: int, rank: int) -> tuple[float, list[str]]:
    adapter = {"kind": "lora-sb" if name == "fed-sb" else "lora", "rank": rank}
    config = from_dict({"model": {"path": shape}, "adapter": adapter, "method": {"name": name}})
    spec = make_spec(config, attach.layers(skeleton(config)), [f"client-{i}" for i in range(clients)])
    method, g = make_method(config), torch.Generator().manual_seed(0)
    start = {}
    for one in spec.layers if spec.adapter.started else ():
        start[f"{one.name}.sb_B"] = torch.linalg.qr(torch.randn(one.m, rank, generator=g)).Q
        start[f"{one.name}.sb_A"] = torch.linalg.qr(torch.randn(one.n, rank, generator=g)).Q.T.contiguous()
    state = method.init(spec, {}, start)
    updates = moved_updates(method, state, clients, g)
    size = sum(t.numel() * 4 for u in updates for t in u.tensors.values())

    def aggregate() -> None:
        method.aggregate(state, updates)

    seconds, _ = timed(aggregate, 3)
    peak, largest = allocated(aggregate)
    dense = max(one.m * one.n * 4 for one in spec.layers)
    stacked = clients * rank * max(one.m for one in spec.layers) * 8  # which is as large itself, with many clients
    if stacked < dense:
        assert largest < dense, f"{name} made a tensor of {largest} bytes: as large as m x n"
    return seconds, [
        f"{size // 4 // clients:,}",
        f"{peak / MIB:.0f}",
        f"{peak / size:.2f}",
        f"{largest / MIB:.1f}",
        f"{dense / MIB:.1f}",
    ]


def mean_rate(console: Console, clients: int, numbers: int) -> None:
    """The weighted mean alone against copying the same updates in memory, in turn. Rates count the updates' own
    bytes."""
    vectors, weights = [torch.randn(numbers) for _ in range(clients)], [1 / clients] * clients
    room, result = [torch.empty(numbers) for _ in range(clients)], torch.empty(numbers)

    def copy() -> None:
        for target, vector in zip(room, vectors, strict=True):
            target.copy_(vector)

    def mean() -> None:
        weighted_sum(vectors, weights, out=result)

    copy()
    mean()
    turns = [(timed_once(copy, "cpu"), timed_once(mean, "cpu")) for _ in range(9)]
    copies, means = zip(*turns, strict=True)
    rates = [clients * numbers * 4 / statistics.median(seconds) / 1e9 for seconds in (copies, means)]
    shown = table(
        f"the mean of {clients} updates of {numbers:,} numbers, added in fp64 ({threads()})",
        ("what", "GB/s", "share of the copy (median of turns)"),
    )
    shown.add_row("copy in memory", f"{rates[0]:.1f}", "1")
    shown.add_row("weighted mean", f"{rates[1]:.1f}", f"{median_ratio(copies, means):.2f}")
    console.print(shown)
