"""A coordinator that asks again: after each honest answer of a client the same question from other inputs, in every way
that might meet the same noise. A client that answers once more gives a second release that nobody charged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedray.federation.messages import Orders, Outcome
from fedray.federation.pool_inline import InlinePool
from fedray.federation.questions import Question, Sketch
from fedray.federation.wire import Header, Message, Packet
from fedray.federation.worker import Worker


def forged(packet: Packet, honest: Packet) -> Packet:
    """The packet, saying that its digest is the honest one's."""
    object.__getattribute__(packet, "__dict__")["digest"] = honest.digest
    return packet


def zeros(packet: Packet) -> Packet:
    """Another vector of the same names and shapes; not all zeros where the honest one is."""
    return Packet(packet.manifest, np.full_like(packet.vector, 0.0 if packet.vector.any() else 1.0))


def renamed(packet: Packet) -> Packet:
    """The same numbers under each other's names, as far as the shapes let them."""
    names, of_shape = [name for name, _ in packet.manifest], dict[tuple[int, ...], list[int]]()
    for i, (_, shape) in enumerate(packet.manifest):
        of_shape.setdefault(shape, []).append(i)
    for places in of_shape.values():
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            names[place] = packet.manifest[other][0]
    return Packet(tuple((n, shape) for n, (_, shape) in zip(names, packet.manifest, strict=True)), packet.vector)


class Attacks(InlinePool):
    """A pool that is honest to all, and after each answer of one client (with noise of its own) attacks it. `answered`:
    how many of the attacks brought something else than the honest answer."""

    def __init__(self, worker: Worker, client: str):
        super().__init__(worker)
        self.client, self.asked, self.answered = client, 0, 0

    def train(
        self,
        handle: Message,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        outcomes = super().train(handle, round, clients, kept, deadline, orders)
        side = self.worker.side
        honest = next((o.update for o in outcomes if o.client == self.client and not o.failed), None)
        if honest is not None and hasattr(side, "journal"):
            held = kept.get(self.client)
            for call in rounds(round, handle, self.client, held, orders[self.client]):
                self.worker.forget_increments()  # whatever it still holds is asked for again
                self._count(honest, self.worker.train(self.client, *call)[0])
        return outcomes

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        outcomes = super().ask(question, clients, kept, deadline)
        honest = next((o.update for o in outcomes if o.client == self.client and not o.failed), None)
        if honest is not None and isinstance(question, Sketch):
            for other in sketches(question):
                self._count(honest, self.worker.ask(self.client, other, None)[0])
        return outcomes

    def _count(self, honest: Packet, other: Packet | None) -> None:
        self.asked += 1
        self.answered += other is not None and not np.array_equal(honest.vector, other.vector)


Call = tuple[int, Header, Packet, Callable[[int], Packet], Packet | None, Orders]


def rounds(round: int, handle: Message, client: str, kept: Packet | None, orders: Orders) -> Iterator[Call]:
    """Other calls of the same round."""
    header, packet, fetch = handle.header, handle.packet_of(client), handle.increments.__getitem__
    if len(packet.vector):
        yield round, header, zeros(packet), fetch, kept, orders
        yield round, header, forged(zeros(packet), packet), fetch, kept, orders
    yield round, replace(header, draw=header.draw | {"a factor": 1}), packet, fetch, kept, orders
    yield round, header, packet, fetch, kept, replace(orders, expected=orders.expected * 2)
    yield round, header, packet, fetch, kept, replace(orders, run=f"{orders.run}-again", key="")
    if kept is not None:
        yield round, header, packet, fetch, zeros(kept), orders
        yield round, header, packet, fetch, forged(zeros(kept), kept), orders
        yield round, header, packet, fetch, None, orders
    if header.increments:
        yield round, replace(header, increments=()), packet, fetch, kept, orders
        yield round, header, packet, lambda v: forged(zeros(fetch(v)), fetch(v)), kept, orders


def sketches(question: Sketch) -> Iterator[Sketch]:
    """Other sketches in the same place."""
    yield replace(question, examples=question.examples + 1)
    if question.sides is not None:
        yield replace(question, sides=zeros(question.sides))
        yield replace(question, sides=forged(zeros(question.sides), question.sides))
        yield replace(question, sides=renamed(question.sides))
