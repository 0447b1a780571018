"""Client-level differential privacy that trusts nobody: each client adds its share of the noise itself, in whole
numbers inside the secure sum, so that no one ever sees the exact sum (Kairouz, Liu, Steinke, ICML 2021).

One account for all clients, as with a trusted coordinator. The shares are for all clients together: where fewer send,
the noise of their sum is short, which is charged before the sum is opened. A client takes clip and noise from its own
config, and keeps a journal of what it has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fedray.errors import PrivacyError
from fedray.federation.channels.base import Admission, Intake, Limit, Released, Tensors, Training
from fedray.federation.channels.client import ClientLevel, ClippingSide
from fedray.federation.channels.keyed import Keyed, KeyedSide
from fedray.federation.channels.masked import rule_of
from fedray.federation.channels.orders import check_round_number
from fedray.federation.messages import Failure, Orders, Outcome
from fedray.federation.wire import Message, Packet, broadcast_digest
from fedray.methods import Update, View
from fedray.privacy import client_level, discrete
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.journal import Said
from fedray.privacy.keys import digest_of
from fedray.privacy.ledger import EVERYONE, Ledger, draw_of
from fedray.privacy.plan import PrivacyPlan
from fedray.privacy.planning import plans_for

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.record import RoundRecord
    from fedray.privacy.private import Private


# --- the config's check ------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises ValueError for what would need somebody who is trusted."""
    privacy = config.privacy
    if privacy.unit != "client":
        raise ValueError(
            "privacy.trust nobody is of privacy.unit client; with unit example no client trusts anybody anyway"
        )
    if not privacy.secure_aggregation:
        raise ValueError(
            "privacy.trust nobody adds each client's share of the noise inside a secure sum: switch "
            "privacy.secure_aggregation on"
        )
    if privacy.adaptive_clip is not None:
        raise ValueError(
            "privacy.adaptive_clip lets the coordinator say what clients clip to, which privacy.trust nobody does not "
            "believe: give privacy.clip"
        )


# --- its lines of privacy.json -----------------------------------------------------------------------------------

#: Whose key the noise comes from, and what the coordinator learns of what stays with a client.
KEY_HOLDER, KEPT = "client's", "nothing stays"


def trust(sees: str) -> str:
    """Against whom the guarantee holds."""
    return (
        "against everyone but the client's own machine, the coordinator included, as far as the other clients follow "
        "the protocol: each adds its share of the noise inside the secure sum, and nobody sees the exact sum"
    )


def released(config: Config, how: str) -> list[Released]:
    """What crosses a client's border. `how`: what its carrier does to vectors."""
    what = f"its update, clipped as a whole, with its share of the noise{how}"
    return [Released(what, "each round", "discrete Gaussian noise, charged (training)", "privacy/discrete.py")]


def limits(config: Config) -> list[Limit]:
    """What this guarantee does not cover."""
    return [
        Limit(
            "medium",
            "Clients that work with the coordinator, or add no noise: they can take their shares away, and of k "
            "clients with t of them the noise is that of k - t",
            "privacy/discrete.py, effective_noise",
        ),
        Limit(
            "medium",
            "A coordinator that has a sum opened of fewer clients and does not charge for it: clients refuse fewer "
            "than their threshold (of a large cohort it may learn sums over a tenth), with which epsilon is at most "
            "`epsilon_against_a_lying_coordinator`",
            "federation/channels/distributed.py, against_liars",
        ),
        Limit(
            "low",
            "A round repeated on another kind of machine has the same noise and other last bits: their difference is "
            "noise-free rounding",
            "federation/worker.py, train",
        ),
    ]


def against_liars(plan: PrivacyPlan, least: int, clients: int) -> float:
    """Epsilon of the whole run where in every round the sum was opened of no more clients than the least."""
    noise = discrete.effective_noise(plan.noise, clients, least)
    return epsilon([Release("training", noise, steps=plan.steps, discrete=True)], plan.delta)


def beside(config: Config, ledger: Ledger, clients: int) -> dict[str, Any]:
    """What `privacy.json` says of the guarantee beside epsilon."""
    least = rule_of(config).fewest(clients)
    return {
        "accountant": "RDP of Gaussian noise, which bounds a sum of discrete ones (Kairouz, Liu, Steinke, 2021)",
        # Without identities a coordinator that stands in for the others reads one update with its own share alone.
        "epsilon_against_a_lying_coordinator": (
            against_liars(ledger.plans[EVERYONE], least if rule_of(config).signed else 1, clients)
        ),
    }


# --- the server's half -------------------------------------------------------------------------------------------


class Distributed(Keyed, ClientLevel):
    """One account for all clients, whose keys the noise comes from."""

    def counts(self) -> Mapping[str, float]:
        self.ask_keys()
        return super().counts()

    def end(self) -> None:
        """The coordinator has no key of its own."""
        Keyed.end(self)

    # --- a round ---

    def admit(self, round: int, message: Message) -> Admission | None:
        return None if self.spent(round, message) else self.with_agreement(Admission(list(self.context.clients)))

    def orders(self, call: Training, clients: Sequence[str]) -> tuple[dict[str, Orders], dict[str, Outcome]]:
        """One charge for all: whoever of them trains."""
        ledger, plan = self.ledger, self._plan
        draw, release = self._round_draw(call), plan.release(1)
        if not ledger.affords(EVERYONE, draw, release):
            reason = self.beyond_budget(EVERYONE)
            return {}, {c: Outcome(c, Failure(c, reason, "")) for c in clients}
        ledger.charge(EVERYONE, draw, release, call.round + 1)
        self.save()
        told = {c: Orders(ledger.run, ledger.keys[c], plan.rate, plan.noise, plan.clip, plan.expected) for c in clients}
        return told, {}

    @property
    def _plan(self) -> PrivacyPlan:
        return self.ledger.plans[EVERYONE]

    def _round_draw(self, call: Training) -> str:
        keys = digest_of(*(word for pair in sorted(self.ledger.keys.items()) for word in pair))
        packet = call.message.packet_of(self.context.clients[0])
        return draw_of(keys, self.ledger.run, "round", call.round, broadcast_digest(call.message.header, packet))

    def collect(self, call: Training, outcomes: Sequence[Outcome]) -> Intake:
        """One update: what clients would send had they not trained, moved by the mean of what they sent."""
        self._charge_short(call, [o.client for o in outcomes])
        intake = self.carrier.collect(call.admission.agreed, call.round, outcomes, self.weight, mean=False)
        (total,), unmoved = list(intake.updates), call.expected.unmoved
        mean = {n: t.double() / len(outcomes) for n, t in total.tensors.items()}
        moved = {n: t.double() + mean[n] for n, t in unmoved.items()}
        sent = {n: t.float() for n, t in moved.items()}
        rounded = client_level.norm({n: t - sent[n] for n, t in moved.items()})
        lost = (rounded + (intake.rounding or 0.0) / len(outcomes)) / (client_level.norm(mean) or 1.0)
        return Intake([Update("(the noised mean)", 1.0, sent)], intake.up, intake.down, intake.rounding, lost)

    def _charge_short(self, call: Training, sent: Sequence[str]) -> None:
        """Charge what the noise of those who sent is short of the plan's, before their sum is opened. Raises
        PrivacyError when the budget does not allow it.

        Two Gaussian releases of the same sum are worth one with 1/z^2 = 1/a^2 + 1/b^2: beside the plan's z = a stands
        the b that makes up the difference.
        """
        planned = len(self.context.clients)
        if len(sent) >= planned:
            return
        beside = self._plan.noise / (planned / len(sent) - 1) ** 0.5
        release = Release("training, noise short", beside, discrete=True)
        draw = f"{self._round_draw(call)}:{digest_of(*sorted(sent))[:16]}"
        if not self.ledger.affords(EVERYONE, draw, release):
            raise PrivacyError(
                f"{len(sent)} of {planned} clients sent, so the noise of their sum is short, and the budget of epsilon "
                f"{self._plan.budget:g} does not allow that: the sum stays closed; have all clients back"
            )
        self.ledger.charge(EVERYONE, draw, release, call.round + 1)
        self.save()

    # --- what is said of it ---

    def annotate(self, record: RoundRecord, message: Message, last: bool) -> RoundRecord:
        """All clients take part: who is missing is no secret."""
        return Keyed.annotate(self, record, message, last)

    def reason(self, failure: Failure) -> str:
        return Keyed.reason(self, failure)


# --- the client's half -------------------------------------------------------------------------------------------


class DistributedSide(KeyedSide, ClippingSide):
    """A client that clips its whole update and adds its share of the noise, as its own config says."""

    logs_clients = True  # everybody takes part
    own_words = (PrivacyError,)  # the coordinator is not trusted

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._purposes: dict[str, tuple[str | int, ...]] = {}

    @cached_property
    def _plan(self) -> PrivacyPlan:
        """The run's, worked out by the client itself."""
        return plans_for(self.config, dict.fromkeys(self.trainer.data.clients, 1.0))[EVERYONE]

    def protect(self, client: str, round: int, inputs: Callable[[], str], orders: Orders) -> Private | None:
        key, plan = self.key(client, orders), self._plan
        check_round_number(self.config, round)
        if orders.clip != plan.clip or orders.noise != plan.noise:
            raise PrivacyError(
                "the coordinator ordered another clip or noise than the client's own config gives: it sends nothing"
            )
        if set(self.sealer.members(client, orders)) != set(self.trainer.data.clients):
            raise PrivacyError(
                "the coordinator ordered a secure sum of other clients than all of the run, whose noise would be "
                "short: it sends nothing"
            )
        purpose: tuple[str | int, ...] = ("round", client, round, inputs(), *orders.shape())
        said = Said(f"round {round + 1}", key.identity, digest_of(*purpose), plan.release(1))
        whole = plan.release(self.config.federation.rounds)
        self.write_down(client, orders, said, self._check, plan.delta, [whole])
        self._purposes[client] = purpose
        return super().protect(client, round, inputs, orders)

    def _check(self, releases: Sequence[Release]) -> None:
        if self._plan.budget is not None and (spent := epsilon(releases, self._plan.delta)) > self._plan.budget:
            raise PrivacyError(
                f"with this round the client would have spent epsilon {spent:.3g} of {self._plan.budget:g}: it sends "
                "nothing"
            )

    def trained(self, client: str, view: View, steps: Callable[[], Any]) -> Any:
        """Training that comes to no finite numbers changes nothing, and the client adds its noise as the others do: at
        which broadcast it fails would tell of its data, without noise."""
        try:
            return steps()
        except FloatingPointError as error:
            self._log(client, error)
            self.trainer.reset()
            return self.trainer.untrained(view, client)

    def changed(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Tensors:
        """The same of an update that is not finite."""
        try:
            return super().changed(client, round, view, trained, orders)
        except FloatingPointError as error:
            self._log(client, error)
            return super().changed(client, round, view, {n: view.tensors[n] for n in trained}, orders)

    @staticmethod
    def _log(client: str, error: FloatingPointError) -> None:
        """In this machine's own log."""
        logging.getLogger("fedray").error("client %s sends an update of zero, with its noise: %s", client, error)

    def send(self, client: str, round: int, view: View, trained: Tensors, orders: Orders) -> Packet:
        tensors = self.changed(client, round, view, trained, orders)
        stream = self.key(client, orders).stream("share", *self._purposes.pop(client))
        deviation = self._plan.noise * self._plan.clip / self.sealer.step
        try:
            share = discrete.share_of(deviation, len(self.trainer.data.clients))
        except ValueError as error:
            raise PrivacyError(f"{error}: it sends nothing") from None
        return self.sealer.seal(client, tensors, orders, round, partial(discrete.integers, stream, share))
