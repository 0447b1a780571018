"""Training that goes on from round to round: each client as a worker comes free, from the newest broadcast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from fedray.errors import LostError
from fedray.federation.buffered import Arrival
from fedray.federation.dispatch import Part, Workers, one_line, results_of
from fedray.federation.failures import Action, ClientState, after_client
from fedray.federation.messages import Failure, Orders, Outcome

#: Starts a client's training on a worker, from a broadcast of a version: as `dispatch.Call`.
Train = Callable[[Any, Any, int, str, Orders], Sequence[Any]]


@dataclass(frozen=True)
class _Job:
    """A client's training. `start`: the version and the broadcast, once it has begun."""

    client: str
    orders: Orders
    attempt: int = 1
    start: tuple[int, Any] | None = None


class Stream:
    """`Arrivals` of Ray's workers. Linear in the clients, times the sets of workers that serve some of them."""

    def __init__(self, workers: Workers, train: Train, progress: Callable[[str], None]):
        self._workers, self._train, self._progress = workers, train, progress
        self._waiting: dict[tuple[int, ...], deque[_Job]] = {}
        self._running: dict[Any, tuple[_Job, int, Any]] = {}
        self._given_up: deque[Arrival] = deque()
        self._newest: tuple[int, Any] = (0, None)

    def begin(self, version: int, handle: Any, clients: Sequence[str], orders: Mapping[str, Orders]) -> None:
        self._newest = (version, handle)
        for client in clients:
            self._waiting.setdefault(self._workers.serving(client), deque()).append(_Job(client, orders[client]))

    def versions(self) -> set[int]:
        jobs = [*(job for job, *_ in self._running.values()), *(job for jobs in self._waiting.values() for job in jobs)]
        return {self._newest[0], *(job.start[0] for job in jobs if job.start is not None)}

    def next(self) -> Arrival | None:
        while True:
            self._hand_out()
            if self._given_up:
                return self._given_up.popleft()
            pending = [*self._running, *self._workers.restarting]
            if not pending:
                return None
            (reference,), _ = ray.wait(pending, num_returns=1)
            if reference in self._workers.restarting:
                self._workers.restarted(reference)
            elif (arrival := self._take(*self._running.pop(reference), reference)) is not None:
                self._progress(arrival.outcome.client)
                return arrival

    def _hand_out(self) -> None:
        """A client for every worker that is free."""
        busy = {index for _, index, _ in self._running.values()}
        free = [index for index in self._workers.ready() if index not in busy]
        for serving, jobs in self._waiting.items():
            if self._workers.lost.issuperset(serving):
                while jobs:
                    self._give_up(jobs.popleft(), "it could not be restarted")
            for index in (i for i in list(free) if i in serving):
                if jobs:
                    free.remove(index)
                    self._start(jobs.popleft(), index)

    def _start(self, job: _Job, index: int) -> None:
        job = replace(job, start=job.start or self._newest)
        assert job.start is not None
        version, handle = job.start
        updates, _, reports = self._train(self._workers.actors[index], handle, version, job.client, job.orders)
        self._running[reports] = (job, index, updates)
        self._workers.held[index] = time.monotonic()

    def _take(self, job: _Job, index: int, updates: Any, reference: Any) -> Arrival | None:
        """What a client's training came to; None where it begins again, from the same inputs."""
        assert job.start is not None
        self._workers.held.pop(index, None)
        try:
            (report,) = results_of(1, ray.get(reference))
        except (RayActorError, RayTaskError, LostError) as error:
            if index not in self._workers.restarting.values():
                self._workers.await_restart(index)
            decision = after_client(ClientState.WORKER_DIED, job.client, job.attempt, one_line(error))
            if decision.action is Action.REPEAT:
                queue = self._waiting.setdefault(self._workers.serving(job.client), deque())
                queue.appendleft(replace(job, attempt=job.attempt + 1))
                return None
            return Arrival(Outcome(job.client, Failure(job.client, decision.reason, "")), job.start[0])
        update = None if isinstance(report, Failure) else Part(updates, 0, 1)
        return Arrival(Outcome(job.client, report, update), job.start[0])

    def _give_up(self, job: _Job, cause: str) -> None:
        failure = Failure(job.client, f"the worker of client '{job.client}' died: {cause}", "")
        self._given_up.append(Arrival(Outcome(job.client, failure), self._newest[0]))
