"""Rounds that wait for nobody in particular (FedBuff: Nguyen et al., AISTATS 2022, arXiv 2106.06639).

Clients train all the time; as soon as `federation.buffer` of them (K) have arrived, the server takes a step:

    w_{t+1} = w_t + sum_i  p_i s(t - v_i) (u_i - w_{v_i}),      s(d) = 1 / sqrt(1 + d)

where client i started from version v_i and sent u_i; the p_i sum to 1 (the paper's are 1/K, as `method.weights equal`).
`BufferedPool` gives w_t + s (u_i - w_{v_i}) for an update, and the method takes the mean as ever. Who has arrived
starts again from the next version, so nobody trains from a version twice.

Which updates arrive for which step depends on the machines. It is in `rounds.jsonl` (`arrivals`: client and version),
and a run with `federation.replay` takes the same steps from there, on any engine, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedray.errors import ConfigError, RoundError
from fedray.federation.messages import Orders, Outcome
from fedray.federation.pool_around import PoolAround
from fedray.federation.starts import Starts
from fedray.federation.wire import Message, Packet

if TYPE_CHECKING:
    from fedray.config.sections import Config
    from fedray.federation.channels.base import Pool


def staleness_weight(versions: int) -> float:
    """What an update counts that started so many versions ago."""
    return float((1 + versions) ** -0.5)


@dataclass(frozen=True)
class Arrival:
    """A client's outcome, and the version that it started from."""

    outcome: Outcome
    version: int


class Arrivals(Protocol):
    """Where outcomes come from."""

    def begin(self, version: int, handle: Any, clients: Sequence[str], orders: Mapping[str, Orders]) -> None:
        """These clients are free: they start from this broadcast, or from a later one where no worker is free yet."""

    def next(self) -> Arrival | None:
        """The next to arrive; None where nobody is on the way."""

    def versions(self) -> set[int]:
        """The versions that somebody who is on the way started from, or may have."""


class Replayed:
    """What arrived in a run that is over, worked out again from the same versions."""

    def __init__(self, pool: Pool, log: Sequence[Sequence[tuple[str, int]]]):
        self._pool, self._log = pool, log
        self._handles: dict[int, Any] = {}
        self._orders: Mapping[str, Orders] = {}
        self._left: list[tuple[str, int]] = []

    def begin(self, version: int, handle: Any, clients: Sequence[str], orders: Mapping[str, Orders]) -> None:
        if version not in self._handles:
            self._left = list(self._log[version]) if version < len(self._log) else []
        self._handles[version] = handle
        self._orders = {**self._orders, **orders}
        needed = self.versions()
        self._handles = {v: h for v, h in self._handles.items() if v in needed}

    def next(self) -> Arrival | None:
        if not self._left:
            return None
        client, version = self._left.pop(0)
        if version not in self._handles:
            raise RoundError(
                "a replay begins at the first round: it cannot go on from a checkpoint; start it again in another "
                "output.dir"
            )
        orders = {client: self._orders[client]}
        (outcome,) = self._pool.train(self._handles[version], version, [client], {}, None, orders)
        return Arrival(outcome, version)

    def versions(self) -> set[int]:
        now = max(self._handles, default=0)
        return {now, *(v for step in self._log[now:] for _, v in step)}


@dataclass(frozen=True)
class _Stale:
    """The handle of an update that started from a version."""

    client: str
    version: int
    handle: Any


class BufferedPool(PoolAround):
    """A pool that gives the first `size` outcomes that arrive, whenever their clients started."""

    def __init__(self, pool: Pool, arrivals: Arrivals, size: int, clients: int, starts: Starts):
        super().__init__(pool)
        self._arrivals, self._size, self._clients = arrivals, size, clients
        self._starts_of = starts
        self._starts: dict[int, Packet] = {}
        self._version = 0
        self._trained = -1  # the version that a round last trained from
        self._on_the_way: set[str] = set()
        self._begun: set[str] = set()  # in this round
        self.arrived: list[tuple[str, int]] = []

    def publish(self, message: Message) -> Any:
        self._version = message.header.round
        self._starts_of.publish(message)
        needed = {self._version, *(self._arrivals.versions() if self._starts else ())}
        self._starts = {v: p for v, p in self._starts.items() if v in needed}
        self._starts[self._version] = self._starts_of.of("")
        return self._pool.publish(message)

    def train(
        self,
        handle: Any,
        round: int,
        clients: Sequence[str],
        kept: Mapping[str, Any],
        deadline: float | None,
        orders: Mapping[str, Orders],
    ) -> list[Outcome]:
        """Those of `clients` that are free start from here. Returned are as many as are missing in the buffer, of
        which those that are not among `clients` have been added to it; or fewer, where nobody else is on the way."""
        if self._trained != self._version:
            self._trained, self.arrived, self._begun = self._version, [], set()
        free = [client for client in clients if client not in self._on_the_way | self._begun]
        self._arrivals.begin(self._version, handle, free, orders)
        self._on_the_way.update(free)
        self._begun.update(free)
        missing, outcomes = self._size - (self._clients - len(clients)), list[Outcome]()
        while sum(not o.failed for o in outcomes) < missing and (arrival := self._arrivals.next()) is not None:
            outcome = arrival.outcome
            self._on_the_way.discard(outcome.client)
            if not outcome.failed:
                self.arrived.append((outcome.client, arrival.version))
                outcome = replace(outcome, update=_Stale(outcome.client, arrival.version, outcome.update))
            outcomes.append(outcome)
        return outcomes

    def fetch(self, update: Any) -> Any:
        """Numbers as if the client had moved from the newest version, by as much as its change counts."""
        if not isinstance(update, _Stale):
            return self._pool.fetch(update)
        sent: Any = self._pool.fetch(update.handle)
        start, now = self._starts[update.version], self._starts[self._version]
        if update.version == self._version or type(sent) is not Packet or sent.manifest != start.manifest:
            return sent  # as it came: what is no update is judged by who asks for it
        if type(sent.vector) is not np.ndarray or sent.vector.shape != start.vector.shape:
            return sent
        counts = np.float32(staleness_weight(self._version - update.version))
        return Packet(sent.manifest, now.vector + counts * (sent.vector - start.vector))


def buffering(pool: Pool, config: Config, clients: int, starts: Starts) -> Pool:
    """The pool, or where the config asks for a buffer, one around it. `pool.stream` gives what arrives."""
    section = config.federation
    if section.buffer is None:
        return pool
    arrivals = pool.stream() if section.replay is None else Replayed(pool, read_log(section.replay))
    return BufferedPool(pool, arrivals, section.buffer, clients, starts)


def read_log(folder: str) -> list[list[tuple[str, int]]]:
    """The arrivals of each round of a run. Raises ConfigError where there are none."""
    file = Path(folder) / "rounds.jsonl"
    if not file.is_file():
        raise ConfigError(f"federation.replay '{folder}' has no rounds.jsonl: give the directory of a run")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    if not all("arrivals" in record for record in records):
        raise ConfigError(f"federation.replay '{folder}' is of a run without federation.buffer: there is no log")
    return [[(client, version) for client, version in record["arrivals"]] for record in records]
