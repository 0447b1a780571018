"""Channels and sides with canaries in them: the same as those of a run, but for what the canaries add to the sums and
what is seen of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedray.audit.bounds import hostile
from fedray.audit.canaries import Canaries
from fedray.federation.channels.base import Context, Intake, Tensors, Training
from fedray.federation.channels.client import ClientLevel, ClippingSide
from fedray.federation.channels.distributed import DistributedSide
from fedray.federation.channels.example import ExampleSide
from fedray.federation.channels.registry import make_channel, make_side
from fedray.federation.messages import Orders, Outcome
from fedray.federation.wire import unpack
from fedray.methods import Method, Spec, View
from fedray.privacy import client_level
from fedray.privacy.ledger import EVERYONE
from fedray.privacy.private import Private, Watch
from fedray.privacy.secure_sum import STEP

#: Makes the server's half of a run, and the client's.
ChannelMaker = Callable[[Context], Any]
SideMaker = Callable[[Any, Method, Spec], Any]


def _watched(made: Any, kind: type, watcher: type, **held: Any) -> Any:
    """What a run has made, which must be of a kind, as an audit's own kind of it that holds these."""
    assert isinstance(made, kind)
    made.__class__ = type(f"Audited{type(made).__name__}", (watcher, type(made)), held)
    return made


def _watch(
    canaries: Canaries,
    add: Callable[[Tensors], None],
    orders: Orders,
    deviation: float,
    seen: Callable[[Tensors], None] = lambda answer: None,
) -> Watch:
    """Adds canaries to a sum, and measures its noise. `seen`: is shown the answer too."""
    sums: list[Tensors] = []

    def before(total: Tensors) -> None:
        add(total)
        sums.append(total)

    def after(answer: Tensors) -> None:
        canaries.noise.see(sums.pop(), answer, orders.expected, deviation)
        seen(answer)

    return Watch(before, after, partial(canaries.noise.see_sample, rate=orders.rate))


def examples(client: str, steps: Canaries, sketches: Canaries | None) -> SideMaker:
    """The side of clients, one of which has canaries among its examples. `sketches`: those of a private subspace."""
    held = (client, steps, sketches)
    return lambda *about: _watched(make_side(*about), ExampleSide, _AuditedExamples, held=held)


class _AuditedExamples(ExampleSide):
    held: tuple[str, Canaries, Canaries | None]

    def protect(self, client: str, round: int, inputs: Callable[[], str], orders: Orders) -> Private:
        private, (watched, steps, _) = super().protect(client, round, inputs, orders), self.held
        if client != watched:
            return private

        def add(gradients: Tensors) -> None:
            steps.scatter({n: tuple(t.shape) for n, t in gradients.items()})
            steps.add(gradients, orders.clip, steps.sampled(orders.rate))

        return replace(private, watch=_watch(steps, add, orders, orders.noise * orders.clip))

    def send(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Any:
        watched, steps, _ = self.held
        if client == watched:  # a step goes against the gradient
            steps.see({n: t - view.tensors[n] for n, t in trained.items()}, sign=-1.0)
        return super().send(client, round, view, trained, orders)

    def sketched(self, question: Any, client: str) -> Any:
        picked, sides, noise = super().sketched(question, client)
        watched, _, sketches = self.held
        if client != watched or noise is None or sketches is None:
            return picked, sides, noise

        orders = question.orders[client]

        def add(total: Tensors) -> None:
            sketches.spread({n: tuple(t.shape) for n, t in total.items()})
            sketches.add(total, len(total) ** -0.5, sketches.sampled(orders.rate))

        watch = _watch(sketches, add, orders, orders.noise, sketches.see)
        watch.sampled(len(picked), len(self.trainer.examples("train", client)))
        return picked, sides, replace(noise, watch=watch)


@dataclass
class Cohorts:
    """What an audit notes of client-level rounds: who was drawn, and the furthest that a client that keeps to nothing
    moved a sum, or a client's update with its rounding went, in clips (of its bit about the clip, in halves).
    `sent`: by client, its newest update in a sum of shares, before its noise."""

    drawn: list[list[str]] = field(default_factory=list)
    sent: dict[str, Tensors] = field(default_factory=dict)
    moved: float = 0.0

    def see(self, update: Tensors, orders: Orders, summed: bool) -> None:
        """Take note of a client's update as it goes into the sum; `summed`: in fixed point, whose rounding is
        worked out here once more, since the client's own is what is audited."""
        numbers = {n: t for n, t in update.items() if n != client_level.WITHIN}
        rounding = STEP / 2 * sum(t.numel() for t in numbers.values()) ** 0.5 if summed else 0.0
        self.moved = max(self.moved, (client_level.norm(numbers) + rounding) / orders.clip)


def clips(cohorts: Cohorts) -> SideMaker:
    """The side of clients that clip their updates, each of which is measured."""
    return lambda *about: _watched(make_side(*about), ClippingSide, _AuditedClips, cohorts=cohorts)


class _AuditedClips(ClippingSide):
    cohorts: Cohorts

    def changed(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Tensors:
        update = super().changed(client, round, view, trained, orders)
        self.cohorts.see(update, orders, self.config.privacy.secure_aggregation)
        return update


def clients(canaries: Canaries, cohorts: Cohorts) -> ChannelMaker:
    """The server's half of client-level privacy, with clients in the sums that are canaries."""
    return lambda context: _watched(make_channel(context), ClientLevel, _Audited, canaries=canaries, cohorts=cohorts)


class _Seen(ClientLevel):
    """What is opened, less what clients would have sent had they not trained, is what an attacker sees."""

    canaries: Canaries

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        intake = super().collect(call, outcomes)
        (update,) = intake.updates
        mean = {n: t.double() - call.expected.unmoved[n].double() for n, t in update.tensors.items()}
        self.canaries.see(mean)
        self.canaries.noise.see(self._before(outcomes), mean, *self._divisor_and_deviation(outcomes))
        return replace(intake, updates=[update])

    def _before(self, outcomes: Sequence[Outcome]) -> Tensors:
        """The sum before its noise."""
        raise NotImplementedError

    def _divisor_and_deviation(self, outcomes: Sequence[Outcome]) -> tuple[float, float]:
        """What the mean is the sum over, and the standard deviation of the noise that is charged."""
        raise NotImplementedError


class _Audited(_Seen):
    """The same with canaries in the sum before its noise, and a client beside it that keeps to nothing."""

    cohorts: Cohorts

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        self.cohorts.drawn.append([outcome.client for outcome in outcomes])
        rate = self.ledger.plans[EVERYONE].rate
        self.canaries.noise.see_sample(len(call.admission.cohort), len(self.context.clients), rate)
        return super().collect(call, outcomes)

    def _total(
        self, reference: Mapping[str, Tensor], updates: Sequence[dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], float]:
        total, within = super()._total(reference, updates)
        stranger = hostile(reference, self.config.privacy.adaptive_clip is not None)
        if self.look(stranger) is None:  # it was not left out
            more, bit = super()._total(reference, [unpack(stranger)])
            moves = (client_level.norm(more) / self._clip, abs(bit) / client_level.HALF)
            self.cohorts.moved = max(self.cohorts.moved, *moves)
        self.canaries.scatter({n: tuple(t.shape) for n, t in total.items()})
        self.canaries.add(total, self._clip, self.canaries.sampled(self.ledger.plans[EVERYONE].rate))
        self.total = total
        return total, within

    def _before(self, outcomes: Sequence[Outcome]) -> Tensors:
        return self.total

    def _divisor_and_deviation(self, outcomes: Sequence[Outcome]) -> tuple[float, float]:
        plan, adaptive = self.ledger.plans[EVERYONE], self.config.privacy.adaptive_clip is not None
        assert self._clip_used is not None, "a round was noised"
        return plan.expected, client_level.update_noise(plan.noise, plan.expected, adaptive) * self._clip_used


def shares(client: str, canaries: Canaries, cohorts: Cohorts) -> SideMaker:
    """The side of clients that trust nobody; one brings the canaries' updates into the sum with its own."""
    held = {"bearer": client, "canaries": canaries, "cohorts": cohorts}
    return lambda *about: _watched(make_side(*about), DistributedSide, _AuditedShares, **held)


class _AuditedShares(_AuditedClips):
    bearer: str
    canaries: Canaries

    def changed(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Tensors:
        update = super().changed(client, round, view, trained, orders)
        if client == self.bearer:
            self.canaries.scatter({n: tuple(t.shape) for n, t in update.items()})
            self.canaries.add(update, orders.clip, self.canaries.sampled(1.0))
        self.cohorts.sent[client] = update
        return update


def noised_mean_seen(canaries: Canaries, cohorts: Cohorts) -> ChannelMaker:
    """The server's half where clients add the noise: what it opens is what an attacker sees."""
    held = {"canaries": canaries, "cohorts": cohorts}
    return lambda context: _watched(make_channel(context), ClientLevel, _SeenOfShares, **held)


class _SeenOfShares(_Seen):
    cohorts: Cohorts

    def _before(self, outcomes: Sequence[Outcome]) -> Tensors:
        sent = [self.cohorts.sent[outcome.client] for outcome in outcomes]
        return {name: torch.stack([update[name].double() for update in sent]).sum(0) for name in sent[0]}

    def _divisor_and_deviation(self, outcomes: Sequence[Outcome]) -> tuple[float, float]:
        """Each adds an equal share of the variance."""
        plan, sent = self.ledger.plans[EVERYONE], len(outcomes)
        return float(sent), plan.noise * plan.clip * (sent / len(self.context.clients)) ** 0.5
