"""What an aggregation costs a client as the cohort grows: flat, where it is linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from benches.measure import MIB, peak_bytes, table, threads, timed
from benches.rounds import moved_updates
from fedray.adapters import ADAPTERS
from fedray.adapters.base import Layer
from fedray.config.build import make_method
from fedray.config.read import from_dict
from fedray.methods import Method, Spec, State, Update

METHODS = {"fedit": "lora", "ffa": "lora", "fedex": "lora", "fra": "lora", "flora": "lora"}
METHODS |= {"fed-sb": "lora-sb", "ravan": "ravan"}


def cohorts(console: Console, counts: Sequence[int] = (10, 100, 1000), size: int = 768, layers: int = 4) -> None:
    """Milliseconds a client of one aggregation, the report of what was lost included, and the most memory beyond the
    updates' own."""
    last, before = counts[-1], counts[-2]
    columns = (
        "method",
        *(f"{count} clients, ms each" for count in counts),
        f"{last} / {before}",
        "peak MiB",
        "of them",
    )
    shown = table(f"{layers} layers of {size} x {size}, rank 8 ({threads()})", columns)
    for name, kind in METHODS.items():
        costs, peaks = zip(*(_cost(name, kind, count, size, layers) for count in counts), strict=True)
        milliseconds = [f"{1e3 * seconds:.3f}" for seconds in costs]
        grown = f"{costs[-1] / costs[-2]:.2f}"
        shown.add_row(name, *milliseconds, grown, f"{peaks[-1] / MIB:.0f}", f"{peaks[-1] / peaks[-2]:.2f} x")
    console.print(shown)


def _cost(name: str, kind: str, clients: int, size: int, layers: int) -> tuple[float, int]:
    """Seconds a client (the median of a few aggregations), and the most bytes of one beyond the updates."""
    method, state, updates = _round(name, kind, clients, size, layers)

    def aggregate() -> None:
        method.aggregate(state, updates)

    seconds, _ = timed(aggregate, 5 if clients < 500 else 3)
    return seconds / clients, peak_bytes(aggregate, "cpu")


def _round(name: str, kind: str, clients: int, size: int, layers: int) -> tuple[Method, State, list[Update]]:
    """A first round: small moves from what was broadcast."""
    generator = torch.Generator().manual_seed(0)
    method = make_method(from_dict({"adapter": {"kind": kind}, "method": {"name": name}}))
    every = tuple(Layer(f"layer{i}", size, size, 8, 1.0) for i in range(layers))
    spec = Spec(ADAPTERS[kind](), every, 0, {})
    start = {}
    for one in every if spec.adapter.started else ():
        start |= {
            f"{one.name}.{f}": torch.randn(shape, generator=generator) / size**0.5
            for f, shape in spec.adapter.shapes(one).items()
            if f in spec.adapter.started
        }
    state = method.init(spec, {}, start)
    return method, state, moved_updates(method, state, clients, generator)
