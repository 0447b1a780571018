"""Metrics of the state that the server holds, on held-out examples: at the coordinator's side, and on clients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedray.data.tasks import grouped
from fedray.federation.record import Evaluation

if TYPE_CHECKING:
    from fedray.federation.coordinator import Coordinator


def evaluate(server: Coordinator) -> Evaluation:
    """Of the global model, or of each client's own where clients keep factors of their own."""
    if server.method.keeps(server.spec):
        return _personal(server)
    statistics, lost = server.pool.evaluate(server.handle, "test", None)
    clients = None
    if server.config.data.client_held_out > 0:
        held = {client: server.pool.evaluate(server.handle, "held-out", client)[0] for client in server.data.clients}
        clients = {client: server.task.metrics(s) for client, s in held.items()}
    return Evaluation(server.task.metrics(statistics), lost, grouped(server.task, statistics), clients)


def _personal(server: Coordinator) -> Evaluation:
    """Each client's own model on its own held-out examples, or where clients hold none back on the common ones;
    `metrics` is the plain mean over the clients."""
    part = "held-out" if server.config.data.client_held_out > 0 else "test"
    metrics, lost = {}, 0.0
    for client in server.data.clients:
        statistics, own_lost = server.pool.evaluate(server.handle, part, client, server.kept.get(client))
        metrics[client], lost = server.task.metrics(statistics), max(lost, own_lost)
    names = next(iter(metrics.values()))
    means = {name: math.fsum(m[name] for m in metrics.values()) / len(metrics) for name in names}
    return Evaluation(means, lost, client_metrics=metrics)
