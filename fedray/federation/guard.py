"""The coordinator's side of privacy: plans from noised counts, the ledger, who may still train, and what each client is ordered to do.

| unit    | who adds the noise                    | sampled in a step                  | charged                        |
|---------|---------------------------------------|------------------------------------|--------------------------------|
| example | the client, from a key that it keeps  | each example, with rate batch / n  | to the client that trains      |
| client  | the coordinator, from a key it keeps  | each client, with rate cohort / k  | to every client, sampled or not |
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedray.config.sections import Config
from fedray.errors import ClientError, ConfigError, PrivacyError
from fedray.federation.messages import Ask, Failure, Orders, Question, Report
from fedray.federation.wire import Message, inputs_digest
from fedray.privacy import client_level
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.keys import Key, KeyStore
from fedray.privacy.ledger import EVERYONE, Ledger, draw_of, worst
from fedray.privacy.plan import PrivacyPlan, calibrate, default_delta, round_up

CLIP, COUNT_NOISE, SUBSPACE_FRACTION, SUBSPACE_EXAMPLES = 1.0, 20.0, 0.2, 512
SUBSPACE_RELEASES = 2  # G Omega, then Q^T G


def plans_for(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    """The plan of each client from (noised) numbers of examples; of unit client one plan, under EVERYONE.

    Raises ConfigError for a delta that is none, or a budget that what comes before training has spent.
    """
    try:
        return _client_plan(config, counts) if config.privacy.unit == "client" else _example_plans(config, counts)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _delta(config: Config, units: float, of: str) -> float:
    delta = config.privacy.delta if config.privacy.delta is not None else default_delta(units)
    if delta >= 1 / units:
        raise ConfigError(
            f"privacy.delta {delta:g} is not below 1 / {units:.0f}, {of}: a mechanism that shows one of them to everybody would satisfy it; lower it"
        )
    return delta


def _example_plans(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    privacy, rounds = config.privacy, config.federation.rounds
    delta, plans = _delta(config, max(counts.values()), "the largest client's number of examples"), {}
    for client, count in counts.items():
        section = config.client(client)
        before = [Release("count", privacy.count_noise or COUNT_NOISE)]
        if config.adapter.subspace == "private":
            rate = subspace_rate(config, count)
            before.append(_subspace_release(config, rate, delta))
        rate = round_up(section.batch_size / count)
        steps = rounds * section.local_steps
        noise = privacy.noise if privacy.noise is not None else calibrate(rate, steps, delta, privacy.epsilon, before)
        plans[client] = PrivacyPlan(
            "example", rate, rate * count, privacy.clip or CLIP, noise, steps, delta, privacy.epsilon, tuple(before)
        )
        _check_first_round(plans[client], section.local_steps, f"client '{client}'")
    return plans


def _subspace_release(config: Config, rate: float, delta: float) -> Release:
    share = _subspace_share(config)
    noise = calibrate(rate, SUBSPACE_RELEASES, delta, share) if share else config.privacy.noise
    return Release("subspace", noise, rate, SUBSPACE_RELEASES)


def _subspace_share(config: Config) -> float | None:
    """The epsilon that a private subspace may spend; None where only the noise is given."""
    privacy = config.privacy
    return (privacy.subspace_fraction or SUBSPACE_FRACTION) * privacy.epsilon if privacy.epsilon else None


def _check_first_round(plan: PrivacyPlan, steps: int, who: str) -> None:
    needed = epsilon([*plan.before, plan.release(steps)], plan.delta)
    if plan.budget is not None and needed > plan.budget:
        raise ValueError(
            f"{who} would spend epsilon {needed:.3g} by its first round with privacy.noise {plan.noise:g}, and its budget is {plan.budget:g}: raise one of them"
        )


def subspace_rate(config: Config, count: float) -> float:
    """Poisson rate of the examples that a private subspace is read from."""
    return round_up(min(1.0, (config.adapter.subspace_examples or SUBSPACE_EXAMPLES) / count))


def _client_plan(config: Config, counts: Mapping[str, float]) -> dict[str, PrivacyPlan]:
    privacy, clients = config.privacy, len(counts)
    cohort = min(config.federation.cohort or clients, clients)
    delta, rate, steps = _delta(config, clients, "the number of clients"), cohort / clients, config.federation.rounds
    noise = privacy.noise if privacy.noise is not None else calibrate(rate, steps, delta, privacy.epsilon)
    plan = PrivacyPlan("client", rate, float(cohort), privacy.clip or CLIP, noise, steps, delta, privacy.epsilon)
    _check_first_round(plan, 1, "every client")
    return {EVERYONE: plan}


def check_orders(config: Config, client: str, count: int, orders: Orders, subspace: bool = False) -> None:
    """A client's own look at what it is ordered to do, in a round or (`subspace`) for its sketches: with its own config and its true count,
    the whole run must stay within the budget. Raises PrivacyError; nothing is computed then.

    The count that the coordinator plans with is noised, maybe under a key that was lost since: it is taken to be within nine standard deviations.
    """
    privacy, section = config.privacy, config.client(client)
    count_noise = privacy.count_noise or COUNT_NOISE
    least = max(float(section.batch_size), count - 9 * count_noise)
    delta = privacy.delta if privacy.delta is not None else default_delta(least)
    most = subspace_rate(config, least) if subspace else round_up(section.batch_size / least)
    clip = 1.0 if subspace else privacy.clip or CLIP
    # With both given, epsilon shares out what the subspace may spend, and the noise is of training alone.
    wanted = privacy.noise if not (subspace and privacy.epsilon is not None) else None
    if orders.clip != clip or (wanted is not None and orders.noise != wanted):
        raise PrivacyError(
            "the coordinator ordered another clip or noise than the client's own config has: it sends nothing"
        )
    if orders.rate > most:
        raise PrivacyError(
            "the coordinator ordered a higher sampling rate than the client's own count gives: it sends nothing"
        )
    if privacy.epsilon is None or wanted is not None:
        return
    if subspace:
        spent, budget = (
            epsilon([Release("subspace", orders.noise, orders.rate, SUBSPACE_RELEASES)], delta),
            _subspace_share(config),
        )
    else:
        before = [Release("count", count_noise)]
        if config.adapter.subspace == "private":  # at the rate of the count that these orders were made from
            before.append(
                _subspace_release(config, subspace_rate(config, max(least, orders.expected / orders.rate)), delta)
            )
        steps = config.federation.rounds * section.local_steps
        spent, budget = (
            epsilon([*before, Release("training", orders.noise, orders.rate, steps)], delta),
            privacy.epsilon,
        )
    if spent > budget:
        raise PrivacyError(
            f"the coordinator ordered noise with which the run would spend epsilon {spent:.3g} of {budget:g}: it sends nothing"
        )


def forget(config: Config, folder: Path) -> int:
    """Remove this machine's noise keys of the run in a run directory; how many there were. Raises ConfigError for a run without privacy."""
    ledger = Ledger.load(Path(folder) / "checkpoint" / "ledger.json")
    if ledger is None:
        raise ConfigError(f"'{folder}' is no private run: it has no ledger")
    return KeyStore(config.privacy.key_dir).forget_run(ledger.run)


class Guard:
    """One run's ledger and what follows from it. `folder`: of the checkpoints, where the ledger is too."""

    def __init__(self, config: Config, clients: Sequence[str], folder: Path):
        self.config, self.clients, self.path = config, list(clients), folder / "ledger.json"
        self._keys = KeyStore(config.privacy.key_dir)  # never in the run directory, which may be given away
        self.by_client = config.privacy.unit == "client"
        self.ledger = Ledger.load(self.path) or Ledger(secrets.token_hex(8))

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Go on after these records: the clip is what the last of them left."""
        if self.by_client and records and "next_clip" in records[-1]:
            self.ledger.clip = records[-1]["next_clip"]

    @property
    def expected(self) -> float:
        """Unit client: clients of a cohort, the divisor of the sum."""
        return self.ledger.plans[EVERYONE].expected

    @property
    def begun(self) -> bool:
        """Whether plans are there."""
        return bool(self.ledger.plans)

    def begin(self, ask: Callable[[Question, Sequence[str]], Sequence[tuple[Any, Callable[[], dict], int]]]) -> None:
        """Ask the clients for their noised counts and make the plans. Raises ConfigError as `plans_for`, ClientError when a client fails."""
        ledger, clients = self.ledger, self.clients
        if self.by_client:
            counts = dict.fromkeys(clients, 1.0)
        else:
            ledger.save(self.path)  # the run's name first: the keys that the question makes are filed under it
            for client, (report, _, _) in zip(
                clients, ask(Question(Ask.KEY, orders=dict.fromkeys(clients, Orders(ledger.run))), clients), strict=True
            ):
                ledger.keys[client], ledger.fixed = report.key, ledger.fixed or report.key_is_fixed
            noise = self.config.privacy.count_noise or COUNT_NOISE
            for client in clients:
                ledger.charge(client, self._draw(client, "count"), Release("count", noise), 0)
            ledger.save(self.path)
            orders = {client: Orders(ledger.run, ledger.keys[client], noise=noise) for client in clients}
            for client, (_, fetch, _) in zip(clients, ask(Question(Ask.COUNT, orders=orders), clients), strict=True):
                ledger.counts[client] = max(float(self.config.client(client).batch_size), fetch()["count"].item())
            counts = ledger.counts
        ledger.plans = plans_for(self.config, counts)
        ledger.delta = next(iter(ledger.plans.values())).delta
        ledger.clip = self.config.privacy.clip or CLIP
        self.ledger.save(self.path)

    def weight(self, client: str) -> float:
        """What a client's update counts with: its noised number of examples, or 1."""
        return self.ledger.counts[client] if self.config.by_examples else 1.0

    def spent(self, round: int, message: Message) -> list[dict[str, str]]:
        """The clients that a round (from 0) would take over their budget, and why they are left out, in client order. One that was charged
        for the same round before a kill has paid for it."""
        if self.by_client:
            # Its draw follows from the updates, which are not there yet: `mean` decides whether it is the one that was charged.
            charged = any(e.round == round + 1 for e in self.ledger.entries.get(EVERYONE, []))
            out = not charged and not self.ledger.affords(EVERYONE, "", self.ledger.plans[EVERYONE].release(1))
            return [{"client": c, "reason": self._reason(EVERYONE)} for c in self.clients] if out else []
        out = [
            c
            for c in self.clients
            if not self.ledger.affords(c, self._round_draw(c, round, message), self._round_of(c))
        ]
        return [{"client": c, "reason": self._reason(c)} for c in out]

    def _round_draw(self, client: str, round: int, message: Message) -> str:
        return self._draw(client, "round", round, inputs_digest(message.header, message.packet_of(client)))

    def _reason(self, name: str) -> str:
        return f"another round would take it beyond its budget of epsilon {self.ledger.plans[name].budget:g} (spent: {self.ledger.epsilon(name):.4g})"

    def _round_of(self, client: str) -> Release:
        return self.ledger.plans[client].release(self.config.client(client).local_steps)

    def orders(self, round: int, message: Message, clients: Sequence[str]) -> tuple[dict[str, Orders], list[Failure]]:
        """What each client is told for its round (from 0), charged and on disk before it is told, and who cannot afford it."""
        ledger, told, refused = self.ledger, {}, []
        if self.by_client:
            plan = ledger.plans[EVERYONE]
            return dict.fromkeys(clients, Orders(ledger.run, "", plan.rate, plan.noise, ledger.clip, plan.expected)), []
        for client in clients:
            plan, release = ledger.plans[client], self._round_of(client)
            draw = self._round_draw(client, round, message)
            if not ledger.affords(client, draw, release):
                refused.append(Failure(client, self._reason(client), ""))
                continue
            ledger.charge(client, draw, release, round + 1)
            told[client] = Orders(ledger.run, ledger.keys[client], plan.rate, plan.noise, plan.clip, plan.expected)
        ledger.save(self.path)
        return told, refused

    # --- unit client: the coordinator's own noise ----------------------------------------------------------------

    @property
    def _key(self) -> Key:
        return self._keys.key(self.ledger.run, "(coordinator)")

    def sample(self, round: int) -> list[str]:
        """The clients of a round (from 0), each by itself with the plan's rate; nobody else must know them, or sampling protects nothing."""
        picked = self._key.stream("cohort", round).sample(len(self.clients), self.ledger.plans[EVERYONE].rate)
        return [self.clients[i] for i in picked]

    def mean(
        self, round: int, reference: Mapping[str, Tensor], updates: Sequence[Mapping[str, Tensor]], summed: bool
    ) -> dict[str, Tensor]:
        """The noised mean (fp64) of the clipped updates (`summed`: of what is already their sum), charged before it is made. Raises
        PrivacyError for an update that is not clipped, or when the budget does not allow it."""
        ledger, plan, adaptive = self.ledger, self.ledger.plans[EVERYONE], self.config.privacy.adaptive_clip
        total, within = client_level.zeros_like(reference), 0.0
        for update in updates:
            own = dict(update)
            within += own.pop(client_level.WITHIN).item() if adaptive else 0.0
            if not summed and client_level.norm(own) > ledger.clip:
                raise PrivacyError("a client sent an update beyond the clip: its worker does not run this fedray")
            total = {name: t + own[name].double() for name, t in total.items()}
        digest = hashlib.sha256(b"".join(total[n].numpy().tobytes() for n in sorted(total))).hexdigest()
        purpose, release = ("round", round, digest, repr(within)), plan.release(1)
        draw = draw_of(self._key.identity, ledger.run, *purpose)
        if not ledger.affords(EVERYONE, draw, release):
            raise PrivacyError(self._reason(EVERYONE))
        ledger.charge(EVERYONE, draw, release, round + 1)
        ledger.fixed = ledger.fixed or self._key.fixed
        ledger.save(self.path)
        deviation = client_level.update_noise(plan.noise, plan.expected, adaptive is not None) * ledger.clip
        mean = client_level.noised_mean(total, deviation, plan.expected, self._key.stream("noise", *purpose))
        self._clip_used = ledger.clip
        if adaptive:
            ledger.clip = client_level.next_clip(
                ledger.clip, adaptive, within, plan.noise, plan.expected, self._key.stream("clip", *purpose)
            )
        return mean

    # --- both --------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What a round's record says of privacy. Who was sampled is a secret with unit client."""
        told: dict[str, Any] = {"epsilon": self.epsilons()}
        if self.by_client:
            told |= {"clip": self._clip_used, "next_clip": self.ledger.clip, "cohort": None}
        return told

    def farewell(self) -> Question:
        """The question that ends every client's noise key; the coordinator's own goes with it."""
        self._keys.forget(self.ledger.run, "(coordinator)")
        return Question(Ask.FORGET, orders=dict.fromkeys(self.clients, Orders(self.ledger.run)))

    def subspace_orders(self, ask: Ask, digest: str) -> dict[str, Orders]:
        """What every client is told for one of the subspace's releases, whose noise follows from the question and the `digest` of what
        comes with it."""
        ledger, told = self.ledger, {}
        for client in self.clients:
            (both,) = (r for r in ledger.plans[client].before if r.what == "subspace")
            release = replace(both, steps=1)
            draw = self._draw(client, "subspace", ask.name, digest)
            if not ledger.affords(client, draw, release):
                raise ClientError(client, self._reason(client))
            ledger.charge(client, draw, release, 0)
            told[client] = Orders(
                ledger.run, ledger.keys[client], release.rate, release.noise, 1.0, release.rate * ledger.counts[client]
            )
        ledger.save(self.path)
        return told

    def _draw(self, client: str, *inputs: str | int) -> str:
        return draw_of(self.ledger.keys[client], self.ledger.run, client, *inputs)

    def note_fixed(self, reports: Iterable[Report]) -> None:
        """A key that a test has fixed voids the run's guarantee for good, whenever it was used."""
        if not self.ledger.fixed and any(r.key_is_fixed for r in reports):
            self.ledger.fixed = True
            self.ledger.save(self.path)

    def note_lost_keys(self, failures: Sequence[Failure]) -> list[str]:
        """Clients whose noise will come from another key from now on: their next draw is another, and is charged."""
        lost = [f.client for f in failures if f.key]
        self.ledger.keys |= {f.client: f.key for f in failures if f.key}
        if lost:
            self.ledger.save(self.path)
        return lost

    def epsilons(self) -> dict[str, float]:
        """What each client has spent so far, at the ledger's delta."""
        if self.by_client:
            return dict.fromkeys(self.clients, self.ledger.epsilon(EVERYONE))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a quarter of a second each, most of it in NumPy
            return dict(zip(self.clients, pool.map(self.ledger.epsilon, self.clients), strict=True))

    def epsilon(self) -> float | None:
        """The largest of them."""
        return worst(list(self.epsilons().values()))
