"""The coordinator: holds the server state and the checkpoint, draws cohorts, aggregates. Knows workers only as a `Pool`.

The same code runs inside an actor (`pool_ray.py`) and in one process (`pool_inline.py`).
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from fedray import seeding
from fedray.adapters import Layer
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData, load_data
from fedray.data.tasks import TASKS, grouped
from fedray.errors import ClientError, RoundError
from fedray.federation import checkpoint as checkpoints
from fedray.federation.failures import ROUND_ATTEMPTS, WORKER_ATTEMPTS, Action, after_round
from fedray.federation.guard import Guard
from fedray.federation.messages import PUBLIC, Ask, Failure, Orders, Question, Report
from fedray.federation.secure import Opened, SecureSums
from fedray.federation.start import raise_failure, start
from fedray.federation.wire import Message, Packet, encode, pack, unpack
from fedray.methods import Diagnostics, State, Update
from fedray.methods.base import check_finite
from fedray.privacy import client_level
from fedray.privacy.secure_sum import STEP

#: CPU threads of the aggregation: a constant of the machine, so that both engines give the same bits.
AGGREGATION_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Outcome:
    """How one client's round ended: `update` and `kept` are handles for `Pool.fetch` and the next round, or None.

    `kept`: what stays with the client, its optimizer state and its own factors.
    """

    client: str
    report: Report | Failure
    update: Any = None
    kept: Any = None


class Pool(Protocol):
    """The workers, whatever they are."""

    def publish(self, message: Message) -> Any:
        """Make a broadcast available to all workers; returns a handle."""

    def train(
        self,
        handle: Any,
        round: int,
        clients: Sequence[str],
        kept: dict[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders] = MappingProxyType({}),
    ) -> list[Outcome]:
        """Run the clients' round; outcomes in the order of `clients`, with failures and late clients among them."""

    def ask(
        self, question: Question, clients: Sequence[str], kept: dict[str, Any], deadline: float | None
    ) -> list[Outcome]:
        """Put a question to the clients; answers are the outcomes' `update`."""

    def fetch(self, update: Any) -> Packet:
        """One client's update, when it is its turn to be added."""

    def evaluate(self, handle: Any, part: str, client: str | None, kept: Any = None) -> tuple[list[dict], float]:
        """Statistics of all examples in a fixed order, and what the base's dtype lost."""


class Coordinator:
    """One federated run's server side. `run_round` does one round and returns its record."""

    def __init__(
        self,
        config: Config,
        folder: str,
        facts: tuple[tuple[Layer, ...], dict[str, torch.Tensor]],
        pool: Pool,
        data: FederatedData | None = None,
    ):
        layers, heads = facts
        self.config, self.pool, self.folder = config, pool, Path(folder)
        self.method = make_method(config)
        self.data = data if data is not None else load_data(config)
        self.task = TASKS[config.model.task](config, self.data, None)
        self._heads, self._spec = heads, make_spec(config, layers, self.data.clients)
        held = checkpoints.latest(self.folder / "checkpoint", self._spec)
        self.start: dict[str, Any] | None = None
        self.seen, self.records = dict.fromkeys(self.data.clients, 0), []
        self._kept: dict[str, Any] = {}
        self._packets: dict[int, Packet] = {}
        self.guard = Guard(config, self.data.clients, self.folder / "checkpoint") if config.privacy.on else None
        run = self.guard.ledger.run if self.guard is not None else secrets.token_hex(8)
        self.secure = (
            SecureSums(config, self._ask, run, self.folder / "checkpoint")
            if config.privacy.secure_aggregation
            else None
        )
        if held is not None:
            self._begin(held.state)
            self.seen, self.records, self.start = dict(held.seen), list(held.records), held.start
            self._kept = {client: pack(t) for client, t in held.kept.items()}
            if self.guard is not None:
                self.guard.resume(self.records)
        elif not self._spec.adapter.started:
            self._begin(self.method.init(self._spec, heads))

    def _begin(self, state: State) -> None:
        self.state = state
        self._publish()

    @property
    def rounds_done(self) -> int:
        return self.state.round

    def cohort(self, round: int, spent: Sequence[str] = ()) -> list[str]:
        """The clients of a round (from 0), in the run's client order: a function of seed, round, and whose budget is spent; with unit client a
        secret Poisson sample."""
        if self.guard is not None and self.guard.by_client:
            return self.guard.sample(round) if not spent else []
        clients = [c for c in self.data.clients if c not in spent]
        size = min(self.config.federation.cohort or len(clients), len(clients))
        order = torch.randperm(len(clients), generator=seeding.generator(self.config.seed, "cohort", round))[:size]
        return [clients[i] for i in sorted(order.tolist())]

    def evaluate_start(self) -> dict[str, Any]:
        """The adapter's start where it has one, and metrics before the first round, kept as record 0. A second call changes nothing.

        Raises ClientError when a client cannot give its part of the start.
        """
        if self.records:
            return self.records[0]
        seconds: dict[str, float] = {}
        if self.guard is not None and not self.guard.begun:
            self.guard.begin(self._answers)
        if not hasattr(self, "state"):
            with _timed(seconds, "start"), threads(AGGREGATION_THREADS):
                found = start(self.config, self._spec, self.data.clients, self._answers, self.guard)
                self._begin(self.method.init(self._spec, self._heads, found.tensors))
                self.start = found.record()
            self._save()  # it may cost as much as a round; an engine that has evaluated could not make it again
        with _timed(seconds, "evaluate"):
            record = {"round": 0, **self._evaluate(), "start": self.start}
        if self.guard is not None:
            record |= {"epsilon": self.guard.epsilons(), "delta": self.guard.ledger.delta}
        record["seconds"] = seconds
        self.records.append(record)
        return record

    def _ask(self, question: Question, clients: Sequence[str]) -> list[Outcome]:
        return self.pool.ask(question, clients, {}, self.config.federation.deadline)

    def _answers(
        self, question: Question, clients: Sequence[str]
    ) -> list[tuple[Report, Callable[[], dict[str, torch.Tensor]], int]]:
        """Each client's answer; of sketches under secure aggregation one, their mean."""
        if self.secure is not None and question.ask in (Ask.RANGE, Ask.ROWS) and PUBLIC not in clients:
            return [self._summed_answer(question, clients)]
        result = []
        for outcome in self.pool.ask(question, clients, {}, None):
            if isinstance(outcome.report, Failure):
                if self.guard is not None:  # a resumed run goes on with the client's new key, and charges for it
                    self.guard.note_lost_keys([outcome.report])
                raise_failure(outcome.report)
            fetch, report = partial(self.pool.fetch, outcome.update), outcome.report
            if self.guard is not None:
                self.guard.note_fixed([report])
            if self.guard is not None and report.client in self.guard.ledger.counts:
                report = replace(report, examples=self.guard.weight(report.client))
            result.append((report, lambda fetch=fetch: unpack(fetch()), report.nbytes))
        return result

    def _summed_answer(
        self, question: Question, clients: Sequence[str]
    ) -> tuple[Report, Callable[[], dict[str, torch.Tensor]], int]:
        opened, failures = self.secure.open(clients)
        if not failures:
            orders = {c: question.orders.get(c, Orders(self.secure.run)) for c in clients}
            told = self.pool.ask(replace(question, orders=self._sealed_orders(orders, opened)), clients, {}, None)
            failures = [o.report for o in told if isinstance(o.report, Failure)]
            if self.guard is not None:
                self.guard.note_fixed([o.report for o in told if isinstance(o.report, Report)])
        if failures:
            if self.guard is not None:
                self.guard.note_lost_keys(failures)
            raise_failure(failures[0])  # bases need all of them
        packets = {o.client: self.pool.fetch(o.update) for o in told}
        what = f"{question.ask.name} {question.packet.digest if question.packet is not None else ''}"
        total, weight = self.secure.close(opened, packets, what), sum(self._weight(o) for o in told)
        nbytes = sum(p.nbytes for p in packets.values()) + opened.up
        return (
            Report("(the sum)", 1, None, 0.0, 0.0, nbytes, opened.down),
            lambda: {n: t / weight for n, t in total.items()},
            nbytes,
        )

    def _sealed_orders(self, orders: Mapping[str, Orders], opened: Opened) -> dict[str, Orders]:
        """The same orders, for vectors that go into a secure sum. A client whose size is no secret weighs its vector itself."""

        def weight(client: str) -> float | None:
            if self.guard is not None:
                return self.guard.weight(client)
            return None if self.config.by_examples else 1.0

        return {c: replace(o, secure=opened.secure, weight=weight(c)) for c, o in orders.items()}

    def _weight(self, outcome: Outcome) -> float:
        if self.guard is not None:
            return self.guard.weight(outcome.client)
        return float(outcome.report.examples) if self.config.by_examples else 1.0

    def run_round(self) -> dict[str, Any] | None:
        """Broadcast, local training, updates, aggregation, evaluation, checkpoint; the record that `rounds.jsonl` holds. None when every
        client's privacy budget is spent, or the budget of bytes, and the run ends here.

        Raises ClientError when a failing client costs the quorum, RoundError when a round cannot be completed.
        """
        round, seconds = self.state.round, {}
        if self.records and "stopped" in self.records[-1]:
            return None
        spent = self.guard.spent(round, self._message) if self.guard is not None else []
        if len(spent) == len(self.data.clients):
            return None
        with _timed(seconds, "train"):
            cohort = self.cohort(round, [s["client"] for s in spent])
            opened, gone = self.secure.open(cohort) if self.secure is not None else (None, [])
            outcomes, dropped = self._train(round, cohort, opened, gone)
            dropped = [*spent, *dropped]
        down = self._bytes_down(cohort)
        before = self.state
        with _timed(seconds, "aggregate"), threads(AGGREGATION_THREADS):
            sizes: list[int] = []
            updates: Iterable[Update] = self._updates(outcomes, sizes, opened)
            if self.method.asks:
                before, outcomes, updates, asked = self._second(before, outcomes, list(updates), sizes, dropped)
                down += asked
            if self.guard is not None and self.guard.by_client:
                updates = [self._noised(round, cohort, list(updates))]
            self.state, diagnostics = self.method.aggregate(before, updates)
            if opened is not None:
                sizes.append(opened.up)
                down += opened.down
                # What averaging lost cannot be told from a mean; a method that is exact loses what rounding the mean loses.
                diagnostics = Diagnostics(
                    None, self._rounded if self.method.exact == "yes" else None, diagnostics.ideal_norm
                )
            self._publish()
        if self.config.federation.keep_optimizer or self.method.keeps(self._spec):
            self._kept |= {o.client: o.kept for o in outcomes if o.kept is not None}  # SGD has no state
        reports = [o.report for o in outcomes]
        examples = sum(r.examples for r in reports)
        losses = [r.train_loss * r.examples for r in reports if r.train_loss is not None]
        record = {
            "round": round + 1,
            "cohort": cohort,
            "dropped": dropped,
            "train_loss": sum(losses) / examples if losses else None,
            "metrics": None,
            "bytes_up": sum(sizes),
            "bytes_down": down,
            "aggregation_error": diagnostics.aggregation_error,
            "exactness": diagnostics.exactness,
            "ideal_norm": diagnostics.ideal_norm,
            "store_error": None,
            "epsilon": None,
        }
        if self.guard is not None:
            record |= self.guard.record()
            if self.guard.by_client:
                record["dropped"] = [{"client": "(withheld)", "reason": "left out"} for _ in dropped]
            if self.state.round < self.config.federation.rounds and len(
                over := self.guard.spent(self.state.round, self._message)
            ) == len(self.data.clients):
                record["stopped"] = f"client '{over[0]['client']}' and all others: {over[0]['reason']}"
        if self.state.round < self.config.federation.rounds and (words := self._too_many_bytes(record)):
            record["stopped"] = words
        last = self.state.round == self.config.federation.rounds or "stopped" in record
        if self.state.round % self.config.federation.evaluate_every == 0 or last:
            with _timed(seconds, "evaluate"):
                record |= self._evaluate()
            if record["store_error"]:
                record["store_error"] /= diagnostics.ideal_norm or 1.0
        record["seconds"] = seconds
        with _timed(seconds, "checkpoint"):
            self.records.append(record)
            self._save()
        return record

    # --- parts of a round -----------------------------------------------------------------------------------

    def _publish(self) -> None:
        message = encode(self.method.broadcast(self.state), self._packets, self._spec)
        self._packets = message.increments
        self._message, self._handle = message, self.pool.publish(message)

    def _train(
        self, round: int, cohort: list[str], opened: Opened | None, gone: list[Failure]
    ) -> tuple[list[Outcome], list[dict[str, str]]]:
        """Outcomes of the clients that reported, in cohort order, and who was dropped and why. `gone`: who has failed the secure sum already."""
        done: dict[str, Outcome] = {}
        attempt = 0
        while True:
            attempt += 1
            missing = [c for c in cohort if c not in done and c not in [f.client for f in gone]]
            outcomes = self._ask_to_train(round, missing, opened)
            failures = [*gone, *(o.report for o in outcomes if isinstance(o.report, Failure))]
            done |= {o.client: o for o in outcomes if isinstance(o.report, Report)}
            secret = self.guard is not None and self.guard.by_client  # who was drawn
            reasons = [f"a client: {f.cause}" if secret else f"client '{f.client}': {f.cause}" for f in failures]
            decision = after_round(len(cohort), len(done), self.config.federation.quorum, attempt, reasons)
            if decision.action is Action.AGGREGATE:
                return [done[c] for c in cohort if c in done], [
                    {"client": f.client, "reason": f.cause} for f in failures
                ]
            if decision.action is Action.FAIL:
                if len(failures) == 1 and self.config.federation.quorum == 1.0 and not secret:
                    raise ClientError(
                        failures[0].client, f"{failures[0].cause} (round {round + 1})", failures[0].details
                    )
                error = RoundError(f"round {round + 1}: {decision.reason}")
                error.details = "\n".join(f.details for f in failures)
                raise error

    def _ask_to_train(self, round: int, clients: list[str], opened: Opened | None) -> list[Outcome]:
        """One outcome for each client. A client that has lost its noise key is charged for another draw, if it can afford it, and asked again."""
        deadline = self.config.federation.deadline
        if self.guard is None:
            orders = (
                self._sealed_orders(dict.fromkeys(clients, Orders(self.secure.run)), opened)
                if opened is not None
                else {}
            )
            return self.pool.train(self._handle, round, clients, self._kept, deadline, orders)
        outcomes: dict[str, Outcome] = {}
        for _ in range(WORKER_ATTEMPTS):
            asked = [c for c in clients if c not in outcomes]
            orders, refused = self.guard.orders(round, self._message, asked)
            orders = self._sealed_orders(orders, opened) if opened is not None else orders
            outcomes |= {f.client: Outcome(f.client, f) for f in refused}
            told = self.pool.train(self._handle, round, list(orders), self._kept, deadline, orders)
            lost = self.guard.note_lost_keys([o.report for o in told if isinstance(o.report, Failure)])
            self.guard.note_fixed([o.report for o in told if isinstance(o.report, Report)])
            outcomes |= {o.client: o for o in told if o.client not in lost}
            if not lost:
                break
        else:
            outcomes |= {o.client: o for o in told}
        return [outcomes[c] for c in clients]

    def _noised(self, round: int, cohort: list[str], updates: list[Update]) -> Update:
        """With unit client: the one update that the method sees, what clients would send had they not trained, moved by the noised mean."""
        view = self.method.view(self._spec, self.method.broadcast(self.state), None)
        trained = {
            n: t for n, t in view.tensors.items() if n in self.state.heads or n.rsplit(".", 1)[1] in view.trained
        }
        reference = self.method.upload(self._spec, "", trained, round)
        for update in updates:
            check_finite(update)
        mean = self.guard.mean(round, reference, [dict(u.tensors) for u in updates], self.secure is not None)
        moved = {n: t.double() + mean[n] for n, t in reference.items()}
        sent = {n: t.float() for n, t in moved.items()}
        if self.secure is not None:
            self._rounded = (
                client_level.norm({n: t - sent[n] for n, t in moved.items()}) + self._step / self.guard.expected
            ) / (client_level.norm(mean) or 1.0)
        return Update("(the noised mean)", 1.0, sent)

    def finish(self) -> None:
        """The run is over: clients remove their noise keys, so that nobody can take the noise away again."""
        if self.guard is not None:
            self.pool.ask(self.guard.farewell(), self.data.clients, {}, None)
        elif self.secure is not None:
            orders = dict.fromkeys(self.data.clients, Orders(self.secure.run))
            self.pool.ask(Question(Ask.FORGET, orders=orders), self.data.clients, {}, None)

    def _updates(self, outcomes: list[Outcome], sizes: list[int], opened: Opened | None) -> Iterator[Update]:
        """Each client's update, or with secure aggregation one: their weighted mean (with unit client their sum)."""
        if opened is not None:
            packets = {o.client: self.pool.fetch(o.update) for o in outcomes}
            sizes += [p.nbytes for p in packets.values()]
            weight = sum(self._weight(o) for o in outcomes)
            divisor = 1.0 if self.guard is not None and self.guard.by_client else weight
            mean = {
                n: t / divisor for n, t in self.secure.close(opened, packets, f"round {self.state.round + 1}").items()
            }
            sent = {n: t.float() for n, t in mean.items()}
            # Relative to the mean itself: fp32, and half a step of the ring for each number of each client at most.
            step = len(packets) * STEP / 2 / divisor * sum(t.numel() for t in mean.values()) ** 0.5
            if self.guard is None or not self.guard.by_client:  # the sum before noise is nobody's to measure
                self._rounded = (client_level.norm({n: t - sent[n] for n, t in mean.items()}) + step) / (
                    client_level.norm(mean) or 1.0
                )
            self._step = step
            yield Update("(the sum)", weight, sent)
            return
        for outcome in outcomes:
            packet = self.pool.fetch(outcome.update)
            sizes.append(packet.nbytes)
            yield Update(outcome.client, self._weight(outcome), unpack(packet))

    def _second(
        self,
        before: State,
        outcomes: list[Outcome],
        updates: list[Update],
        sizes: list[int],
        dropped: list[dict[str, str]],
    ) -> tuple[State, list[Outcome], list[Update], int]:
        """The method's question and the cohort's answers, put into the updates: (state with what was asked, who answered, their
        updates, bytes down). A client that fails now is left out as far as the quorum allows."""
        asked = self.method.question(before, updates)
        packet = pack(asked)
        kept = {o.client: o.kept for o in outcomes}
        answers = self.pool.ask(Question(Ask.ANSWER, packet), list(kept), kept, self.config.federation.deadline)
        failures = [a.report for a in answers if isinstance(a.report, Failure)]
        told = {a.client: self.pool.fetch(a.update) for a in answers if isinstance(a.report, Report)}
        reasons = [f"client '{f.client}': {f.cause}" for f in failures]
        decision = after_round(
            len(outcomes) + len(dropped), len(told), self.config.federation.quorum, ROUND_ATTEMPTS, reasons
        )
        if decision.action is Action.FAIL:
            raise RoundError(f"round {before.round + 1}, second upload: {decision.reason}")
        dropped += [{"client": f.client, "reason": f.cause} for f in failures]
        sizes += [p.nbytes for p in told.values()]
        both = [
            Update(u.client, u.weight, {**u.tensors, **unpack(told[u.client])}) for u in updates if u.client in told
        ]
        rest = [o for o in outcomes if o.client in told]
        return before.replace(memory=before.memory | unpack(packet)), rest, both, packet.nbytes * len(kept)

    def _bytes_down(self, cohort: list[str]) -> int:
        """What the cohort receives: the packet of every round, and each increment a client has not had yet."""
        total = 0
        for client in cohort:
            new = [v for v in self._message.increments if v > self.seen[client]]
            total += self._message.packet_of(client).nbytes + sum(self._message.increments[v].nbytes for v in new)
            self.seen[client] = max([self.seen[client], *new])
        return total

    def _too_many_bytes(self, record: dict[str, Any]) -> str | None:
        """Why no round may follow this one, if none may."""
        most, now = self.config.federation.max_bytes, record["bytes_up"] + record["bytes_down"]
        moved = now + sum(r["bytes_up"] + r["bytes_down"] for r in self.records[1:])
        moved += sum((self.start or {}).get(way, 0) for way in ("bytes_up", "bytes_down"))
        if most is None or moved + now <= most:
            return None
        return f"another round like this one would move {moved + now:,} bytes in all, and federation.max_bytes is {most:,.0f}"

    def _evaluate(self) -> dict[str, Any]:
        if self.method.keeps(self._spec):
            return self._evaluate_personal()
        statistics, lost = self.pool.evaluate(self._handle, "test", None)
        result = {"metrics": self.task.metrics(statistics), "store_error": lost}
        if groups := grouped(self.task, statistics):
            result["groups"] = groups
        if self.config.data.client_held_out > 0:
            local = {client: self.pool.evaluate(self._handle, "held-out", client)[0] for client in self.data.clients}
            result["client_metrics"] = {client: self.task.metrics(s) for client, s in local.items()}
        return result

    def _evaluate_personal(self) -> dict[str, Any]:
        """Each client's own model on its own held-out examples, or where clients hold none back on the common ones; `metrics` is the
        plain mean over the clients."""
        part, each, lost = "held-out" if self.config.data.client_held_out > 0 else "test", {}, 0.0
        for client in self.data.clients:
            statistics, own = self.pool.evaluate(self._handle, part, client, self._kept.get(client))
            each[client], lost = self.task.metrics(statistics), max(lost, own)
        means = {name: math.fsum(m[name] for m in each.values()) / len(each) for name in next(iter(each.values()))}
        return {"metrics": means, "store_error": lost, "client_metrics": each}

    def _save(self) -> None:
        kept = {client: unpack(self.pool.fetch(handle)) for client, handle in self._kept.items()}
        saved = checkpoints.Checkpoint(self.state, self.seen, kept, tuple(self.records), self.start)
        checkpoints.save(self.folder / "checkpoint", saved)


def evaluate_shares(shares: Sequence[tuple[list[list[dict]], Any]]) -> list[dict]:
    """Put batches that were dealt to several workers in turn back into their order."""
    queues = [iter(batches) for batches, _ in shares]
    merged: list[dict] = []
    for turn in range(sum(len(batches) for batches, _ in shares)):
        merged += next(queues[turn % len(queues)])
    return merged


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    started = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - started, 4)


@contextmanager
def threads(count: int):
    """PyTorch's CPU threads for a while: they are part of what fixes the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
