"""The Ray engine: actors for the workers and the coordinator, and a driver that survives the coordinator's death."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.config.sections import Config
from fedray.errors import FedrayError
from fedray.federation.channels import fixed_masks
from fedray.federation.cluster import answer_of, last_line, ray_session
from fedray.federation.coordinator_ray import CoordinatorActor
from fedray.federation.listening import Listener
from fedray.federation.worker_ray import start_workers

if TYPE_CHECKING:
    from fedray.federation.prepare import Prepared

COORDINATOR_ATTEMPTS = 3


class RayRun:
    """One run's actors. `group`: a placement group with a bundle for each worker (default: the run makes its own)."""

    def __init__(self, config: Config, prepared: Prepared, listener: Listener, group: PlacementGroup | None):
        self._config, self._prepared, self._listener, self._given = config, prepared, listener, group
        self._workers: list[Any] = []
        self._coordinator: Any = None
        self._round = -1  # the last that was handed on; -1: not even the evaluation before round 1
        self._death = ""  # what the coordinator died of last

    def rounds(self) -> Iterator[dict[str, Any]]:
        """Every record, the evaluation before round 1 first. Raises FedrayError where the run fails."""
        with ray_session():
            group, self._workers = start_workers(self._config, self._prepared.placement, self._given)
            try:
                facts = self._facts()
                self._warn()
                self._coordinator = self._coordinate(facts)
                deaths = 0
                while not (yield from self._go_on()):
                    deaths += 1
                    if deaths >= COORDINATOR_ATTEMPTS:
                        raise FedrayError(f"the coordinator died {deaths} times: {self._death}")
                    self._listener.note("the coordinator died: it is restarted from the last checkpoint")
                    self._coordinator = self._coordinate(facts)
            finally:
                self._end(group)

    def _facts(self) -> tuple:
        """What the workers say of the model; of silos every worker, so that each has read its data."""
        workers = self._workers if self._prepared.placement.homes else self._workers[:1]
        references = [worker.describe.remote() for worker in workers]
        facts = [answer_of(reference, "a worker could not start") for reference in references]
        return facts[0]

    def _warn(self) -> None:
        """Say what the workers' keys make of the run's guarantee."""

        def fixed() -> list[bool]:
            references = [worker.masks_are_fixed.remote() for worker in self._workers]
            return [answer_of(reference, "a worker could not start") for reference in references]

        if words := fixed_masks.warning(self._config, self._prepared.folder, fixed):
            self._listener.note(words)

    def _coordinate(self, facts: tuple) -> Any:
        """A coordinator on the driver's node, where the run directory is."""
        node = ray.get_runtime_context().get_node_id()
        if not any(n["NodeID"] == node and n["Alive"] for n in ray.nodes()):
            raise FedrayError(
                "the Ray node of this process has died: bring it up (`ray start`), and go on with output.resume"
            )
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        order, homes = self._prepared.data.clients, self._prepared.placement.homes
        # mypy does not see what Ray's decorator makes of a class.
        actor = CoordinatorActor.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        return actor.remote(self._config, str(self._prepared.folder), facts, self._workers, order, homes)

    def _go_on(self) -> Generator[dict[str, Any], None, bool]:
        """Records as the coordinator makes them; False where the coordinator died."""
        try:
            yield from self._caught_up()
            while self._round < self._config.federation.rounds:
                record = self._next_round()
                if record is None:
                    break
                self._round = record["round"]
                yield record
            ray.get(self._coordinator.finish.remote())
        except RayTaskError as error:
            raise FedrayError(f"the coordinator failed: {last_line(error)}") from error
        except RayActorError as error:
            self._death = last_line(error)
            return False
        return True

    def _caught_up(self) -> Iterator[dict[str, Any]]:
        """The records that were made before, as far as they were not handed on."""
        first = _raised(ray.get(self._coordinator.evaluate_start.remote()))  # one that was restarted begins with it too
        if self._round < 0:
            self._round = 0
            yield first
        for record in ray.get(self._coordinator.records.remote())[self._round + 1 :]:
            self._round = record["round"]
            yield record

    def _next_round(self) -> dict[str, Any] | None:
        """The next round's record, None where there is none; the listener follows who is done."""
        pending = self._coordinator.run_round.remote()
        while not ray.wait([pending], timeout=0.2)[0]:
            done = ray.get(self._coordinator.progress.remote())
            self._listener.progress(self._round + 1, len(done), self._prepared.cohort)
        record = _raised(ray.get(pending))
        if record is None:
            self._listener.note(why_ended(ray.get(self._coordinator.records.remote())))
        return record

    def _end(self, group: PlacementGroup) -> None:
        if self._coordinator is not None:
            ray.kill(self._coordinator)  # first: it must not take the workers' end for dropped clients
        for worker in self._workers:
            ray.kill(worker)
        if self._given is None:
            ray.util.remove_placement_group(group)


def why_ended(records: list[dict[str, Any]]) -> str:
    """Why a run ended before its last round."""
    reason = records[-1].get("stopped", "no client can afford a round")
    return f"the run ends after round {records[-1]['round']}: {reason}"


def _raised(answer: Any) -> Any:
    """What an actor answered, unless it is an error meant for a person."""
    if isinstance(answer, FedrayError):
        raise answer
    return answer
