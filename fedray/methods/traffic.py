"""What a client sends and receives in each round of a run, by running the method's own code on tensors without numbers.

`init`, `broadcast`, `view`, `upload`, `ask`, `answer` and `advance` run as in a run, on the meta device, with every
client of one cohort reporting in every round; a client's local training returns what it was given. Two things make it
cheap, and neither changes a number. Layers of one shape and rank move the same, so one of them is simulated and
counted as often as it occurs. And once a state has the shapes of an earlier one the rounds between them repeat, so
they are not run again. A method whose base update grows until it is compressed repeats itself only after some
compressions; a round costs one pass over (distinct layers) x (clients of the cohort) and over the increments that are
live.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedray.adapters.base import Layer
from fedray.methods.base import Method
from fedray.methods.increments import is_base
from fedray.methods.shapes import ShapeSpec, trained, without_numbers
from fedray.methods.state import Broadcast, Increment, Spec, State, Tensors, Update, factor_of, layer_of


@dataclass(frozen=True)
class Moves:
    """Numbers (of 4 bytes on the wire) of one client in one round, heads not counted.

    `once`: those down beside the usual ones: bases, factors that rest from now on, and of base updates that are sent
    again as a whole all that is more than the last one was.
    """

    up: int
    down: int
    once: int = 0


def simulate(method: Method, spec: Spec, cohort: Sequence[str], client: str, rounds: int) -> list[Moves]:
    """What `client`, one of the `cohort`, moves in each of the first `rounds` rounds.

    FLoRIST's rank depends on numbers: what it sends down is an upper bound.
    """
    shapes, copies = distinct(spec)
    state, meter = method.init(shapes, start=shapes.started()), _Meter(shapes, client, copies)
    moves: list[Moves] = []
    met: dict[Hashable, int] = {}
    held = 0
    while len(moves) < rounds:
        # Where increments have become more, no earlier state had as many: the next that can repeat one is a
        # compressed one.
        if len(state.increments) <= held:
            alike = min(_alike_until(method, len(moves), rounds), rounds)
            mark = (alike, _mark(state), meter.mark(state))
            period = len(moves) - met.setdefault(mark, len(moves))
            times = (alike - len(moves)) // period if period else 0
            moves += times * moves[len(moves) - period :]
            state = state.replace(round=len(moves))
        held = len(state.increments)
        if len(moves) < rounds:
            state, moved = _round(method, state, cohort, meter)
            moves.append(moved)
    return moves


def _alike_until(method: Method, round: int, rounds: int) -> int:
    """The first round after this one whose number can make it another one."""
    return next((turn for turn in (method.turns_after - 1, method.turns_after) if round < turn), rounds)


def distinct(spec: Spec) -> tuple[ShapeSpec, dict[str, int]]:
    """The spec with one layer for all of its shape and rank, and how many each of them stands for."""
    first: dict[tuple[int, int, int], Layer] = {}
    for layer in spec.layers:
        first.setdefault((layer.m, layer.n, layer.rank), layer)
    copies = Counter(first[layer.m, layer.n, layer.rank].name for layer in spec.layers)
    return ShapeSpec(spec.adapter, tuple(first.values()), spec.seed, spec.ranks), dict(copies)


class _Meter:
    """Counts what one client moves, and what it has received already."""

    def __init__(self, spec: Spec, client: str, copies: Mapping[str, int]):
        self._spec, self._client, self._copies = spec, client, copies
        self._seen = 0
        self._base_update = 0

    def mark(self, state: State) -> Hashable:
        """What the next rounds' counts depend on besides the state's own shapes."""
        return self._base_update, tuple(i.version > self._seen for i in state.increments)

    def numbers(self, tensors: Tensors) -> int:
        """Of all the layers that the simulated ones stand for."""
        return sum(self._copies[layer_of(name)] * tensor.numel() for name, tensor in tensors.items())

    def moves(
        self, message: Broadcast, rests: Sequence[str], sent: Mapping[int | None, Tensors], question: Tensors
    ) -> Moves:
        """Of one round. `rests`: the factors whose value the server does not change, in this round or the next;
        `sent`: what is uploaded, by rank."""
        up = self.numbers(sent[self._spec.ranks.get(self._client)])
        down, once = self.numbers(self._spec.cut(self._client, message.tensors)) + self.numbers(question), 0
        for increment in message.increments:
            if increment.version > self._seen:
                usual, beside = self._received(increment, rests)
                down, once = down + usual, once + beside
        self._seen = max([self._seen, *(i.version for i in message.increments)])
        return Moves(up, down, once)

    def _received(self, increment: Increment, rests: Sequence[str]) -> tuple[int, int]:
        """(usual numbers, those beside) of an increment."""
        whole = self.numbers(increment.tensors)
        base = self.numbers({n: t for n, t in increment.tensors.items() if is_base(n)})
        if not increment.resets or not self._base_update:
            resting = {n: t for n, t in increment.tensors.items() if not is_base(n) and factor_of(n) in rests}
            self._base_update = base or self._base_update
            return whole - self.numbers(resting), self.numbers(resting)
        usual = min(self._base_update, whole)
        return usual, whole - usual


def _round(method: Method, state: State, cohort: Sequence[str], meter: _Meter) -> tuple[State, Moves]:
    """One round: the next state, and what the metered client moved."""
    spec, message = state.spec, method.broadcast(state)
    # Clients of one rank send the same shapes: one of them trains for all.
    of_rank = {spec.ranks.get(client): client for client in cohort}
    results = {rank: trained(method.view(spec, message, client), state.heads) for rank, client in of_rank.items()}
    sent = {rank: method.upload(spec, of_rank[rank], tensors, state.round) for rank, tensors in results.items()}
    question: dict[str, Tensor] = {}
    if method.asks:
        question = method.ask(state, _updates(spec, cohort, sent))
        sent = {rank: sent[rank] | method.answer(spec, question, tensors) for rank, tensors in results.items()}
        state = state.replace(memory=state.memory | question)
    after = method.advance(state, _updates(spec, cohort, sent))
    rests = [f for f in spec.names if method.fresh or f not in (*message.trained, *after.trained)]
    return after, meter.moves(message, rests, sent, question)


def _updates(spec: Spec, cohort: Sequence[str], sent: Mapping[int | None, Tensors]) -> list[Update]:
    """An update of each client, of weight 1: tensors of its own, because what two clients share is one tensor to a
    method."""
    copies = [without_numbers(sent[spec.ranks.get(client)]) for client in cohort]
    return [Update(client, 1.0, tensors) for client, tensors in zip(cohort, copies, strict=True)]


def _mark(state: State) -> Hashable:
    """All that the shapes of the rounds from here on follow from, once the number of the round is no part of it."""
    increments = tuple((i.resets, _shapes(i.tensors)) for i in state.increments)
    plain = json.dumps(state.plain, sort_keys=True)
    return _shapes(state.tensors), increments, state.trained, tuple(state.draw), plain, _shapes(state.memory)


def _shapes(tensors: Tensors) -> Hashable:
    return tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
