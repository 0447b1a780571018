"""The inline engine's pool: the whole run in one process, without Ray. The readable twin of `pool_ray.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedray.errors import ConfigError
from fedray.federation.buffered import Arrivals
from fedray.federation.clocks import threads
from fedray.federation.messages import Orders, Outcome
from fedray.federation.questions import Question
from fedray.federation.wire import Message, Packet
from fedray.federation.worker import Work, Worker


class InlinePool:
    """One worker that serves the clients in turn. `progress` is called with each client that is done."""

    def __init__(self, worker: Worker, progress: Callable[[str], None] = lambda client: None):
        self.worker, self.progress = worker, progress

    def publish(self, message: Message) -> Message:
        return message

    def train(
        self,
        handle: Message,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        """A deadline means nothing to clients that run one after the other, and is not enforced here."""
        outcomes, fetch = [], handle.increments.__getitem__
        work = (Work(client, handle.packet_of(client), kept.get(client), orders[client]) for client in clients)
        done = self.worker.train_all(round, handle.header, fetch, work)
        for client, (update, keeps, report) in zip(clients, done, strict=True):
            outcomes.append(Outcome(client, report, update, keeps))
            self.progress(client)
        return outcomes

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        outcomes = []
        with threads(self.worker.threads):
            for client in clients:
                answer, _, report = self.worker.ask(client, question, kept.get(client))
                outcomes.append(Outcome(client, report, answer))
        return outcomes

    def stream(self) -> Arrivals:
        raise ConfigError("federation.buffer needs engine ray: inline nobody arrives while another trains")

    def fetch(self, update: Packet) -> Packet:
        return update

    def evaluate(
        self, handle: Message, part: str, client: str | None, kept: Packet | None = None
    ) -> tuple[list[dict], float]:
        batches, lost = self.worker.evaluate(
            part, client, (0, 1), handle.header, handle.packet, handle.increments.__getitem__, kept
        )
        return [s for batch in batches for s in batch], lost
