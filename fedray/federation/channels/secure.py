"""Secure aggregation: the coordinator sees only the sum of what a cohort sends (Bonawitz et al., CCS 2017).

Keys and shares travel before the clients work, signatures and shares after, and only the sum is opened in between. A
client that drops out before it has shared is simply not in the sum; one that shared and sent nothing costs its
neighbours one share each; one that sent is in the sum even if it is gone at the end. The client's half is in
`masked.py`.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedray.errors import ConfigError, PrivacyError, RoundError
from fedray.federation.channels.base import Answer, Carriage, Channel, Context, Intake, Limit, Released
from fedray.federation.channels.masked import (
    Advertise,
    Reveal,
    Share,
    SignSent,
    SumQuestion,
    round_and_purpose,
    rule_of,
)
from fedray.federation.channels.plain import AsIs, start_error
from fedray.federation.messages import NO_ORDERS, PUBLIC, Answered, Failure, Orders, Outcome, SumStep, failures
from fedray.federation.questions import Question, Sketch, forget_keys
from fedray.federation.screening import flaw_of_form
from fedray.federation.wire import Message, Packet
from fedray.methods import Method, Update, linear_methods
from fedray.methods.shapes import Shapes
from fedray.privacy import client_level, secure_sum
from fedray.privacy.files import write_durably
from fedray.privacy.secure_sum import (
    ADVERT_BYTES,
    LEAST_MEMBERS,
    PUBLIC_BYTES,
    SHARE_BYTES,
    SIGNATURE_BYTES,
    STEP,
    VERIFY_BYTES,
    Advert,
    Session,
)

if TYPE_CHECKING:
    from fedray.config.sections import Config


# --- the config's check ------------------------------------------------------------------------------------------

#: What of the privacy section counts for secure sums alone.
OPTIONS = ("secure_threshold", "secure_colluding", "identities")


def check(config: Config, method: Method) -> None:
    """Raises ValueError for a method that needs each update, and for what would show them beside the sum."""
    if not method.linear:
        raise ValueError(
            f"privacy.secure_aggregation opens only the sum of the updates, and {method.name} needs each one: use "
            f"{linear_methods()}"
        )
    if config.adapter.subspace == "gradient":
        raise ValueError(
            "adapter.subspace gradient has each client send its gradient in clear, which privacy.secure_aggregation is "
            "to hide: use gradient-raw (sketches, in secure sums), private, public or weights"
        )
    _check_threshold(config)
    protected = config.privacy.on and config.privacy.unit == "example"
    kept = _kept(config, method)
    if kept and not protected:
        raise ValueError(
            f"privacy.secure_aggregation hides single updates, and with {kept} the coordinator's checkpoint would hold "
            "what each client keeps, from which its update can be read: leave it out, or add privacy.epsilon with "
            "privacy.unit example"
        )


def _check_threshold(config: Config) -> None:
    """A share that lets one session be opened over two lists of clients."""
    share, signed = config.privacy.secure_threshold, config.privacy.identities is not None
    least = 2 / 3 if signed else 1 / 2
    if share is not None and share <= least:
        why = "a lying coordinator could have two groups of clients open different sums of the same updates"
        raise ValueError(
            f"privacy.secure_threshold {share:g} is not above {'two thirds' if signed else 'a half'}: {why}; raise it, "
            "or leave it out"
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
            "public keys, encrypted shares, signatures, and shares that open the sum",
            "each round it is drawn in",
            "hide all but the sum from fewer clients than the threshold",
            "privacy/secure_sum.py",
        )
    ]


_SIGNED = Limit(
    "medium",
    "The private keys of the clients' identities: whoever reads one signs in that client's name. The files of public "
    "keys must have reached each client by another way than through the coordinator",
    "privacy/sums/identity.py, Identities",
)
_UNSIGNED = Limit(
    "high",
    "A coordinator that impersonates clients: no identities were exchanged before the run (privacy.identities), so a "
    "coordinator that puts its own keys in the place of the clients' reads each update",
    "privacy/sums/identity.py, signer_of_run",
)
_TILTED = Limit(
    "low",
    "Weights in a secure sum follow noised counts of examples: a coordinator may order any within nine standard "
    "deviations (privacy.count_noise), and so tilt the sum towards one client's noised update",
    "federation/channels/orders.py, _check_weight",
)
_ALWAYS = (
    Limit(
        "medium",
        "A coordinator that begins another run, under another name, with workers that have not heard of this one: a "
        "worker is in one run's sums, and does not know whether two runs are meant to be one",
        "federation/channels/masked.py, Masked.party",
    ),
    Limit(
        "medium",
        "In a cohort so large that clients have few neighbours, a coordinator that chooses who drops out after it has "
        "seen the neighbours may learn sums over a tenth of the clients instead of all",
        "privacy/sums/neighbours.py, Neighbours",
    ),
    Limit(
        "medium",
        "What sums of several rounds or runs say together: a coordinator that sends about the same model again to a "
        "cohort with one client less reads that client from the difference",
        "privacy/sums/book.py, check_opened",
    ),
    Limit(
        "medium",
        "All clients of an opened sum but one, together, can take their own parts away and read that one's (of three "
        "clients one may drop out: then each of the two reads the other's)",
        "privacy/sums/rules.py, least",
    ),
)


def limits(config: Config) -> list[Limit]:
    """What this guarantee does not cover."""
    rule = rule_of(config)
    together = Limit(
        "medium",
        "As many clients as the threshold together with the coordinator can open one client's update "
        f"({'more than two thirds' if rule.signed else 'more than half'} of a small cohort; in a cohort so large that "
        f"clients have few neighbours, more than {rule.colluding:g} of its clients)",
        "privacy/sums/rules.py, Rule",
    )
    # Counts are noised in private runs, of which alone this is said.
    tilted = [_TILTED] if config.by_examples else []
    return [_SIGNED if rule.signed else _UNSIGNED, *tilted, together, *_ALWAYS]


def carriage(config: Config, members: int) -> Carriage:
    """Of a sum over so many clients: numbers of the ring are 64 bits wide."""
    return Carriage(8, (8).__mul__, beside=secure_sum.overhead(members, rule_of(config)))


# --- the server's half -------------------------------------------------------------------------------------------


@dataclass
class Agreement:
    """A sum whose clients have shared their secrets: the session, the keys of who shared, what they dealt, and the
    bytes so far."""

    session: Session
    adverts: dict[str, Advert]
    sealed: dict[str, dict[str, bytes]]
    up: int
    down: int

    @property
    def shared(self) -> bytes:
        """Who shared, as clients are told."""
        return secure_sum.bits(self.session, self.adverts)

    def step(self, **known: Any) -> SumStep:
        """What a client is told."""
        return SumStep(self.session.run, self.session.name, **known)


class SecureSums(AsIs):
    """The carrier of sums. `run`: under which clients file their keys; None: the name that the run had before it was
    resumed, or a new one. Beside the checkpoints it is kept whose parts a sum was opened of."""

    def __init__(self, context: Context, run: str | None):
        super().__init__(context)
        self.rule, self._book = rule_of(context.config), context.folder / "secure-sums.json"
        kept = self._kept()
        self.run = run or kept.get("run") or secrets.token_hex(8)
        if kept.get("run") != self.run:  # clients know by it what they have answered
            write_durably(self._book, json.dumps({"run": self.run, "opened": kept.get("opened", {})}))
        self._next = 0

    def announce(self, round: int, message: Message) -> None:
        self._next = round

    def agree(self, cohort: Sequence[str]) -> tuple[Agreement, list[Failure]]:
        """Raises RoundError when fewer are left than the threshold."""
        return self._agree(cohort, self._next)

    def _agree(self, cohort: Sequence[str], asked: Question | int) -> tuple[Agreement, list[Failure]]:
        """Advertise and share. Returns who could not, too."""
        threshold = self.rule.threshold(len(cohort))
        session = Session(secrets.token_hex(16), tuple(cohort), threshold, self.run, *round_and_purpose(asked))
        first = SumStep(self.run, session.name, session)
        adverts, failed = self._values(Advertise(dict.fromkeys(cohort, first)))
        near = secure_sum.edges(session, adverts)
        roster = {} if self.rule.signed else {c: a.verify for c, a in adverts.items()}
        told = {
            c: SumStep(self.run, session.name, adverts={o: adverts[o].public() for o in near[c]}, roster=roster)
            for c in adverts
        }
        dealt, late = self._values(Share(told))
        failed += late
        if len(dealt) < threshold:
            raise RoundError(
                f"{len(dealt)} of {len(cohort)} clients are there for a secure sum and {threshold} are needed: "
                f"{'; '.join(f.cause for f in failed)}"
            )
        up = sum(ADVERT_BYTES + len(a.drawn) for a in adverts.values()) + _size(dealt)
        down = sum(PUBLIC_BYTES * len(step.adverts) + VERIFY_BYTES * len(roster) for step in told.values())
        return Agreement(session, {c: adverts[c] for c in adverts if c in dealt}, dealt, up, down), failed

    def seal(
        self, agreed: Agreement, orders: Mapping[str, Orders], weight: Callable[[str], float | None]
    ) -> dict[str, Orders]:
        step = agreed.step(listed=agreed.shared)
        agreed.down += len(step.listed) * len(orders)
        return {c: replace(o, run=self.run, sum=step, weight=weight(c)) for c, o in orders.items()}

    def collect(
        self, agreed: Agreement, round: int, outcomes: Sequence[Outcome], weight: Callable[[Outcome], float], mean: bool
    ) -> Intake:
        packets = {o.client: self.context.pool.fetch(o.update) for o in outcomes}
        whole = sum(weight(o) for o in outcomes)
        divisor = whole if mean else 1.0
        total = {n: t / divisor for n, t in self.total(agreed, packets).items()}
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
        agreed, failed = self._agree(clients, question)
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
        total = self.total(agreed, packets)
        whole = sum(channel.answer_weight(o.report) for o in answered if isinstance(o.report, Answered))
        up = sum(p.nbytes for p in packets.values()) + agreed.up
        return [Answer("(the sum)", 1.0, lambda: {n: t / whole for n, t in total.items()}, up, agreed.down)]

    def farewell(self, clients: Sequence[str]) -> Question | None:
        return forget_keys(self.run, clients)

    def total(self, agreed: Agreement, packets: Mapping[str, Packet]) -> dict[str, Tensor]:
        """The sum (fp64) of what the clients of `packets` masked. Raises PrivacyError when too few stay to open it, or
        it was opened of others' parts before."""
        session, sent = agreed.session, tuple(packets)
        self._remember(session.what, sent)
        listed = secure_sum.bits(session, sent)
        signed, refused = self._values(SignSent(dict.fromkeys(sent, agreed.step(listed=listed))))
        agreed.down += len(listed) * len(sent)
        agreed.up += SIGNATURE_BYTES * len(signed)
        self._check_enough(session, signed, refused)
        enough = {c: signed[c] for c in list(signed)[: session.threshold]}
        mine = {c: {o: texts[c] for o, texts in agreed.sealed.items() if c in texts} for c in signed}
        steps = {c: agreed.step(signatures=enough, sealed=mine[c]) for c in signed}
        revealed, refused = self._values(Reveal(steps))
        agreed.down += _size(mine) + SIGNATURE_BYTES * len(enough) * len(steps)
        agreed.up += SHARE_BYTES * sum(len(shares) for shares in revealed.values())
        self._check_enough(session, revealed, refused)
        vectors = {c: packet.vector for c, packet in packets.items()}
        total = secure_sum.unmask(session, self.rule, agreed.adverts, vectors, revealed)
        return unflatten(next(iter(packets.values())).manifest, secure_sum.decode(total))

    def _check_enough(self, session: Session, there: Mapping[str, Any], refused: Sequence[Failure]) -> None:
        if len(there) < session.threshold:
            raise PrivacyError(
                f"{len(there)} clients of a secure sum stayed to the end, and {session.threshold} are needed: "
                "the sum stays closed" + (f" ({refused[0].client}: {refused[0].cause})" if refused else "")
            )

    def _kept(self) -> dict[str, Any]:
        return json.loads(self._book.read_text()) if self._book.is_file() else {}

    def _remember(self, what: str, sent: Sequence[str]) -> None:
        """On disk before the sum is opened. Raises PrivacyError when, before a kill, it was opened of others' parts:
        clients send the same again, and two sums that differ by one client show it. The clients see to it themselves
        (`privacy/sums/book.py`); here it is found before they are asked."""
        opened = self._kept().get("opened", {})
        before = opened.get(what, list(sent))
        if set(before) != set(sent):
            raise PrivacyError(
                f"the secure sum of {what} was opened of {', '.join(before)} before, and of {', '.join(sent)} it would "
                "show the difference: have the same clients back"
            )
        # Of rounds only the last can be repeated.
        opened = {w: c for w, c in opened.items() if not (w.startswith("round ") and what.startswith("round "))}
        write_durably(self._book, json.dumps({"run": self.run, "opened": opened | {what: list(sent)}}))

    def _values(self, question: SumQuestion) -> tuple[dict[str, Any], list[Failure]]:
        outcomes = self.context.ask(question, list(question.steps))
        return {o.client: o.report.value for o in outcomes if isinstance(o.report, Answered)}, failures(outcomes)


def _size(texts: Mapping[str, Mapping[str, bytes]]) -> int:
    """Bytes of what clients encrypted to each other."""
    return sum(len(text) for each in texts.values() for text in each.values())


def unflatten(manifest: Any, values: np.ndarray) -> dict[str, Tensor]:
    """fp64 tensors of the manifest's names and shapes."""
    tensors, offset = {}, 0
    for name, shape in manifest:
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(values[offset : offset + size].copy()).reshape(shape)
        offset += size
    return tensors
