"""The inline engine: the whole run in one process, without Ray. The readable twin of `pool_ray.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedray.federation.coordinator import Outcome
from fedray.federation.wire import Message, Packet
from fedray.federation.worker import Worker


class InlinePool:
    """One worker that serves the clients in turn. `progress` is called with each client that is done."""

    def __init__(self, worker: Worker, progress: Callable[[str], None] = lambda client: None):
        self.worker, self.progress = worker, progress

    def publish(self, message: Message) -> Message:
        return message

    def train(
        self, handle: Message, round: int, clients: Sequence[str], optimizer: dict[str, Packet], deadline: float | None
    ) -> list[Outcome]:
        """A deadline means nothing to clients that run one after the other, and is not enforced here."""
        outcomes = []
        for client in clients:
            update, kept, report = self.worker.train(
                client, round, handle.header, handle.packet, handle.increments.__getitem__, optimizer.get(client)
            )
            outcomes.append(Outcome(client, report, update, kept))
            self.progress(client)
        return outcomes

    def fetch(self, update: Packet) -> Packet:
        return update

    def evaluate(self, handle: Message, part: str, client: str | None) -> tuple[list[dict], float]:
        batches, lost = self.worker.evaluate(part, client, (0, 1), handle.header, handle.packet, handle.increments.__getitem__)
        return [s for batch in batches for s in batch], lost
