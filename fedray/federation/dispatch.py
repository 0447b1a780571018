"""One piece of work for each of some clients, handed to Ray's workers as they come free: repeats, deadlines,
restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fedray.federation.failures import WORKER_ATTEMPTS, Action, ClientState, after_client
from fedray.federation.messages import PUBLIC, Failure, Outcome
from fedray.federation.placement import Home

#: Starts a client's work on a worker: references to its update, to what it keeps, and to its report.
Call = Callable[[Any, str], tuple[Any, Any, Any]]


class Workers:
    """The worker actors, which of them are restarting or lost, and whom each may serve.

    `order`: all clients; where there is a worker for each, each has its own. `homes`: whom each worker may serve;
    empty: anyone.
    """

    def __init__(self, actors: Sequence[Any], order: Sequence[str], homes: Sequence[Home] = ()):
        self.actors = list(actors)
        self._serves = [home.clients for home in homes] or [tuple(order)] * len(self.actors)
        self._owner = self._owners(order)
        self.restarting: dict[Any, int] = {}  # reference that resolves when a worker is back -> its index
        self.lost: set[int] = set()  # workers that cannot be restarted

    def _owners(self, order: Sequence[str]) -> dict[str, int]:
        """Each client's own worker; empty unless there is one for each."""
        owners: dict[str, int] = {}
        for client in order:
            free = (i for i, served in enumerate(self._serves) if client in served and i not in owners.values())
            if (index := next(free, None)) is None:
                return {}
            owners[client] = index
        return owners

    def may(self, index: int, client: str | None) -> bool:
        """Whether a worker may do a client's work; what belongs to no client, anyone may."""
        return client is None or client == PUBLIC or client in self._serves[index]

    def choose(self, client: str, idle: Sequence[int]) -> int | None:
        """The client's own worker, idle or not, or the first of the idle ones that may serve it."""
        if client in self._owner:
            return self._owner[client]
        return next((i for i in idle if self.may(i, client)), None)

    def ready(self) -> list[int]:
        """Those that are neither restarting nor lost."""
        return [i for i in range(len(self.actors)) if i not in self.restarting.values() and i not in self.lost]

    def stop(self, index: int) -> None:
        """End what a worker does; it restarts."""
        ray.kill(self.actors[index], no_restart=False)
        self.await_restart(index)

    def await_restart(self, index: int) -> None:
        """The worker died: it gets work again when its restart is done."""
        # Ray refuses calls to an actor that is restarting unless they may be retried.
        self.restarting[self.actors[index].ready.options(max_task_retries=-1).remote()] = index

    def restarted(self, reference: Any) -> int | None:
        """The worker that is back; None where its restart failed: it is lost."""
        index = self.restarting.pop(reference)
        try:
            ray.get(reference)
        except RayActorError:
            self.lost.add(index)
            return None
        return index


@dataclass(frozen=True)
class _Running:
    """A client's work on a worker."""

    client: str
    index: int
    update: Any
    kept: Any


class Dispatch:
    """All clients at once, as far as workers go; a client that waits takes the first worker that is free. `progress` is
    told of each client that is done; after `deadline` seconds who is not is late."""

    def __init__(
        self,
        workers: Workers,
        clients: Sequence[str],
        call: Call,
        deadline: float | None,
        progress: Callable[[str], None],
    ):
        self._workers, self._clients, self._call, self._progress = workers, list(clients), call, progress
        self._ends = time.monotonic() + deadline if deadline is not None else None
        self._states = dict.fromkeys(clients, ClientState.WAITING)
        self._attempts = dict.fromkeys(clients, 0)
        self._outcomes: dict[str, Outcome] = {}
        self._idle = workers.ready()
        self._running: dict[Any, _Running] = {}

    def run(self) -> list[Outcome]:
        """The outcomes, in the order of the clients."""
        while not all(state.terminal for state in self._states.values()):
            self._hand_out()
            pending = [*self._running, *self._workers.restarting]
            if not pending:
                for client in self._waiting():
                    self._give_up(client, ClientState.WORKER_DIED, "no worker is left")
                continue
            left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
            ready, _ = ray.wait(pending, num_returns=1, timeout=left)
            for reference in ready:
                self._take(reference)
            if not ready:
                self._out_of_time()
        return [self._outcomes[client] for client in self._clients]

    def _waiting(self) -> list[str]:
        return [c for c in self._clients if self._states[c] is ClientState.WAITING]

    def _hand_out(self) -> None:
        """Work for every worker that is idle and may serve one of those who wait."""
        for client in self._waiting():
            index = self._workers.choose(client, self._idle)
            if index in self._workers.lost:
                self._give_up(client, ClientState.WORKER_DIED, "it could not be restarted")
            if index is None or index not in self._idle:
                continue
            self._idle.remove(index)
            self._attempts[client] += 1
            self._states[client] = ClientState.TRAINING
            update, kept, report = self._call(self._workers.actors[index], client)
            self._running[report] = _Running(client, index, update, kept)

    def _take(self, reference: Any) -> None:
        """Something is ready: a worker that restarted, or a client's report."""
        if reference in self._workers.restarting:
            if (index := self._workers.restarted(reference)) is not None:
                self._idle.append(index)
            return
        work = self._running.pop(reference)
        state, outcome = self._finish(reference, work)
        self._states[work.client] = state
        if state in (ClientState.WAITING, ClientState.WORKER_DIED):
            self._workers.await_restart(work.index)
        else:
            self._idle.append(work.index)
        if outcome is not None:
            self._outcomes[work.client] = outcome
            self._progress(work.client)

    def _finish(self, reference: Any, work: _Running) -> tuple[ClientState, Outcome | None]:
        """The client's next state, and its outcome unless it is to be repeated."""
        client = work.client
        try:
            report = ray.get(reference)
        except (RayActorError, RayTaskError) as error:  # the second: the broadcast could not be fetched
            cause = one_line(error)
        else:
            if isinstance(report, Failure):
                return ClientState.RAISED, Outcome(client, report)
            return ClientState.REPORTED, Outcome(client, report, work.update, work.kept)
        decision = after_client(ClientState.WORKER_DIED, client, self._attempts[client], cause)
        if decision.action is Action.REPEAT:
            return ClientState.WAITING, None
        return ClientState.WORKER_DIED, Outcome(client, Failure(client, decision.reason, cause))

    def _out_of_time(self) -> None:
        """The deadline has passed: whoever is not done is late, and what workers compute will not be used."""
        for work in self._running.values():
            self._give_up(work.client, ClientState.LATE)
            self._workers.stop(work.index)
        for client in self._waiting():
            self._give_up(client, ClientState.LATE)

    def _give_up(self, client: str, state: ClientState, cause: str = "") -> None:
        self._states[client] = state
        reason = after_client(state, client, WORKER_ATTEMPTS, cause).reason
        self._outcomes[client] = Outcome(client, Failure(client, reason, ""))


def one_line(error: Exception) -> str:
    """Ray's words without its details."""
    return " ".join(str(error).split()).split(" class_name:")[0][:200]
