"""The Ray engine's pool: how the coordinator reaches its workers. Broadcasts and updates travel by reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from fedray.errors import LostError, RoundError
from fedray.federation.dispatch import Dispatch, Part, Workers, one_line, results_of
from fedray.federation.failures import WORKER_ATTEMPTS
from fedray.federation.listening import unheard
from fedray.federation.messages import Orders, Outcome
from fedray.federation.placement import Seat
from fedray.federation.questions import Question
from fedray.federation.queues import Speeds
from fedray.federation.stream import Stream
from fedray.federation.wire import Header, Message, Packet

#: Bytes of fetched updates that are held at once, beside the one that was fetched last.
AT_HAND = 64 * 2**20


@dataclass
class Published:
    """A broadcast in the object store: one put for the packet of each rank, one for each increment in its life."""

    header: Header
    packet: Any
    increments: dict[int, Any]
    cut: dict[int, Any]
    ranks: dict[str, int]

    def packet_of(self, client: str) -> Any:
        """What a client receives every round."""
        return self.cut[self.ranks[client]] if client in self.ranks else self.packet


class RayPool:
    """The pool as the coordinator sees it; see `Workers` for `order` and `homes`, `Dispatch` for
    `together`."""

    def __init__(
        self,
        workers: Sequence[Any],
        order: Sequence[str],
        progress: Callable[[str], None] = unheard,
        homes: Sequence[Seat] = (),
        together: int = 1,
    ):
        self.workers, self.progress, self._together = Workers(workers, order, homes), progress, together
        self._increments: dict[int, Any] = {}
        self._speeds: dict[str, Speeds] = {}
        self._at_hand: dict[Any, Any] = {}
        self._bytes_at_hand = 0

    def publish(self, message: Message) -> Published:
        self._at_hand.clear()
        self._bytes_at_hand = 0
        self._increments = {
            v: self._increments[v] if v in self._increments else ray.put(p) for v, p in message.increments.items()
        }
        cut = {rank: ray.put(packet) for rank, packet in message.cut.items()}
        return Published(message.header, ray.put(message.packet), self._increments, cut, message.ranks)

    def train(
        self,
        handle: Published,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        def call(worker: Any, clients: Sequence[str]) -> Sequence[Any]:
            work = [(c, handle.packet_of(c), kept.get(c), orders[c]) for c in clients]
            remote = worker.train.options(num_returns=len(clients) + 2).remote
            return remote(work, round, handle.header, handle.increments)

        speeds = self._speeds.setdefault("training", Speeds())
        return Dispatch(self.workers, clients, call, deadline, self.progress, speeds, self._together).run()

    def stream(self) -> Stream:
        def train(worker: Any, handle: Published, version: int, client: str, orders: Orders) -> Sequence[Any]:
            work = [(client, handle.packet_of(client), None, orders)]
            references: Sequence[Any] = worker.train.options(num_returns=3).remote(
                work, version, handle.header, handle.increments
            )
            return references

        return Stream(self.workers, train, self.progress)

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        shared = ray.put(question) if question.common else None

        def call(worker: Any, clients: Sequence[str]) -> Sequence[Any]:
            work = [(c, question.of(c) if shared is None else shared, kept.get(c)) for c in clients]
            return worker.ask.options(num_returns=len(clients) + 2).remote(work)

        speeds = self._speeds.setdefault(question.name, Speeds())
        return Dispatch(self.workers, clients, call, deadline, unheard, speeds).run()

    def fetch(self, update: Any) -> Packet:
        reference = update.task if isinstance(update, Part) else update
        if not isinstance(reference, ray.ObjectRef):
            return update
        try:
            found = self._fetched(reference)
        except RayError as error:  # its node went away after the client had reported
            raise LostError(f"what it sent was lost: {one_line(error)}") from error
        return results_of(update.of, found)[update.index] if isinstance(update, Part) else found

    def _fetched(self, reference: Any) -> Any:
        """What it refers to. Clients of one task are asked for apart from each other: the last tasks' updates stay at
        hand, as far as they are small."""
        if reference not in self._at_hand:
            self._at_hand[reference] = ray.get(reference)
            self._bytes_at_hand += _bytes_of(self._at_hand[reference])
            while len(self._at_hand) > 1 and self._bytes_at_hand > AT_HAND:
                self._bytes_at_hand -= _bytes_of(self._at_hand.pop(next(iter(self._at_hand))))
        return self._at_hand[reference]

    def evaluate(self, handle: Published, part: str, client: str | None, kept: Any = None) -> tuple[list[dict], float]:
        """Shared by all workers; a pure function, so it is simply asked again when a worker dies over it."""
        for _ in range(WORKER_ATTEMPTS):
            for reference in list(self.workers.restarting):
                self.workers.restarted(reference)
            usable = self.workers.unhurried([i for i in self.workers.ready() if self.workers.may(i, client)])
            results = self._shares(usable, handle, part, client, kept)
            if usable and len(results) == len(usable):
                return in_order([batches for batches, _ in results]), max(lost for _, lost in results)
        raise RoundError(f"the evaluation failed: workers died over it {WORKER_ATTEMPTS} times")

    def _shares(
        self, usable: Sequence[int], handle: Published, part: str, client: str | None, kept: Any
    ) -> list[tuple[list[list[dict]], float]]:
        """What each of these workers found in its share of the batches; fewer where workers died over it."""
        references = {
            i: self.workers.actors[i].evaluate.remote(
                part, client, (turn, len(usable)), handle.header, handle.packet, handle.increments, kept
            )
            for turn, i in enumerate(usable)
        }
        results = []
        for i, reference in references.items():
            try:
                results.append(ray.get(reference))
            except RayActorError:
                self.workers.await_restart(i)
        return results


def _bytes_of(fetched: Any) -> int:
    """Of updates that are packets; whatever else it is, is judged by others."""
    return sum(p.nbytes for p in fetched if isinstance(p, Packet)) if isinstance(fetched, list) else 0


def in_order(shares: Sequence[list[list[dict]]]) -> list[dict]:
    """Put batches that were dealt to several workers in turn back into their order."""
    queues = [iter(batches) for batches in shares]
    merged: list[dict] = []
    for turn in range(sum(len(batches) for batches in shares)):
        merged += next(queues[turn % len(queues)])
    return merged
