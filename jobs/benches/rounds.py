"""A round's updates without training, for the benchmarks of aggregation."""

from __future__ import annotations

import torch

from fedray.methods import Method, State, Update


def moved_updates(method: Method, state: State, clients: int, generator: torch.Generator) -> list[Update]:
    """Small moves from what is broadcast, of clients of different weights."""
    view = method.view(state.spec, method.broadcast(state), None)
    start = {n: t for n, t in view.tensors.items() if n.rsplit(".", 1)[1] in view.trained}
    return [
        Update(
            f"client-{i}",
            1.0 + i,
            {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in start.items()},
        )
        for i in range(clients)
    ]
