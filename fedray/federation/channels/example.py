"""Example-level differential privacy: each training example is protected, against everyone but its own client's
machine.

Each client adds all its noise itself, from a key that it keeps. The server plans from noised counts, charges a client's
account before it tells the client to work, and leaves out who cannot afford a round. A client checks its orders against
its own config and its true count, whoever gives them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedray.data.tasks import TASKS
from fedray.errors import ClientError, ConfigError, PrivacyError
from fedray.federation.channels.base import Admission, Answer, Limit, Released, Training
from fedray.federation.channels.keyed import Keyed, KeyedSide
from fedray.federation.channels.orders import Budget
from fedray.federation.channels.plain import start_error
from fedray.federation.messages import PUBLIC, Answered, Failure, Orders, Outcome
from fedray.federation.questions import (
    MethodQuestion,
    Question,
    Sketch,
)
from fedray.federation.wire import Message, Packet, broadcast_digest
from fedray.privacy.accountant import Release
from fedray.privacy.journal import Said
from fedray.privacy.keys import digest_of
from fedray.privacy.plan import Mechanism
from fedray.privacy.planning import SKETCH_CLIP, count_noise
from fedray.privacy.private import Private, SketchNoise

if TYPE_CHECKING:
    from fedray.config.sections import Config


# --- the config's check ------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raises ValueError for what would let one example move more than the clip."""
    for name, dropout in (("model.dropout", config.model.dropout), ("adapter.dropout", config.adapter.dropout)):
        if dropout:
            # Its masks are laid out over the batch: one example more shifts those of all others, and the sum moves by
            # more than the clip.
            raise ValueError(
                f"{name} {dropout:g} would let one example change what every other one adds, beyond what privacy.clip "
                "bounds: set it to 0 in a private run"
            )


def check_rows(config: Config, rows: Mapping[str, int]) -> None:
    """Raises ConfigError for a client with fewer rows than a private step divides by, where rows are what is
    protected."""
    for client, count in rows.items():
        if TASKS[config.model.task].labelled and count < (batch := config.client(client).batch_size):
            raise ConfigError(too_few(client, batch))


def too_few(client: str, batch: int) -> str:
    """Why a client cannot take private steps."""
    return (
        f"client '{client}' has fewer examples than its batch_size {batch}, by which a private step divides: lower it"
    )


# --- its lines of privacy.json -----------------------------------------------------------------------------------

#: Whose key the noise comes from, and what the coordinator learns of what stays with a client.
KEY_HOLDER, KEPT = "client's", "a function of DP-SGD steps alone"


def unit(config: Config) -> str:
    """What is protected."""
    if TASKS[config.model.task].cuts(config.data):
        return (
            f"one sequence of at most {config.data.max_length} tokens; a longer text is several units, and so is a "
            "person with several texts"
        )
    return "one row of the training data; a person with several rows is several units"


def trust(sees: str) -> str:
    """Against whom the guarantee holds; what the coordinator sees of updates does not matter."""
    return (
        "against everyone but the client's own machine, the coordinator and the other clients included: each client "
        "adds all its noise itself"
    )


def released(config: Config, how: str) -> list[Released]:
    """What crosses a client's border. `how`: what its carrier does to vectors."""
    lines = [
        Released(
            "its number of examples",
            "once",
            "Gaussian noise, charged (count)",
            "federation/channels/example.py, NoisedCount",
        )
    ]
    if config.adapter.subspace == "private":
        lines.append(
            Released(
                f"two sketches of its gradient{how}",
                "once",
                "normalised example by example, Gaussian noise, charged (subspace)",
                "training/subspace.py",
            )
        )
    lines.append(
        Released(
            f"its trained factors and heads{how}",
            "each round it is drawn in",
            "functions of DP-SGD steps alone, charged (training)",
            "privacy/dpsgd.py",
        )
    )
    return lines


def limits(config: Config) -> list[Limit]:
    """What this guarantee does not cover."""
    bound = config.privacy.lifetime_epsilon
    another = (
        "a client keeps what it answers in one run within that run's budget, and does not know whether two runs are "
        "meant to be one; set privacy.lifetime_epsilon"
        if bound is None
        else f"a client's releases of all runs of its key folder together stay within epsilon {bound:g}, and not more"
    )
    return [
        Limit(
            "low",
            "A round repeated on another kind of machine or with other threads has the same noise and other last "
            "bits: their difference is noise-free rounding",
            "federation/worker.py, train",
        ),
        Limit(
            "medium",
            f"A coordinator that begins another run, under another name: {another}",
            "privacy/lifetime.py, Lifetime",
        ),
    ]


# --- questions that only this guarantee has ----------------------------------------------------------------------


@dataclass(frozen=True)
class NoisedCount(Question):
    """How many training examples the client has, with Gaussian noise, rounded."""

    name = "COUNT"
    what = "its noised number of examples"

    def answer(self, side: Any, client: str, kept: Packet | None) -> Mapping[str, Tensor]:
        return {"count": side.noised_count(client, self.orders[client])}


# --- the server's half -------------------------------------------------------------------------------------------


class ExampleLevel(Keyed):
    """Each client has an account: what it has released, of which draws of noise."""

    def counts(self) -> Mapping[str, float]:
        """Each client's noised number of examples, asked for once and charged before it is told."""
        ledger, clients = self.ledger, self.context.clients
        self.ask_keys()
        noise = count_noise(self.config)
        for client in clients:
            ledger.charge(client, self.draw(client, "count"), Release("count", noise), 0)
        self.save()
        orders = {client: Orders(ledger.run, ledger.keys[client], noise=noise) for client in clients}
        for answer in self.carrier.ask(NoisedCount(orders=orders), clients, self):
            least, said = float(self.config.client(answer.client).batch_size), answer.tensors().get("count")
            if said is None or said.shape != (1,):
                raise start_error(Failure(answer.client, "its number of examples is none", ""))
            ledger.counts[answer.client] = max(least, said.item())
        return ledger.counts

    def ask(self, question: Question, clients: Sequence[str]) -> list[Answer]:
        if isinstance(question, Sketch) and PUBLIC not in clients:
            question = replace(question, orders=self._sketch_orders(question))
        return super().ask(question, clients)

    def _sketch_orders(self, question: Sketch) -> dict[str, Orders]:
        """What every client is told for one of the subspace's releases, whose noise follows from the question."""
        ledger, orders, digest = self.ledger, {}, question.digest()
        for client in self.context.clients:
            (both,) = (r for r in ledger.plans[client].before if r.what == "subspace")
            release = replace(both, steps=1)
            draw = self.draw(client, "subspace", question.name, digest)
            if not ledger.affords(client, draw, release):
                raise ClientError(client, self.beyond_budget(client))
            ledger.charge(client, draw, release, 0)
            rate, noise, count = release.rate, release.noise, ledger.counts[client]
            orders[client] = Orders(ledger.run, ledger.keys[client], rate, noise, SKETCH_CLIP, rate * count)
        self.save()
        return orders

    # --- a round ---

    def admit(self, round: int, message: Message) -> Admission | None:
        left_out = self.spent(round, message)
        names = {out["client"] for out in left_out}
        able = [c for c in self.context.clients if c not in names]
        return self.with_agreement(Admission(self.drawn(round, able), left_out)) if able else None

    def spent(self, round: int, message: Message) -> list[dict[str, str]]:
        """A client that was charged for the same round before a kill has paid for it."""
        out = [
            client
            for client in self.context.clients
            if not self.ledger.affords(client, self._round_draw(client, round, message), self._round_of(client))
        ]
        return [{"client": client, "reason": self.beyond_budget(client)} for client in out]

    def orders(self, call: Training, clients: Sequence[str]) -> tuple[dict[str, Orders], dict[str, Outcome]]:
        """What each client is told for its round, charged and on disk before it is told, and who cannot afford it."""
        ledger, orders, refused = self.ledger, {}, {}
        for client in clients:
            plan, release = ledger.plans[client], self._round_of(client)
            draw = self._round_draw(client, call.round, call.message)
            if not ledger.affords(client, draw, release):
                refused[client] = Outcome(client, Failure(client, self.beyond_budget(client), ""))
                continue
            ledger.charge(client, draw, release, call.round + 1)
            key = ledger.keys[client]
            orders[client] = Orders(ledger.run, key, plan.rate, plan.noise, plan.clip, plan.expected)
        self.save()
        return orders, refused

    def _round_of(self, client: str) -> Release:
        return self.ledger.plans[client].release(self.config.client(client).local_steps)

    def _round_draw(self, client: str, round: int, message: Message) -> str:
        return self.draw(client, "round", round, broadcast_digest(message.header, message.packet_of(client)))

    # --- what clients count with, and have spent ---

    def weight(self, outcome: Outcome) -> float:
        return self.context.weight_of(self.ledger.counts[outcome.client])

    def sealed_weight(self, client: str) -> float | None:
        return self.context.weight_of(self.ledger.counts[client])

    def answer_weight(self, report: Answered) -> float:
        return self.context.weight_of(self.ledger.counts.get(report.client, 1.0))

    def epsilons(self) -> dict[str, float]:
        clients = self.context.clients
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a quarter of a second each, most of it in NumPy
            return dict(zip(clients, pool.map(self.ledger.epsilon, clients), strict=True))


# --- the client's half -------------------------------------------------------------------------------------------


class ExampleSide(KeyedSide):
    """A client that clips and noises what its examples say, whoever asks."""

    def admitted(self, client: str) -> tuple[type[Question], ...]:
        questions = super().admitted(client)
        if client == PUBLIC:
            return questions
        sketches = (Sketch,) if self.config.adapter.subspace == "private" else ()
        second = (MethodQuestion,) if self.method.asks else ()
        return (*questions, NoisedCount, *sketches, *second)

    def protect(self, client: str, round: int, inputs: Callable[[], str], orders: Orders) -> Private:
        key, budget = self.key(client, orders), self.budget(client, orders)
        budget.check_round(round, orders)
        purpose: tuple[str | int, ...] = ("round", client, round, inputs(), *orders.shape())
        release = Release("training", orders.noise, orders.rate, self.config.client(client).local_steps)
        said = Said(f"round {round + 1}", key.identity, digest_of(*purpose), release)
        check = partial(budget.check_run, orders)
        self.write_down(client, orders, said, check, budget.delta, [budget.training(orders)])
        return Private(key, purpose, orders.rate, Mechanism(orders.clip, orders.noise, orders.expected))

    def sketched(self, question: Sketch, client: str) -> tuple[Sequence[Any], Mapping[str, Tensor], SketchNoise | None]:
        if client == PUBLIC:
            return super().sketched(question, client)
        if self.trainer.was_loaded:
            raise PrivacyError("the coordinator asked for a sketch of another model than the base: it sends nothing")
        orders, every, sides = question.orders[client], self.trainer.examples("train", client), question.given(self)
        key, budget = self.key(client, orders), self.budget(client, orders)
        budget.check_sketch(orders)
        purpose = ("subspace", client, question.name, question.digest(), *orders.shape())
        said = Said(
            f"subspace {question.name}",
            key.identity,
            digest_of(*purpose),
            Release("subspace", orders.noise, orders.rate),
        )
        self.write_down(client, orders, said, budget.check, budget.delta)
        picked = [every[i] for i in key.stream("sample", *purpose).sample(len(every), orders.rate)]
        noise = SketchNoise(orders.noise, key.stream("noise", *purpose), orders.expected)
        return picked, sides, noise

    def noised_count(self, client: str, orders: Orders) -> Tensor:
        """The client's number of examples with its noise, rounded: one number."""
        key, deviation = self.key(client, orders), count_noise(self.config)
        noise = key.stream("count", client).normals(1).item() * deviation
        count = torch.tensor([len(self.trainer.examples("train", client)) + noise]).round()
        journal = self.journal(client, orders)
        said = Said("count", key.identity, "", Release("count", deviation), count.item())
        # The first is before there is a budget to speak of: delta follows from it. Others have it.
        before = journal.count
        budget = Budget(self.config, client, count.item() if before is None else before, journal.releases)
        check = budget.check if before is not None else lambda made: None
        self.write_down(client, orders, said, check, budget.delta)
        return count

    def budget(self, client: str, orders: Orders) -> Budget:
        """What the client may release in this run, as far as what it has said allows."""
        journal = self.journal(client, orders)
        if journal.count is None:  # on another machine, or before its journal was lost
            self.noised_count(client, orders)
        assert journal.count is not None, "a count is told with its value"
        return Budget(self.config, client, journal.count, journal.releases)
