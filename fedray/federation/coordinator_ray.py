"""The Ray engine's coordinator: an actor that can be asked how far its round is while it runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from fedray.config.sections import Config
from fedray.errors import FedrayError
from fedray.federation.channels.registry import hides_cohort
from fedray.federation.coordinator import Coordinator
from fedray.federation.listening import unheard
from fedray.federation.logs import event, log_lines
from fedray.federation.placement import Seat
from fedray.federation.pool_ray import RayPool


@ray.remote(num_cpus=0, max_concurrency=2)  # type: ignore[call-overload]  # Ray's own stub lacks max_concurrency
class CoordinatorActor:
    """A `Coordinator` over a `RayPool`. Errors meant for a person come back as values, free of remote tracebacks."""

    def __init__(
        self,
        config: Config,
        folder: str,
        facts: tuple,
        workers: Sequence[Any],
        order: Sequence[str],
        homes: Sequence[Seat] = (),
    ):
        self._done: list[str] = []
        log_lines(Path(folder).name, "coordinator")
        progress = unheard if hides_cohort(config) else self._done.append
        pool = RayPool(workers, order, progress, homes, config.worker.batch_clients)
        self._coordinator = Coordinator(config, folder, facts, pool)

    def rounds_done(self) -> int:
        return self._coordinator.rounds_done

    def records(self) -> list[dict]:
        return self._coordinator.records

    def evaluate_start(self) -> dict | FedrayError:
        """Record 0, or an error."""
        try:
            return self._coordinator.evaluate_start()
        except FedrayError as error:
            return error

    def finish(self) -> None:
        """See `Coordinator.finish`."""
        self._coordinator.finish()

    def run_round(self) -> dict | FedrayError | None:
        """The round's record, None where no round may follow, or an error."""
        self._done.clear()
        try:
            record = self._coordinator.run_round()
        except FedrayError as error:
            event("round failed", logging.ERROR, round=self._coordinator.rounds_done + 1, cause=str(error))
            return error
        if record is not None:
            _log(record)
        return record

    def progress(self) -> list[str]:
        """Clients that are done in the round that runs."""
        return list(self._done)


def _log(record: dict[str, Any]) -> None:
    fields = {k: record[k] for k in ("bytes_up", "bytes_down", "exactness", "aggregation_error", "metrics", "seconds")}
    if record["cohort"] is not None:  # else who took part, and how many, is a secret
        fields |= {"clients": len(record["cohort"]), "dropped": len(record["dropped"])}
    event("round done", round=record["round"], **fields)
