"""Work for each of some clients, handed to Ray's workers as they come free: repeats, deadlines, restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fedray.errors import LostError
from fedray.federation.failures import WORKER_ATTEMPTS, Action, ClientState, after_client
from fedray.federation.messages import PUBLIC, Failure, Outcome, Trained
from fedray.federation.placement import Seat
from fedray.federation.queues import Queue, Speeds

#: Starts clients' work on a worker as one task: references to their updates, to what each of them keeps, and to their
#: reports.
Call = Callable[[Any, Sequence[str]], Sequence[Any]]


class Workers:
    """The worker actors, which of them are restarting or lost, and whom each may serve.

    `order`: all clients; where there is a worker for each, each has its own. `homes`: whom each worker may serve;
    empty: anyone.
    """

    def __init__(self, actors: Sequence[Any], order: Sequence[str], homes: Sequence[Seat] = ()):
        self.actors = list(actors)
        self._serves = [home.clients for home in homes] or [tuple(order)] * len(self.actors)
        self._owner = self._owners(order)
        self.restarting: dict[Any, int] = {}  # reference that resolves when a worker is back -> its index
        self.lost: set[int] = set()  # workers that cannot be restarted
        self.held: dict[int, float] = {}  # by training that goes on from round to round, and since when

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

    def serving(self, client: str) -> tuple[int, ...]:
        """The workers that do a client's work: its own, or all that may serve it."""
        if client in self._owner:
            return (self._owner[client],)
        return tuple(i for i in range(len(self.actors)) if self.may(i, client))

    def ready(self) -> list[int]:
        """Those that are neither restarting nor lost."""
        return [i for i in range(len(self.actors)) if i not in self.restarting.values() and i not in self.lost]

    def unhurried(self, usable: Sequence[int]) -> list[int]:
        """Of these workers, who does not train from round to round; or else who has done so for longest."""
        free = [i for i in usable if i not in self.held]
        return free or sorted(usable, key=lambda i: self.held[i])[:1]

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
        except (RayActorError, RayTaskError):
            self.lost.add(index)
            return None
        return index


@dataclass(frozen=True)
class Part:
    """One client's update among those that a task of `of` clients gives as one object: a handle for `Pool.fetch`."""

    task: Any
    index: int
    of: int


@dataclass(frozen=True)
class _Task:
    """Clients' work on a worker."""

    clients: tuple[str, ...]
    index: int
    updates: Any
    kept: tuple[Any, ...]
    began: float


class Dispatch:
    """All clients at once, as far as workers go; who waits is taken by the first worker that is free. `progress` is
    told of each client that is done; after `deadline` seconds who is not is late. `speeds`: of such work so far;
    `together`: how many clients a worker takes at once.

    Linear in the clients, times the workers: there are as many queues as sets of workers that serve some client.
    """

    def __init__(
        self,
        workers: Workers,
        clients: Sequence[str],
        call: Call,
        deadline: float | None,
        progress: Callable[[str], None],
        speeds: Speeds,
        together: int = 1,
    ):
        self._workers, self._clients, self._call, self._progress = workers, list(clients), call, progress
        self._ends = time.monotonic() + deadline if deadline is not None else None
        self._speeds, self._together = speeds, together
        self._serving = {client: workers.serving(client) for client in clients}
        self._queues = self._queued()
        self._queues_of: dict[int, list[Queue]] = {}
        for serving, queue in self._queues.items():
            for index in serving:
                self._queues_of.setdefault(index, []).append(queue)
        self._attempts = dict.fromkeys(clients, 0)
        self._outcomes: dict[str, Outcome] = {}
        self._idle = workers.ready()
        self._running: dict[Any, _Task] = {}

    def _queued(self) -> dict[tuple[int, ...], Queue]:
        """The clients by the workers that serve them."""
        waiting: dict[tuple[int, ...], list[str]] = {}
        for client in self._clients:
            waiting.setdefault(self._serving[client], []).append(client)
        return {
            workers: Queue(members, len(workers), self._speeds, self._together) for workers, members in waiting.items()
        }

    def run(self) -> list[Outcome]:
        """The outcomes, in the order of the clients."""
        while len(self._outcomes) < len(self._clients):
            self._hand_out()
            pending = [*self._running, *self._workers.restarting]
            if not pending:
                self._give_up_waiting(ClientState.WORKER_DIED, "no worker is left")
                continue
            left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
            ready, _ = ray.wait(pending, num_returns=1, timeout=left)
            for reference in ready:
                self._take(reference)
            if not ready:
                self._out_of_time()
        return [self._outcomes[client] for client in self._clients]

    def _hand_out(self) -> None:
        """Work for every worker that is idle and may serve one of those who wait."""
        for serving, queue in self._queues.items() if self._workers.lost else ():
            if self._workers.lost.issuperset(serving):
                for client in queue.empty():
                    self._give_up(client, ClientState.WORKER_DIED, "it could not be restarted")
        idle, self._idle = self._idle, []
        for index in idle:
            clients = next(filter(None, (queue.take() for queue in self._queues_of.get(index, []))), None)
            if clients is None:
                self._idle.append(index)
            else:
                self._start(index, clients)

    def _start(self, index: int, clients: Sequence[str]) -> None:
        for client in clients:
            self._attempts[client] += 1
        updates, *kept, reports = self._call(self._workers.actors[index], clients)
        self._running[reports] = _Task(tuple(clients), index, updates, tuple(kept), time.monotonic())

    def _take(self, reference: Any) -> None:
        """Something is ready: a worker that restarted, or a task's reports."""
        if reference in self._workers.restarting:
            if (index := self._workers.restarted(reference)) is not None:
                self._idle.append(index)
            return
        task = self._running.pop(reference)
        try:
            reports = results_of(len(task.clients), ray.get(reference))
        except (RayActorError, RayTaskError, LostError) as error:  # the second: the broadcast could not be fetched
            self._workers.await_restart(task.index)
            self._died(task, one_line(error))
            return
        self._idle.append(task.index)
        seconds = [report.seconds if isinstance(report, Trained) else 0.0 for report in reports]
        self._speeds.saw(task.clients, time.monotonic() - task.began, seconds)
        for i, (client, report) in enumerate(zip(task.clients, reports, strict=True)):
            handles = (
                (None, None) if isinstance(report, Failure) else (Part(task.updates, i, len(reports)), task.kept[i])
            )
            self._end(Outcome(client, report, *handles))

    def _died(self, task: _Task, cause: str) -> None:
        """A worker died over these clients: one of them may be why, and each is tried again by itself."""
        for client in task.clients:
            decision = after_client(ClientState.WORKER_DIED, client, self._attempts[client], cause)
            if decision.action is Action.REPEAT:
                self._queues[self._serving[client]].put_back(client)
            else:
                self._end(Outcome(client, Failure(client, decision.reason, cause)))

    def _out_of_time(self) -> None:
        """The deadline has passed: whoever is not done is late, and what workers compute will not be used."""
        for task in self._running.values():
            self._workers.stop(task.index)
            for client in task.clients:
                self._give_up(client, ClientState.LATE)
        self._give_up_waiting(ClientState.LATE)

    def _give_up_waiting(self, state: ClientState, cause: str = "") -> None:
        for client in (c for queue in self._queues.values() for c in queue.empty()):
            self._give_up(client, state, cause)

    def _give_up(self, client: str, state: ClientState, cause: str = "") -> None:
        reason = after_client(state, client, WORKER_ATTEMPTS, cause).reason
        self._outcomes[client] = Outcome(client, Failure(client, reason, ""))

    def _end(self, outcome: Outcome) -> None:
        self._outcomes[outcome.client] = outcome
        self._progress(outcome.client)


def results_of(clients: int, given: Any) -> list[Any]:
    """What a task gave for so many clients. Raises LostError where it is not one for each."""
    if not isinstance(given, list) or len(given) != clients:
        raise LostError(f"its worker gave something else than {clients} results")
    return given


def one_line(error: Exception) -> str:
    """Ray's words without its details."""
    return " ".join(str(error).split()).split(" class_name:")[0][:200]
