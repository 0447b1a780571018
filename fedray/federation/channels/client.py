"""Client-level differential privacy: each client, with all it has, is protected against whoever sees the models.

Each client clips its whole update; the coordinator, which is trusted to, adds the noise to their sum, from a key that
it keeps (McMahan et al., ICLR 2018). The cohort is a secret Poisson sample that epsilon rests on, so no record and no
log names it. Every client is charged for every round, sampled or not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedray.errors import FedrayError, PrivacyError, RoundError
from fedray.federation.channels import plain
from fedray.federation.channels.accounted import Accounted, PrivateSide
from fedray.federation.channels.base import Admission, Carrier, Context, Intake, Limit, Released, Tensors, Training
from fedray.federation.messages import Failure, Orders, Outcome
from fedray.federation.wire import Message, Packet, unpack
from fedray.methods import Method, Update, View, linear_methods
from fedray.methods.shapes import Shapes
from fedray.privacy import client_level
from fedray.privacy.keys import Key
from fedray.privacy.ledger import EVERYONE, Ledger, draw_of

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.record import RoundRecord

#: The name under which the coordinator keeps its own key.
COORDINATOR = "(coordinator)"


# --- the config's check ------------------------------------------------------------------------------------------


def check(config: Config, method: Method) -> None:
    """Raises ValueError for what the noise on the mean would not reach."""
    if not method.linear:
        raise ValueError(
            f"privacy.unit client adds noise to the mean of the updates, and {method.name} broadcasts more than that: "
            f"use {linear_methods()}"
        )
    if method.kept:
        raise ValueError(
            f"privacy.unit client noises what is averaged, and {method.name}'s clients keep factors of their own that "
            "it does not reach: use unit example"
        )
    if config.federation.keep_optimizer:
        raise ValueError(
            "privacy.unit client noises what is averaged, and federation.keep_optimizer would leave the optimizer "
            "state of each client that was drawn, without noise, in the checkpoint: leave it out"
        )
    if config.privacy.secure_aggregation and config.federation.cohort is not None:
        raise ValueError(
            "privacy.secure_aggregation with privacy.unit client needs every client in every round, since a small "
            "sample would show its members: leave federation.cohort out"
        )
    if config.method.weights == "examples":
        raise ValueError(
            "method.weights examples would weigh clients by sizes that privacy.unit client protects: use equal, or "
            "leave it out"
        )


# --- its lines of privacy.json -----------------------------------------------------------------------------------

#: Whose key the noise comes from, and what the coordinator learns of what stays with a client.
KEY_HOLDER, KEPT = "coordinator's", "not noised: it stays with the coordinator, which is trusted"


def unit(config: Config) -> str:
    """What is protected."""
    return "one client with all its data"


def trust(sees: str) -> str:
    """Against whom the guarantee holds. `sees`: what the coordinator sees of updates."""
    return (
        f"against whoever sees the models, not against the coordinator, which adds the noise, {sees} and keeps the key "
        "of the noise and of the sampling"
    )


def released(config: Config, how: str) -> list[Released]:
    """What crosses a client's border. `how`: what its carrier does to vectors."""
    when, place = "each round it is drawn in", "privacy/client_level.py"
    noised = "noised by the coordinator after summing"
    lines = [Released(f"its update, clipped as a whole{how}", when, f"{noised}, charged (training)", place)]
    if config.privacy.adaptive_clip:
        said = f"whether its update was within the clip{how}"
        lines.append(Released(said, when, f"{noised}, part of the same charge", place))
    return lines


def limits(config: Config) -> list[Limit]:
    """What this guarantee does not cover."""
    return [
        Limit(
            "high",
            "A coordinator that does not follow the protocol: it alone adds the noise",
            "federation/channels/client.py, ClientLevel",
        ),
        Limit(
            "medium",
            "`rounds.jsonl` and `report.html` have times, which are longer for a larger sample: publish the models, "
            "not the records",
            "federation/round.py, run_round",
        ),
    ]


# --- the server's half -------------------------------------------------------------------------------------------


def more_numbers(config: Config) -> int:
    """How many numbers an update has beside the method's and the heads': whether it was within the clip."""
    return int(config.privacy.adaptive_clip is not None)


class ClientLevel(Accounted):
    """One account for all clients. Over a carrier of sums the coordinator does not see single updates either."""

    def __init__(self, context: Context, carrier: Carrier, ledger: Ledger):
        super().__init__(context, carrier, ledger)
        self._clip_used = ledger.clip

    def resume(self, records: Sequence[Mapping[str, Any]], mark: dict[str, Any] | None) -> None:
        """The clip is what the last of them left."""
        super().resume(records, mark)
        if records and "next_clip" in records[-1]:
            self.ledger.clip = records[-1]["next_clip"]

    def counts(self) -> Mapping[str, float]:
        return dict.fromkeys(self.context.clients, 1.0)

    def end(self) -> None:
        """The coordinator's own key goes with the clients'."""
        self.store.forget(self.ledger.run, COORDINATOR)
        super().end()

    @property
    def _key(self) -> Key:
        return self.store.key(self.ledger.run, COORDINATOR)

    @property
    def _clip(self) -> float:
        """The clip of the next round."""
        clip = self.ledger.clip
        assert clip is not None, "`begin` has set it with the plans"
        return clip

    # --- a round ---

    def admit(self, round: int, message: Message) -> Admission | None:
        """Each client by itself with the plan's rate; nobody else must know them, or sampling protects nothing."""
        if self.spent(round, message):
            return None
        clients, rate = self.context.clients, self.ledger.plans[EVERYONE].rate
        picked = self._key.stream("cohort", round).sample(len(clients), rate)
        return self.with_agreement(Admission([clients[i] for i in picked]))

    def spent(self, round: int, message: Message) -> list[dict[str, str]]:
        """All or none. The round's draw follows from the updates, which are not there yet: `_charged` decides whether
        it is the one that was charged."""
        charged = any(e.round == round + 1 for e in self.ledger.entries.get(EVERYONE, []))
        if charged or self.ledger.affords(EVERYONE, "", self.ledger.plans[EVERYONE].release(1)):
            return []
        reason = self.beyond_budget(EVERYONE)
        return [{"client": c, "reason": reason} for c in self.context.clients]

    def receivers(self, admission: Admission) -> tuple[Sequence[str], float]:
        """Of a secret sample only what is expected may be said, and no client is known to have had more than others."""
        return self.context.clients, self.ledger.plans[EVERYONE].rate

    def train(self, call: Training, clients: Sequence[str]) -> list[Outcome]:
        plan, ledger = self.ledger.plans[EVERYONE], self.ledger
        orders = Orders(ledger.run, "", plan.rate, plan.noise, self._clip, plan.expected)
        return self.train_by(call, dict.fromkeys(clients, orders))

    def weight(self, outcome: Outcome) -> float:
        return 1.0

    def sealed_weight(self, client: str) -> float | None:
        return 1.0

    def shapes(self, call: Training, client: str) -> Shapes:
        said = {client_level.WITHIN: (1,)} if self.config.privacy.adaptive_clip else {}
        return dict(sorted({**call.expected.shapes(client), **said}.items()))

    def look(self, packet: Packet) -> str | None:
        update = unpack(packet)
        if self.config.privacy.adaptive_clip and abs(update.pop(client_level.WITHIN).item()) != client_level.HALF:
            return "it said neither that its update was within the clip nor that it was not"
        if client_level.norm(update) > self._clip:
            return "its update is beyond the clip: its worker does not run this fedray"
        return None

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        """One update: what clients would send had they not trained, moved by the noised mean."""
        intake = self.carrier.collect(call.admission.agreed, call.round, outcomes, self.weight, mean=False)
        updates, unmoved = list(intake.updates), call.expected.unmoved
        mean = self._noised(call.round, unmoved, [dict(u.tensors) for u in updates], len(outcomes))
        moved = {n: t.double() + mean[n] for n, t in unmoved.items()}
        sent = {n: t.float() for n, t in moved.items()}
        lost = None
        if intake.rounding is not None:
            rounded = client_level.norm({n: t - sent[n] for n, t in moved.items()})
            lost = (rounded + intake.rounding / self.ledger.plans[EVERYONE].expected) / (client_level.norm(mean) or 1.0)
        up = intake.up if self.ledger.plans[EVERYONE].rate == 1.0 else self._expected_up(call)
        return Intake([Update("(the noised mean)", 1.0, sent)], up, intake.down, intake.rounding, lost)

    def _expected_up(self, call: Training) -> int:
        """Bytes of a sample of the expected size; the true ones would tell its size, which is part of the secret."""
        numbers = sum(math.prod(shape) for shape in self.shapes(call, self.context.clients[0]).values())
        return round(self.ledger.plans[EVERYONE].expected * numbers * plain.carriage(self.config).width)

    def _noised(
        self, round: int, reference: Tensors, updates: Sequence[dict[str, Tensor]], clients: int
    ) -> dict[str, Tensor]:
        """The noised mean (fp64) of the clipped updates of so many clients (or of what is already their sum), charged
        before it is made. Raises PrivacyError when the budget does not allow it."""
        ledger, plan = self.ledger, self.ledger.plans[EVERYONE]
        quantile = self.config.privacy.adaptive_clip
        total, within = self._total(reference, updates)
        # A sum does not show who of them said more than a half.
        within = min(max(within, -clients * client_level.HALF), clients * client_level.HALF)
        purpose = self._charged(round, total, within)
        deviation = client_level.update_noise(plan.noise, plan.expected, quantile is not None) * self._clip
        mean = client_level.noised_mean(total, deviation, plan.expected, self._key.stream("noise", *purpose))
        self._clip_used = self._clip
        if quantile:
            bits = self._key.stream("clip", *purpose)
            ledger.clip = client_level.next_clip(self._clip, quantile, within, plan.noise, plan.expected, bits)
        return mean

    def _total(self, reference: Tensors, updates: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
        """The sum of the updates (fp64), and of what clients said of the clip."""
        total, within = client_level.zeros_like(reference), 0.0
        for update in updates:
            if self.config.privacy.adaptive_clip:
                within += update.pop(client_level.WITHIN).item()
            total = {name: t + update[name].double() for name, t in total.items()}
        return total, within

    def _charged(self, round: int, total: Mapping[str, Tensor], within: float) -> tuple[str | int, ...]:
        """What the round's noise is for, charged and on disk. Raises PrivacyError when the budget does not allow it."""
        ledger, release = self.ledger, self.ledger.plans[EVERYONE].release(1)
        digest = hashlib.sha256(b"".join(total[n].numpy().tobytes() for n in sorted(total))).hexdigest()
        purpose = ("round", round, digest, repr(within))
        draw = draw_of(self._key.identity, ledger.run, *purpose)
        if not ledger.affords(EVERYONE, draw, release):
            raise PrivacyError(self.beyond_budget(EVERYONE))
        ledger.charge(EVERYONE, draw, release, round + 1)
        ledger.fixed = ledger.fixed or self._key.fixed
        self.save()
        return purpose

    # --- what is said of it ---

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        """Who was drawn, and how many, stays a secret."""
        withheld = [{"client": "(withheld)", "reason": "left out"} for _ in record.dropped]
        record = record.replace(cohort=None, dropped=withheld, clip=(self._clip_used, self.ledger.clip))
        return super().annotate(record, message, last)

    def epsilons(self) -> dict[str, float]:
        return dict.fromkeys(self.context.clients, self.ledger.epsilon(EVERYONE))

    def reason(self, failure: Failure) -> str:
        return f"a client: {failure.cause.replace(_named(failure), 'it')}"

    def error(self, round: int, decision: str, failures: Sequence[Failure]) -> FedrayError:
        return RoundError(f"round {round + 1}: {decision}", "\n".join(f.details for f in failures))


def _named(failure: Failure) -> str:
    """As causes name a client."""
    return f"client '{failure.client}'"


# --- the client's half -------------------------------------------------------------------------------------------


class ClippingSide(PrivateSide):
    """A client that bounds how much all it has can move the sum."""

    # The coordinator is trusted, and who reads the records sees none.
    own_words: tuple[type[Exception], ...] = (PrivacyError, FloatingPointError)
    logs_clients = False  # who is asked in a round is a secret sample, which epsilon rests on

    def changed(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Tensors:
        """What training changed of what is sent, clipped; and whether it was within the clip, where that is asked."""
        sent = self.method.upload(self.spec, client, dict(trained), round)
        untrained = self.method.upload(self.spec, client, {n: view.tensors[n] for n in trained}, round)
        rounding = self.sealer.rounding(sum(t.numel() for t in sent.values()))
        if not rounding < orders.clip:
            raise PrivacyError(
                f"the clip {orders.clip:.3g} is no larger than what the fixed point of a secure sum rounds: it sends "
                "nothing; raise privacy.clip"
            )
        # Rounding is part of what the sum moves by: the clip holds with it.
        update, within = client_level.clipped({n: t - untrained[n] for n, t in sent.items()}, orders.clip - rounding)
        if self.config.privacy.adaptive_clip:
            update[client_level.WITHIN] = torch.tensor([client_level.HALF if within else -client_level.HALF])
        return update
