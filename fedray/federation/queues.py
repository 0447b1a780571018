"""Which clients wait for a worker, and how many of them one task takes: longest first, short ones together.

A task costs milliseconds around a client's work, whatever it is: calls, objects, the driver's turn. Clients that were
quicker than that share one. Nothing of a result follows from either.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

#: So long a task of several clients is at most, by what they took before: a lost worker costs no more of others' work.
TASK_SECONDS = 0.25
#: Of so many of the last clients the median stands for those that were never seen; of fewer it says nothing.
RECENT, ENOUGH = 15, 3


class Speeds:
    """How long each client's work took last, as the coordinator saw it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._recent: deque[float] = deque(maxlen=RECENT)

    def saw(self, clients: Sequence[str], seconds: float, shares: Sequence[Any]) -> None:
        """A task of these clients took so long; `shares`: what each says of it, in any unit, 0 where it says
        nothing."""
        told = sum(shares) if all(isinstance(s, float) and 0 < s < math.inf for s in shares) else 0.0
        for client, share in zip(clients, shares, strict=True):
            self._seconds[client] = seconds * share / told if told else seconds / len(clients)
            self._recent.append(self._seconds[client])

    def of(self, client: str) -> float | None:
        """Seconds that its work will take; None where too little is known."""
        if client in self._seconds:
            return self._seconds[client]
        return statistics.median(self._recent) if len(self._recent) >= ENOUGH else None

    def longest_first(self, clients: Iterable[str]) -> list[str]:
        """Those that were never seen before all others: they may be the longest."""
        return sorted(clients, key=lambda client: -self._seconds.get(client, float("inf")))


class Queue:
    """Clients that wait for one of the same `workers` (a number); `together`: so many of them train at once."""

    def __init__(self, clients: Iterable[str], workers: int, speeds: Speeds, together: int = 1):
        self._waiting, self._workers, self._speeds = deque(speeds.longest_first(clients)), workers, speeds
        self._together = together
        self._alone: set[str] = set()

    def put_back(self, client: str) -> None:
        """To be tried again, by itself: it may be what ended the task."""
        self._alone.add(client)
        self._waiting.appendleft(client)

    def take(self) -> list[str]:
        """The clients of the next task: one, or as many as fit in its time and leave as much for every worker; none
        where none waits."""
        if not self._waiting:
            return []
        most = max(len(self._waiting) // (2 * self._workers), min(self._together, len(self._waiting)))
        taken: list[str] = []
        seconds = 0.0
        while not taken or (len(taken) < most and not self._alone & {taken[-1], self._waiting[0]}):
            known = self._speeds.of(self._waiting[0])
            seconds += TASK_SECONDS if known is None else known
            if len(taken) >= self._together and seconds > TASK_SECONDS:
                break
            taken.append(self._waiting.popleft())
        return taken

    def empty(self) -> list[str]:
        """Everyone who waits, who does so no longer."""
        left = [*self._waiting]
        self._waiting.clear()
        return left
