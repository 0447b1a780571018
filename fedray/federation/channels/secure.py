"""Secure aggregation: the coordinator sees only the sum of what a cohort sends (Bonawitz et al., CCS 2017).

Keys and shares travel before the clients work, shares after, and only the sum is opened in between. A client that drops
out before it has shared is simply not in the sum; one that shared and sent nothing costs the others one share each; one
that sent is in the sum even if it is gone at the end.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedray.errors import ConfigError, PrivacyError, RoundError
from fedray.federation.channels.base import Answer, Carriage, Channel, Context, Intake, Limit, Released, Tensors
from fedray.federation.channels.plain import AsIs, Packed, start_error
from fedray.federation.messages import NO_ORDERS, PUBLIC, Answered, Failure, Orders, Outcome, SumStep, failures
from fedray.federation.questions import Question, Sketch, ValueQuestion, forget_keys
from fedray.federation.screening import flaw_of_form
from fedray.federation.wire import Packet
from fedray.methods import Method, Update, linear_methods
from fedray.methods.shapes import Shapes
from fedray.privacy import client_level, secure_sum
from fedray.privacy.keys import KeyStore
from fedray.privacy.ledger import write_durably
from fedray.privacy.secure_sum import ADVERT_BYTES, LEAST_MEMBERS, SHARE_BYTES, STEP, Session

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.channels.base import ClientSide


# --- the config's check ------------------------------------------------------------------------------------------


def check(config: Config, method: Method) -> None:
    """Raises ValueError for a method that needs each update, and for what would show them beside the sum."""
    if not method.linear:
        raise ValueError(
            f"privacy.secure_aggregation opens only the sum of the updates, and {method.name} needs each one: use "
            f"{linear_methods()}"
        )
    protected = config.privacy.on and config.privacy.unit == "example"
    kept = _kept(config, method)
    if kept and not protected:
        raise ValueError(
            f"privacy.secure_aggregation hides single updates, and with {kept} the coordinator's checkpoint would hold "
            "what each client keeps, from which its update can be read: leave it out, or add privacy.epsilon with "
            "privacy.unit example"
        )


def _kept(config: Config, method: Method) -> str | None:
    """What makes clients leave something of their own with the coordinator."""
    if config.federation.keep_optimizer:
        return "federation.keep_optimizer"
    return f"method {method.name}" if method.kept else None


def check_cohort(least: int) -> None:
    """Raises ConfigError for rounds of so few clients that a sum would show each of them."""
    if least < LEAST_MEMBERS:
        raise ConfigError(
            f"privacy.secure_aggregation with {least} clients a round would show each of them: have {LEAST_MEMBERS} or "
            "more"
        )


# --- its lines of privacy.json -----------------------------------------------------------------------------------

#: What it does to vectors, and what the coordinator sees of updates; beside the same of `plain.AsIs`.
HOW, SEES = ", in a secure sum that hides all but the clients' total", "sees only the sum of the clipped updates"


def released() -> list[Released]:
    """What crosses a client's border for the sum's sake."""
    return [
        Released(
            "public keys, encrypted shares, and shares that open the sum",
            "each round it is drawn in",
            "hide all but the sum from fewer clients than the threshold",
            "privacy/secure_sum.py",
        )
    ]


def limits(config: Config) -> list[Limit]:
    """What this guarantee does not cover."""
    lines = [
        Limit(
            "medium",
            "A coordinator that lies about who dropped out or who takes part: it is assumed to follow the protocol "
            "(no signatures)",
            "privacy/secure_sum.py",
        ),
        Limit(
            "medium",
            "As many clients as the threshold together with the coordinator can open one client's update",
            "privacy/secure_sum.py, reveal",
        ),
    ]
    if (config.privacy.secure_threshold or 1.0) <= 0.5:
        lines.append(
            Limit(
                "high",
                "privacy.secure_threshold of a half or less: a lying coordinator could have two groups open "
                "different sums of one session, and read a client from their difference",
                "privacy/secure_sum.py, threshold_of",
            )
        )
    lines.append(
        Limit(
            "medium",
            "All clients of an opened sum but one, together, can take their own parts away and read that one's (of "
            "three clients one may drop out: then each of the two reads the other's)",
            "privacy/secure_sum.py, default_threshold",
        )
    )
    return lines


def carriage(members: int) -> Carriage:
    """Of a sum over so many clients: numbers of the ring are 64 bits wide."""
    return Carriage(width=8, beside=secure_sum.overhead(members))


# --- its questions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumQuestion(ValueQuestion):
    """A step of a secure sum, in which clients learn what `step` says."""

    step: SumStep


@dataclass(frozen=True)
class Advertise(SumQuestion):
    """The client's public keys of the session."""

    name: ClassVar[str] = "ADVERTISE"
    what: ClassVar[str] = "its public keys of a secure sum"

    def value(self, side: ClientSide, client: str) -> Any:
        return secure_sum.advertise(side.keys.key(self.step.run, client), self.step.session)


@dataclass(frozen=True)
class Share(SumQuestion):
    """For each other client, encrypted, shares of the client's two secrets."""

    name: ClassVar[str] = "SHARE"
    what: ClassVar[str] = "encrypted shares of its secrets of a secure sum"

    def value(self, side: ClientSide, client: str) -> Any:
        key = side.keys.key(self.step.run, client)
        return secure_sum.share(key, client, self.step.session, self.step.adverts)


@dataclass(frozen=True)
class Reveal(SumQuestion):
    """One share for each client: of what must be taken out of the sum."""

    name: ClassVar[str] = "REVEAL"
    what: ClassVar[str] = "its shares of what must be taken out of a secure sum"

    def value(self, side: ClientSide, client: str) -> Any:
        key, step = side.keys.key(self.step.run, client), self.step
        return secure_sum.reveal(key, client, step.session, step.adverts, step.sealed[client], step.sent)


# --- the server's half -------------------------------------------------------------------------------------------


@dataclass
class Agreement:
    """A sum whose clients have shared their secrets: what they are told (`step`), what they dealt, and the bytes so
    far."""

    step: SumStep
    advertised: tuple[str, ...]
    sealed: dict[str, dict[str, bytes]]
    up: int
    down: int


class SecureSums(AsIs):
    """The carrier of sums. `run`: under which clients file their keys. Beside the checkpoints it is kept whose parts a
    sum was opened of."""

    def __init__(self, context: Context, run: str):
        super().__init__(context)
        self.run, self._book = run, context.folder / "secure-sums.json"

    def agree(self, cohort: Sequence[str]) -> tuple[Agreement, list[Failure]]:
        """Advertise and share. Returns who could not, too. Raises RoundError when fewer are left than the threshold."""
        threshold = secure_sum.threshold_of(self.context.config.privacy.secure_threshold, len(cohort))
        session = Session(secrets.token_hex(16), tuple(cohort), threshold)
        adverts, failed = self._values(Advertise(SumStep(self.run, session)), cohort)
        dealt, late = self._values(Share(SumStep(self.run, session, adverts)), list(adverts))
        failed += late
        if len(dealt) < threshold:
            raise RoundError(
                f"{len(dealt)} of {len(cohort)} clients are there for a secure sum and {threshold} are needed: "
                f"{'; '.join(f.cause for f in failed)}"
            )
        sharing = {c: adverts[c] for c in adverts if c in dealt}
        up = ADVERT_BYTES * len(adverts) + sum(len(text) for texts in dealt.values() for text in texts.values())
        down = ADVERT_BYTES * len(adverts) * len(dealt)
        return Agreement(SumStep(self.run, session, sharing), tuple(adverts), dealt, up, down), failed

    def seal(
        self, agreed: Agreement, orders: Mapping[str, Orders], weight: Callable[[str], float | None]
    ) -> dict[str, Orders]:
        return {c: replace(o, run=self.run, sum=agreed.step, weight=weight(c)) for c, o in orders.items()}

    def collect(
        self, agreed: Agreement, round: int, outcomes: Sequence[Outcome], weight: Callable[[Outcome], float], mean: bool
    ) -> Intake:
        packets = {o.client: self.context.pool.fetch(o.update) for o in outcomes}
        whole = sum(weight(o) for o in outcomes)
        divisor = whole if mean else 1.0
        total = {n: t / divisor for n, t in self.total(agreed, packets, f"round {round + 1}").items()}
        sent = {n: t.float() for n, t in total.items()}
        # Half a step of the ring for each number of each client at most.
        rounding = len(packets) * STEP / 2 / divisor * sum(t.numel() for t in total.values()) ** 0.5
        lost = None
        if mean:  # relative to the mean itself; a sum before noise is nobody's to measure
            rounded = client_level.norm({n: t - sent[n] for n, t in total.items()})
            lost = (rounded + rounding) / (client_level.norm(total) or 1.0)
        up = sum(p.nbytes for p in packets.values()) + agreed.up
        return Intake([Update("(the sum)", whole, sent)], up, agreed.down, rounding, lost)

    def flaw(self, packet: Any, shapes: Shapes, look: Callable[[Packet], str | None]) -> str | None:
        """Of a masked vector only the form shows."""
        return flaw_of_form(packet, np.uint64, shapes)

    def ask(self, question: Question, clients: Sequence[str], channel: Channel) -> list[Answer]:
        """Of sketches of the clients' data one answer: their mean."""
        if not isinstance(question, Sketch) or PUBLIC in clients:
            return super().ask(question, clients, channel)
        agreed, failed = self.agree(clients)
        answered: list[Outcome] = []
        if not failed:
            orders = {c: question.orders.get(c, NO_ORDERS) for c in clients}
            sealed = self.seal(agreed, orders, channel.sealed_weight)
            answered = self.context.pool.ask(replace(question, orders=sealed), clients, {}, None)
            channel.note(answered)
            failed = failures(answered)
        if failed:  # bases need all of them
            raise start_error(failed[0])
        packets = {o.client: self.context.pool.fetch(o.update) for o in answered}
        total = self.total(agreed, packets, f"{question.name} {question.digest()}")
        whole = sum(channel.answer_weight(o.report) for o in answered if isinstance(o.report, Answered))
        up = sum(p.nbytes for p in packets.values()) + agreed.up
        return [Answer("(the sum)", 1.0, lambda: {n: t / whole for n, t in total.items()}, up, agreed.down)]

    def farewell(self, clients: Sequence[str]) -> Question | None:
        return forget_keys(self.run, clients)

    def total(self, agreed: Agreement, packets: Mapping[str, Packet], what: str) -> dict[str, Tensor]:
        """The sum (fp64) of what the clients of `packets` masked; `what` it is the sum of, the same after a resume.
        Raises PrivacyError when too few stay to open it, or it was opened of others' parts before."""
        sent, step = tuple(packets), agreed.step
        self._remember(what, sent)
        mine = {c: {o: agreed.sealed[o][c] for o in step.adverts} for c in sent}
        revealed, refused = self._values(Reveal(replace(step, sealed=mine, sent=sent)), sent)
        agreed.down += sum(len(text) for texts in mine.values() for text in texts.values())
        agreed.up += SHARE_BYTES * sum(len(shares) for shares in revealed.values())
        if len(revealed) < step.session.threshold:
            raise PrivacyError(
                f"{len(revealed)} clients of a secure sum stayed to the end, and {step.session.threshold} are needed: "
                "the sum stays closed" + (f" ({refused[0].client}: {refused[0].cause})" if refused else "")
            )
        vectors = {c: packet.vector for c, packet in packets.items()}
        total = secure_sum.unmask(step.session, agreed.advertised, step.adverts, vectors, revealed)
        return unflatten(next(iter(packets.values())).manifest, secure_sum.decode(total))

    def _remember(self, what: str, sent: Sequence[str]) -> None:
        """On disk before the sum is opened. Raises PrivacyError when, before a kill, it was opened of others' parts:
        clients send the same again, and two sums that differ by one client show it."""
        kept = json.loads(self._book.read_text()) if self._book.is_file() else {}
        before = kept.get(what, list(sent))
        if set(before) != set(sent):
            raise PrivacyError(
                f"the secure sum of {what} was opened of {', '.join(before)} before, and of {', '.join(sent)} it would "
                "show the difference: have the same clients back"
            )
        # Of rounds only the last can be repeated.
        kept = {w: c for w, c in kept.items() if not (w.startswith("round ") and what.startswith("round "))}
        write_durably(self._book, json.dumps(kept | {what: list(sent)}))

    def _values(self, question: SumQuestion, clients: Sequence[str]) -> tuple[dict[str, Any], list[Failure]]:
        outcomes = self.context.ask(question, clients)
        return {o.client: o.report.value for o in outcomes if isinstance(o.report, Answered)}, failures(outcomes)


def unflatten(manifest: Any, values: np.ndarray) -> dict[str, Tensor]:
    """fp64 tensors of the manifest's names and shapes."""
    tensors, offset = {}, 0
    for name, shape in manifest:
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(values[offset : offset + size].copy()).reshape(shape)
        offset += size
    return tensors


# --- the client's half -------------------------------------------------------------------------------------------


class Masked(Packed):
    """Vectors times their weight, in fixed point and masked, 8 bytes a number, where the orders name a sum. `count`:
    the client's own number of examples."""

    def __init__(self, keys: KeyStore, count: Callable[[str], int]):
        self.keys, self.count = keys, count

    def seal(self, client: str, tensors: Tensors, orders: Orders) -> Packet:
        if orders.sum is None:
            return super().seal(client, tensors, orders)
        weight = orders.weight if orders.weight is not None else float(self.count(client))
        names = sorted(tensors)
        values = torch.cat([tensors[n].detach().double().reshape(-1) for n in names]).cpu().numpy() * weight
        vector = secure_sum.encode(values, len(orders.sum.session.members))
        manifest = tuple((n, tuple(tensors[n].shape)) for n in names)
        key = self.keys.key(orders.run, client)
        return Packet(manifest, secure_sum.mask(key, client, orders.sum.session, orders.sum.adverts, vector))

    def rounding(self, numbers: int) -> float:
        return STEP / 2 * numbers**0.5

    def answers(self, question: Question) -> bool:
        return isinstance(question, SumQuestion)
