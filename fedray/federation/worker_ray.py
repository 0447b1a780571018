"""The Ray engine's workers: actors in one placement group. Apart from `pool_ray.py`, so that only they import a
model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.config.sections import Config
from fedray.errors import FedrayError
from fedray.federation.channels import fixed_masks
from fedray.federation.channels.registry import quotes_errors
from fedray.federation.crew_ray import RayCrew
from fedray.federation.logs import event, log_lines
from fedray.federation.messages import Answered, Failure, Orders, Trained
from fedray.federation.placement import Placement, said
from fedray.federation.questions import Question
from fedray.federation.wire import Header, Packet
from fedray.federation.worker import Work, Worker

#: How long a cluster that has the resources may take to grant them.
GRANT_SECONDS = 120.0


@ray.remote
class WorkerActor:
    """A `Worker` with its references resolved: increments are fetched only when this worker lacks them. `ranks`: the
    bundles of its placement group in which it makes its other ranks."""

    def __init__(
        self,
        make_worker: type[Worker],
        config: Config,
        device: str,
        threads: int,
        reads: Sequence[str] = (),
        ranks: Sequence[int] = (),
    ):
        assert config.output.dir is not None, "a run that has begun knows its directory"
        log_lines(Path(config.output.dir).name, "worker")
        self._flaw: Exception | None = None
        # DeepSpeed's own word for it: logical GPUs in tests, and machines whose GPUs are not to be touched.
        device = "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else device
        try:
            crew = RayCrew(config, device, threads, reads, ranks) if ranks else None
            self.worker = make_worker(config, device, threads, reads=reads, crew=crew)
            if crew is not None:
                crew.wait()
        except Exception as error:  # noqa: BLE001 - `ready` raises it
            # Readers quote what they cannot read, and this error goes to the driver, another party's machine.
            hidden = FedrayError(
                f"the data of {', '.join(reads)} could not be loaded ({type(error).__name__}); read them with the same "
                "config on their own machine to see why"
            )
            self._flaw = error if not config.siloed or quotes_errors(config) else hidden
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise self._flaw from None
            event("the worker could not start again", logging.ERROR, cause=str(self._flaw))

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        return self.worker.describe()

    def masks_are_fixed(self) -> bool:
        """Whether its clients' keys are those of a test."""
        return fixed_masks.fixed_here()

    def ready(self) -> bool:
        """Answers when the actor is up, after a restart too. Raises what kept it from starting again: an actor whose
        restart raises is neither alive nor dead to Ray (2.60), and who asks it waits for ever."""
        if self._flaw is not None:
            raise self._flaw
        return True

    def train(
        self, work: Sequence[tuple[str, Any, Any, Orders]], round: int, header: Header, increments: dict[int, Any]
    ) -> tuple[Any, ...]:
        """As a task's objects: the updates, what each client keeps, and the reports. `work`: client, packet of the
        broadcast, what it kept, and its orders."""
        resolve = _Resolved()
        here = (  # as it is asked for: what the clients kept is in memory for few at a time
            Work(client, resolve(packet), resolve(kept, once=True), orders) for client, packet, kept, orders in work
        )
        done = list(self.worker.train_all(round, header, lambda version: resolve(increments[version]), here))
        for one, (_, _, report) in zip(work, done, strict=True):
            self._log("trained", report, one[0], round=round + 1)
        return _as_objects(done)

    def ask(self, work: Sequence[tuple[str, Any, Any]]) -> tuple[Any, ...]:
        """As `train`. `work`: client, question, and what it kept."""
        resolve, done = _Resolved(), []
        for client, question, kept in work:
            asked: Question = resolve(question)
            done.append(self.worker.ask(client, asked, resolve(kept, once=True)))
            self._log("answered", done[-1][2], client, question=asked.name.lower())
        return _as_objects(done)

    def _log(self, name: str, report: Trained | Answered | Failure, client: str, **fields: Any) -> None:
        if not self.worker.side.logs_clients:
            return
        if isinstance(report, Failure):
            event(f"{name} not", logging.WARNING, client=client, cause=report.cause, **fields)
        else:
            seconds = report.seconds or None if isinstance(report, Trained) else None
            event(name, client=client, seconds=seconds, **fields)

    def evaluate(
        self,
        part: str,
        client: str | None,
        share: tuple[int, int],
        header: Header,
        packet: Packet,
        increments: dict[int, Any],
        kept: Packet | None,
    ) -> tuple[list[list[dict[str, Any]]], float]:
        return self.worker.evaluate(part, client, share, header, packet, lambda v: ray.get(increments[v]), kept)


class _Resolved:
    """What references stand for; what several clients of a task share is fetched once."""

    def __init__(self) -> None:
        self._held: dict[Any, Any] = {}

    def __call__(self, handle: Any, once: bool = False) -> Any:
        """`once`: nobody else asks for it."""
        if not isinstance(handle, ray.ObjectRef):
            return handle
        if once:
            return ray.get(handle)
        if handle not in self._held:
            self._held[handle] = ray.get(handle)
        return self._held[handle]


def _as_objects(done: Sequence[tuple[Any, Packet | None, Any]]) -> tuple[Any, ...]:
    """One for all updates, which are read one after the other, one for what each client keeps, which may last, and one
    for the reports."""
    updates, kept, reports = zip(*done, strict=True)
    return list(updates), *kept, list(reports)


def start_workers(
    config: Config, placement: Placement, given: PlacementGroup | None = None
) -> tuple[PlacementGroup, list[Any]]:
    """The worker actors, the first rank of each in a bundle of a placement group (default: a new one), on nodes with
    its seat's labels; the other ranks, which it makes itself, have the bundles after it.

    Raises FedrayError when the cluster does not grant it in time.
    """
    group = given or _granted(placement, config.worker.wait or GRANT_SECONDS)
    seats = placement.seats
    # A trial of a sweep may have a bundle of its own before them.
    first = len(group.bundle_specs) - sum(seat.ranks for seat in seats)
    workers = []
    for seat in seats:
        bundles = range(first, first + seat.ranks)
        first += seat.ranks
        workers.append(
            WorkerActor.options(  # type: ignore[attr-defined]  # mypy does not see what Ray's decorator makes of it
                num_cpus=placement.cpus,
                num_gpus=seat.gpus,
                max_restarts=-1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundles[0]),
            ).remote(Worker, seat.config_of(config), seat.device, placement.cpus, seat.clients, list(bundles[1:]))
        )
    return group, workers


def _granted(placement: Placement, timeout: float) -> PlacementGroup:
    """A new placement group with a bundle for each rank of each worker. Raises FedrayError when the cluster does not
    grant it within so many seconds."""
    ranks = [seat for seat in placement.seats for _ in range(seat.ranks)]
    bundles = [{"CPU": placement.cpus} | ({"GPU": seat.gpus} if seat.gpus else {}) for seat in ranks]
    labels = [dict(seat.labels) for seat in ranks]
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=labels if any(labels) else None)
    if group.wait(timeout):
        return group
    remove_placement_group(group)
    each = [f"{bundles.count(bundle)} x {bundle}" for i, bundle in enumerate(bundles) if bundle not in bundles[:i]]
    where = f" on nodes with {'; '.join(sorted({said(seat.labels) for seat in ranks}))}" if any(labels) else ""
    raise FedrayError(
        f"the cluster did not grant {' and '.join(each)}{where} within {timeout:.0f} s: other jobs hold "
        "it, or no node has that much"
    )
