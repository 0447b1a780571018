"""A coordinator that does not follow the protocol. After each honest answer of a client it asks the same question from
other inputs, in every way that might meet the same noise or open the same sum: a client that answers once more gives a
second release that nobody charged. Before the last round it asks what no client may answer at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from fedray.data.encoded import Encoded
from fedray.federation.channels.masked import SumQuestion
from fedray.federation.messages import NO_ORDERS, Answered, Orders, Outcome, SumStep
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


def structured(packet: Packet, offset: int = 4) -> Packet:
    """Of eight bytes a number, those at the offset: two packets that differ in it alone have one buffer, and one name
    of their type."""
    pairs = np.stack([packet.vector, np.zeros_like(packet.vector)], 1).reshape(-1)
    kind = np.dtype({"names": ["x"], "formats": ["<f4"], "offsets": [offset], "itemsize": 8})
    return Packet(packet.manifest, pairs.view(kind))


def as_integers(packet: Packet) -> Packet:
    """The same bytes, read as other numbers."""
    return Packet(packet.manifest, packet.vector.view(np.int32))


class Attacks(InlinePool):
    """A pool that is honest to all, and attacks one client (with noise of its own). `answered`: how many of the attacks
    brought something else than an honest answer."""

    def __init__(self, worker: Worker, client: str):
        super().__init__(worker)
        self.client, self.asked, self.answered = client, 0, 0
        self._last = worker.trainer.config.federation.rounds - 1

    def train(
        self,
        handle: Message,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        attacked = self.client in orders and hasattr(self.worker.side, "journal")
        call = (round, handle, self.client, kept.get(self.client), orders.get(self.client, NO_ORDERS))
        if attacked and round == self._last:
            self._attack_first(call)
        outcomes = super().train(handle, round, clients, kept, deadline, orders)
        honest = next((o.update for o in outcomes if o.client == self.client and not o.failed), None)
        if attacked and honest is not None:
            self._attack(honest, rounds(*call))
            with self._one_example_fewer():  # the same noise over other data would show their difference
                self._attack(honest, iter([again(*call)]))
        return outcomes

    def _attack_first(self, call: tuple[int, Message, str, Packet | None, Orders]) -> None:
        """What no client answers at all, nor refuses otherwise where its data are others."""
        round, handle, client, kept, orders = call
        ordered = (round, handle, client, kept, replace(orders, key=""))
        causes = self._attack(None, false(*ordered))
        with self._one_example_fewer():
            others = self._attack(None, false(*ordered))
        self.answered += sum(cause != other for cause, other in zip(causes, others, strict=True))

    @contextmanager
    def _one_example_fewer(self) -> Iterator[None]:
        """For a while the client has all of its examples but one."""
        trainer, side, place = self.worker.trainer, self.worker.side, ("train", self.client)
        every = trainer.examples(*place)
        fingerprints: dict[str, bytes] = getattr(side, "_fingerprints", {})
        trainer._encoded[place] = Encoded.of(every[1:])
        fingerprints.pop(self.client, None)
        try:
            yield
        finally:
            trainer._encoded[place] = every
            fingerprints.pop(self.client, None)

    def _attack(self, honest: Packet | None, calls: Iterator[Call]) -> list[str]:
        """What the client says to each."""
        causes = []
        for call in calls:
            self.worker.forget_increments()  # whatever it still holds is asked for again
            update, _, report = self.worker.train(self.client, *call)
            self._count(honest, update)
            causes.append(getattr(report, "cause", ""))
        return causes

    def ask(
        self, question: Question, clients: Sequence[str], kept: Mapping[str, Any], deadline: float | None
    ) -> list[Outcome]:
        outcomes = super().ask(question, clients, kept, deadline)
        honest = next((o.update for o in outcomes if o.client == self.client and not o.failed), None)
        if honest is not None and isinstance(question, Sketch):
            for other in sketches(question):
                self._count(honest, self.worker.ask(self.client, other, None)[0])
        told = next((o.report for o in outcomes if o.client == self.client and not o.failed), None)
        if isinstance(told, Answered) and isinstance(question, SumQuestion):
            for step in steps(question.steps[self.client]):
                report = self.worker.ask(self.client, replace(question, steps={self.client: step}), None)[2]
                self.asked += 1
                self.answered += isinstance(report, Answered) and report.value != told.value
        return outcomes

    def _count(self, honest: Packet | None, other: Packet | None) -> None:
        self.asked += 1
        self.answered += other is not None and (honest is None or not np.array_equal(honest.vector, other.vector))


Call = tuple[int, Header, Packet, Callable[[int], Packet], Packet | None, Orders]


def again(round: int, handle: Message, client: str, kept: Packet | None, orders: Orders) -> Call:
    """The same call once more."""
    return round, handle.header, handle.packet_of(client), handle.increments.__getitem__, kept, orders


def false(round: int, handle: Message, client: str, kept: Packet | None, orders: Orders) -> Iterator[Call]:
    """Calls for a round that no client answers, whatever it was asked before."""
    header, packet, fetch = handle.header, handle.packet_of(client), handle.increments.__getitem__
    for odd in (structured(packet), as_integers(packet)):
        yield round, header, odd, fetch, kept, orders
    yield round + 1, header, packet, fetch, kept, orders
    less = [replace(orders, noise=orders.noise * 0.9), replace(orders, clip=orders.clip * 1.1)]
    for ordered in less:
        yield round, header, packet, fetch, kept, ordered


def rounds(round: int, handle: Message, client: str, kept: Packet | None, orders: Orders) -> Iterator[Call]:
    """Other calls of the same round."""
    header, packet, fetch = handle.header, handle.packet_of(client), handle.increments.__getitem__
    if len(packet.vector):
        yield round, header, zeros(packet), fetch, kept, orders
        yield round, header, forged(zeros(packet), packet), fetch, kept, orders
    yield round, replace(header, draw=header.draw | {"a factor": 1}), packet, fetch, kept, orders
    yield round, header, packet, fetch, kept, replace(orders, expected=orders.expected * 2)
    yield round, header, packet, fetch, kept, replace(orders, run=f"{orders.run}-again", key="")
    if orders.sum is not None:
        elsewhere = replace(orders.sum, run=f"{orders.run}-again")
        yield round, header, packet, fetch, kept, replace(orders, run=elsewhere.run, key="", sum=elsewhere)
    if kept is not None:
        yield round, header, packet, fetch, zeros(kept), orders
        yield round, header, packet, fetch, forged(zeros(kept), kept), orders
        yield round, header, packet, fetch, None, orders
    if header.increments:
        yield round, replace(header, increments=()), packet, fetch, kept, orders
        yield round, header, packet, lambda v: forged(zeros(fetch(v)), fetch(v)), kept, orders


def steps(step: SumStep) -> Iterator[SumStep]:
    """The same step of a secure sum, told otherwise: of one neighbour fewer, of other senders, of other shares."""
    if step.adverts:
        yield replace(step, adverts=_fewer(step.adverts))
    if step.roster:
        yield replace(step, roster=_fewer(step.roster))
    if step.signatures:
        yield replace(step, signatures=_fewer(step.signatures))
    if step.sealed:
        yield replace(step, sealed=_fewer(step.sealed))
    if step.listed:
        yield replace(step, listed=bytes([step.listed[0] & (step.listed[0] - 1)]) + step.listed[1:])
    if step.session is not None:
        yield replace(step, session=replace(step.session, what=f"{step.session.what}, again"))
    yield replace(step, run=f"{step.run}-again")


def _fewer(told: Mapping[str, Any]) -> dict[str, Any]:
    """All but the last."""
    return {client: told[client] for client in sorted(told)[:-1]}


def sketches(question: Sketch) -> Iterator[Sketch]:
    """Other sketches in the same place."""
    yield replace(question, examples=question.examples + 1)
    if question.sides is not None:
        yield replace(question, sides=zeros(question.sides))
        yield replace(question, sides=forged(zeros(question.sides), question.sides))
        yield replace(question, sides=renamed(question.sides))
