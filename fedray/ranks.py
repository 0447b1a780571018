"""The ranks of one client: processes that take its steps together, each over its part of every batch.

All of them do the same calls in the same order. What is said here of tensors and values is the same on every rank
afterwards; the model itself is DeepSpeed's. A client of one rank has `ALONE`, which costs nothing.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
Batch = dict[str, Any]
Loss = Callable[[Callable, dict], Tensor]

#: How a part of a batch says what its loss counts; no model is given it.
SHARE = "share"
#: A rank that others wait for longer than this is taken for lost.
TIMEOUT = timedelta(minutes=10)


class FirstRankError(RuntimeError):
    """On the other ranks: the first one failed in what it makes for all."""


class Ranks(Protocol):
    """What a client's steps need of its ranks. `rank`: this one's number, from 0; `world`: how many there are."""

    rank: int
    world: int

    def part_of_mean(self, batch: Batch, counted: Callable[[Batch], int]) -> Batch:
        """This rank's rows of a batch, for a loss that is a mean over `counted` of them: the mean over the ranks of
        the `weighed` losses is the loss of the whole batch."""

    def part_of_sum(self, batch: Batch) -> Batch:
        """This rank's rows of a batch, for losses that stand for themselves: those of a rank that has none are 0."""

    def weighed(self, loss: Loss) -> Loss:
        """The loss of a part."""

    def mean(self, value: float) -> float:
        """The mean over the ranks."""

    def sum(self, total: Tensor) -> Tensor:
        """The sum over the ranks of an fp64 tensor on the CPU; may be done in place."""

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes; no other makes it. Raises what `make` raises on the first, FirstRankError on
        the others."""

    def dealt(self, items: Sequence[T]) -> tuple[list[T], int]:
        """What this rank takes of the items, as many on each: so many of them are its own, the rest are there because
        all must do the same."""


class _Alone:
    """One rank."""

    rank, world = 0, 1

    def part_of_mean(self, batch: Batch, counted: Callable[[Batch], int]) -> Batch:
        return batch

    def part_of_sum(self, batch: Batch) -> Batch:
        return batch

    def weighed(self, loss: Loss) -> Loss:
        return loss

    def mean(self, value: float) -> float:
        return value

    def sum(self, total: Tensor) -> Tensor:
        return total

    def from_first(self, make: Callable[[], T]) -> T:
        return make()

    def dealt(self, items: Sequence[T]) -> tuple[list[T], int]:
        return list(items), len(items)


ALONE: Ranks = _Alone()


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a group find each other: a store that the first rank serves."""

    host: str
    port: int


def open_meeting(host: str, world: int) -> tuple[Meeting, distributed.TCPStore]:
    """The first rank's own store, at a free port of that address and of no other; it lives as long as somebody holds
    it."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.bind((host, 0))
    listening.listen()
    port = listening.getsockname()[1]
    store = distributed.TCPStore(
        host,
        port,
        world,
        is_master=True,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return Meeting(host, port), store


def _keep_to_loopback(host: str) -> None:
    """Ranks that meet on this machine alone talk on it alone: gloo would take the address of its name."""
    if ipaddress.ip_address(host).is_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


class Group:
    """One rank of several, as a process group: NCCL between GPUs, gloo between CPUs, and gloo for all that is said
    here."""

    def __init__(self, rank: int, world: int, device: str, meeting: Meeting, store: distributed.Store | None = None):
        self.rank, self.world = rank, world
        _keep_to_loopback(meeting.host)
        if store is None:
            store = distributed.TCPStore(meeting.host, meeting.port, world, timeout=TIMEOUT)
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        self._said = distributed.group.WORLD if backend == "gloo" else distributed.new_group(backend="gloo")

    def part_of_mean(self, batch: Batch, counted: Callable[[Batch], int]) -> Batch:
        part = self._rows(batch)
        own = counted(part) if self.rank < _rows_of(batch) else 0
        return part | {SHARE: self.world * own / max(1, counted(batch))}

    def part_of_sum(self, batch: Batch) -> Batch:
        return self._rows(batch) | {SHARE: float(self.rank < _rows_of(batch))}

    def _rows(self, batch: Batch) -> Batch:
        """Every `world`-th row; where there is none for this rank, one that will not count."""
        first = min(self.rank, _rows_of(batch) - 1)
        return {name: tensor[first :: self.world] for name, tensor in batch.items()}

    def weighed(self, loss: Loss) -> Loss:
        def of_part(forward: Callable, batch: dict) -> Tensor:
            return loss(forward, {k: v for k, v in batch.items() if k != SHARE}) * batch[SHARE]

        return of_part

    def mean(self, value: float) -> float:
        return self.sum(torch.tensor(value, dtype=torch.float64)).item() / self.world

    def sum(self, total: Tensor) -> Tensor:
        distributed.all_reduce(total, group=self._said)
        return total

    def from_first(self, make: Callable[[], T]) -> T:
        made: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                made[0] = make()
            except Exception as raised:  # noqa: BLE001 - whatever it is, the others wait for an answer
                error, made[1] = raised, f"{type(raised).__name__} on the first rank"
        distributed.broadcast_object_list(made, src=0, group=self._said)
        if made[1] is not None:
            raise error or FirstRankError(made[1])
        value: T = made[0]
        return value

    def dealt(self, items: Sequence[T]) -> tuple[list[T], int]:
        own = list(items[self.rank :: self.world])
        turns = -(-len(items) // self.world)
        return own + list(items[: turns - len(own)]), len(own)


def _rows_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))
