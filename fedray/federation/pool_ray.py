"""The Ray engine's coordinator: an actor, and the pool through which it reaches the workers; updates by reference."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fedray.config.sections import Config
from fedray.errors import FedrayError, RoundError
from fedray.federation.coordinator import Coordinator, Outcome, evaluate_shares
from fedray.federation.failures import WORKER_ATTEMPTS, Action, ClientState, after_client
from fedray.federation.logs import event, log_lines
from fedray.federation.messages import PUBLIC, Failure, Orders, Question
from fedray.federation.placement import Home
from fedray.federation.wire import Header, Message, Packet


@dataclass
class Published:
    """A broadcast in the object store: one put for the packet of each rank, one for each increment in its life."""

    header: Header
    packet: Any
    increments: dict[int, Any]
    cut: dict[int, Any]
    ranks: dict[str, int]

    def packet_of(self, client: str) -> Any:
        return self.cut[self.ranks[client]] if client in self.ranks else self.packet


class RayPool:
    """The pool as the coordinator sees it. `order`: all clients, for giving each its own worker where there are enough. `homes`: whom each
    worker may serve; empty: anyone."""

    def __init__(
        self, workers: Sequence[Any], order: Sequence[str], progress=lambda client: None, homes: Sequence[Home] = ()
    ):
        self.workers, self.progress = list(workers), progress
        self._serves = [home.clients for home in homes] or [tuple(order)] * len(self.workers)
        self._owner = self._owners(order)
        self._increments: dict[int, Any] = {}
        self._restarting: dict[Any, int] = {}  # reference that resolves when a worker is back -> its index
        self._lost: set[int] = set()  # workers that cannot be restarted

    def _owners(self, order: Sequence[str]) -> dict[str, int]:
        """Each client's own worker; empty unless there is one for each."""
        owners: dict[str, int] = {}
        for client in order:
            free = (i for i, served in enumerate(self._serves) if client in served and i not in owners.values())
            if (index := next(free, None)) is None:
                return {}
            owners[client] = index
        return owners

    def _may(self, worker: int, client: str | None) -> bool:
        """Whether a worker may do a client's work; what belongs to no client, anyone may."""
        return client is None or client == PUBLIC or client in self._serves[worker]

    def publish(self, message: Message) -> Published:
        self._increments = {
            v: self._increments[v] if v in self._increments else ray.put(p) for v, p in message.increments.items()
        }
        cut = {rank: ray.put(packet) for rank, packet in message.cut.items()}
        return Published(message.header, ray.put(message.packet), self._increments, cut, message.ranks)

    def train(
        self,
        handle: Published,
        round: int,
        clients: Sequence[str],
        kept: dict[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders] = MappingProxyType({}),
    ) -> list[Outcome]:
        """One local training for each client; see `_each`."""

        def call(worker: Any, client: str) -> tuple:
            remote = worker.train.options(num_returns=3).remote
            return remote(
                client,
                round,
                handle.header,
                handle.packet_of(client),
                handle.increments,
                kept.get(client),
                orders.get(client),
            )

        return self._each(clients, call, deadline, self.progress)

    def ask(
        self, question: Question, clients: Sequence[str], kept: dict[str, Any], deadline: float | None
    ) -> list[Outcome]:
        """One answer from each client; see `_each`."""
        shared = ray.put(question)
        return self._each(
            clients,
            lambda w, c: w.ask.options(num_returns=3).remote(c, shared, kept.get(c)),
            deadline,
            lambda client: None,
        )

    def _each(
        self,
        clients: Sequence[str],
        call: Callable[[Any, str], tuple],
        deadline: float | None,
        progress: Callable[[str], None],
    ) -> list[Outcome]:
        """All clients at once, as far as workers go; a client that waits takes the first worker that is free. `call` starts a client's
        work on a worker: references to its update, to what it keeps, and to its report.

        A worker that died or was stopped gets work again when its restart is done; until then it is in `_restarting`.
        """
        ends = time.monotonic() + deadline if deadline is not None else None
        states = dict.fromkeys(clients, ClientState.WAITING)
        attempts = dict.fromkeys(clients, 0)
        outcomes: dict[str, Outcome] = {}
        idle = [i for i in range(len(self.workers)) if i not in self._restarting.values() and i not in self._lost]
        running: dict[Any, tuple[str, int, Any, Any]] = {}

        def waiting() -> list[str]:
            return [c for c in clients if states[c] is ClientState.WAITING]

        def give_up(client: str, state: ClientState, cause: str = "") -> None:
            states[client] = state
            reason = after_client(state, client, WORKER_ATTEMPTS, cause).reason
            outcomes[client] = Outcome(client, Failure(client, reason, ""))

        while not all(state.terminal for state in states.values()):
            for client in waiting():
                index = (
                    self._owner[client]
                    if client in self._owner
                    else next((i for i in idle if self._may(i, client)), None)
                )
                if index in self._lost:
                    give_up(client, ClientState.WORKER_DIED, "it could not be restarted")
                if index not in idle:
                    continue
                idle.remove(index)
                attempts[client] += 1
                states[client] = ClientState.TRAINING
                update, kept, report = call(self.workers[index], client)
                running[report] = (client, index, update, kept)
            pending = [*running, *self._restarting]
            if not pending:
                for client in waiting():
                    give_up(client, ClientState.WORKER_DIED, "no worker is left")
                continue
            left = None if ends is None else max(0.0, ends - time.monotonic())
            ready, _ = ray.wait(pending, num_returns=1, timeout=left)
            if not ready:
                for client, index, _, _ in running.values():
                    give_up(client, ClientState.LATE)
                    ray.kill(self.workers[index], no_restart=False)  # what it computes will not be used
                    self._await_restart(index)
                for client in waiting():
                    give_up(client, ClientState.LATE)
                break
            for reference in ready:
                if reference in self._restarting:
                    index = self._restarting.pop(reference)
                    (idle.append if self._restarted(reference) else self._lost.add)(index)
                    continue
                client, index, update, kept = running.pop(reference)
                states[client], outcome = self._finish(reference, client, update, kept, attempts[client])
                if states[client] in (ClientState.WAITING, ClientState.WORKER_DIED):
                    self._await_restart(index)
                else:
                    idle.append(index)
                if outcome is not None:
                    outcomes[client] = outcome
                    progress(client)
        return [outcomes[client] for client in clients]

    def _await_restart(self, index: int) -> None:
        # Ray refuses calls to an actor that is restarting unless they may be retried.
        self._restarting[self.workers[index].ready.options(max_task_retries=-1).remote()] = index

    @staticmethod
    def _restarted(reference: Any) -> bool:
        try:
            return ray.get(reference)
        except RayActorError:
            return False

    def _finish(self, reference, client: str, update, kept, attempt: int) -> tuple[ClientState, Outcome | None]:
        """The client's next state, and its outcome unless it is to be repeated."""
        try:
            report = ray.get(reference)
        except (RayActorError, RayTaskError) as error:  # the second: the broadcast could not be fetched
            cause = _one_line(error)
        else:
            if isinstance(report, Failure):
                return ClientState.RAISED, Outcome(client, report)
            return ClientState.REPORTED, Outcome(client, report, update, kept)
        decision = after_client(ClientState.WORKER_DIED, client, attempt, cause)
        if decision.action is Action.REPEAT:
            return ClientState.WAITING, None
        return ClientState.WORKER_DIED, Outcome(client, Failure(client, decision.reason, cause))

    def fetch(self, update: Any) -> Packet:
        return ray.get(update) if isinstance(update, ray.ObjectRef) else update

    def evaluate(self, handle: Published, part: str, client: str | None, kept: Any = None) -> tuple[list[dict], float]:
        """Shared by all workers; a pure function, so it is simply asked again when a worker dies over it."""
        for _ in range(WORKER_ATTEMPTS):
            for reference in list(self._restarting):
                index = self._restarting.pop(reference)
                if not self._restarted(reference):
                    self._lost.add(index)
            usable = [i for i in range(len(self.workers)) if i not in self._lost and self._may(i, client)]
            shares = {
                i: self.workers[i].evaluate.remote(
                    part, client, (turn, len(usable)), handle.header, handle.packet, handle.increments, kept
                )
                for turn, i in enumerate(usable)
            }
            results = []
            for i, share in shares.items():
                try:
                    results.append(ray.get(share))
                except RayActorError:
                    self._await_restart(i)
            if usable and len(results) == len(usable):
                return evaluate_shares(results), max(lost for _, lost in results)
        raise RoundError(f"the evaluation failed: workers died over it {WORKER_ATTEMPTS} times")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).split(" class_name:")[0][:200]


@ray.remote(num_cpus=0, max_concurrency=2)
class CoordinatorActor:
    """A `Coordinator` that can be asked how far its round is while it runs."""

    def __init__(
        self,
        config: Config,
        folder: str,
        facts: tuple,
        workers: Sequence[Any],
        order: Sequence[str],
        homes: Sequence[Home] = (),
    ):
        self._done: list[str] = []
        log_lines(Path(folder).name, "coordinator")
        self._coordinator = Coordinator(config, folder, facts, RayPool(workers, order, self._done.append, homes))

    def rounds_done(self) -> int:
        return self._coordinator.rounds_done

    def records(self) -> list[dict]:
        return self._coordinator.records

    def evaluate_start(self) -> dict | FedrayError:
        """Record 0, or an error meant for a person, as a value."""
        try:
            return self._coordinator.evaluate_start()
        except FedrayError as error:
            return error

    def finish(self) -> None:
        """See `Coordinator.finish`."""
        self._coordinator.finish()

    def run_round(self) -> dict | FedrayError | None:
        """The round's record, None where privacy ends the run; an error meant for a person comes back as a value, free of remote tracebacks."""
        self._done.clear()
        try:
            record = self._coordinator.run_round()
        except FedrayError as error:
            event("round failed", logging.ERROR, round=self._coordinator.rounds_done + 1, cause=str(error))
            return error
        if record is not None:
            told = ("bytes_up", "bytes_down", "exactness", "aggregation_error", "metrics", "seconds")
            # With privacy.unit client who took part, and how many, is a secret that epsilon rests on.
            counts = (
                {"clients": len(record["cohort"]), "dropped": len(record["dropped"])}
                if record["cohort"] is not None
                else {}
            )
            event("round done", round=record["round"], **counts, **{k: record[k] for k in told})
        return record

    def progress(self) -> list[str]:
        """Clients that are done in the round that runs."""
        return list(self._done)
