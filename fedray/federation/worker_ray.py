"""The Ray engine's workers: actors in one placement group. Apart from `pool_ray.py`, so that only they import a model."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedray.config import Config
from fedray.errors import FedrayError
from fedray.federation.messages import Orders, Question
from fedray.federation.placement import Placement
from fedray.federation.wire import Header, Packet
from fedray.federation.worker import Worker


@ray.remote
class WorkerActor:
    """A `Worker` with its references resolved: increments are fetched only when this worker lacks them."""

    def __init__(self, make_worker: type[Worker], config: Config, device: str, threads: int):
        # DeepSpeed's own word for it: logical GPUs in tests, and machines whose GPUs are not to be touched.
        self.worker = make_worker(config, "cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else device, threads)

    def describe(self) -> tuple:
        return self.worker.describe()

    def ready(self) -> bool:
        """Answers when the actor is up, after a restart too."""
        return True

    def train(
        self, client: str, round: int, header: Header, packet: Packet, increments: dict[int, Any], kept: Packet | None, orders: Orders | None
    ):
        return self.worker.train(client, round, header, packet, lambda v: ray.get(increments[v]), kept, orders)

    def ask(self, client: str, question: Question, kept: Packet | None):
        return self.worker.ask(client, question, kept)

    def evaluate(
        self, part: str, client: str | None, share: tuple[int, int], header: Header, packet: Packet, increments: dict[int, Any], kept: Packet | None
    ):
        return self.worker.evaluate(part, client, share, header, packet, lambda v: ray.get(increments[v]), kept)


def start_workers(
    config: Config, placement: Placement, group: PlacementGroup | None = None, timeout: float = 120.0
) -> tuple[PlacementGroup, list[Any]]:
    """The worker actors, one in each bundle of a placement group (default: a new one). Raises FedrayError when the cluster does not
    grant it in time."""
    bundle = {"CPU": placement.cpus} | ({"GPU": placement.gpus} if placement.gpus else {})
    given, group = group, group or placement_group([bundle] * placement.workers, strategy="PACK")
    if given is None and not group.wait(timeout):
        remove_placement_group(group)
        raise FedrayError(f"the cluster did not grant {placement.workers} x {bundle} within {timeout:.0f} s: other jobs hold it, or no node has that much")
    workers = [
        WorkerActor.options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        ).remote(Worker, config, placement.device, placement.cpus)
        for i in range(placement.workers)
    ]
    return group, workers
