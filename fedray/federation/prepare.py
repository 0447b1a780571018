"""Read a config and check everything that needs no training. Touches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedray.adapters import attach
from fedray.config.build import make_method, make_spec
from fedray.config.sections import Config
from fedray.data.partition import FederatedData, load_data, public_data
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.channels.registry import check_clients
from fedray.federation.cluster import nodes_there, resources
from fedray.federation.failures import needed_of
from fedray.federation.folder import check_replay, check_storage, rooted, run_folder
from fedray.federation.placement import Placement, place, place_apart
from fedray.methods import Spec
from fedray.training.model import check_loadable, load_tokenizer, skeleton


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no training. `spec`, `heads` (how many numbers) and
    `base_parameters` come from shapes alone."""

    config: Config
    folder: Path
    data: FederatedData
    spec: Spec
    heads: int
    base_parameters: int
    placement: Placement
    resuming: bool

    @property
    def trainable(self) -> int:
        """Numbers that train at first: factors and heads."""
        return self.spec.size(*make_method(self.config).trained(self.spec)) + self.heads

    @property
    def rows(self) -> dict[str, int]:
        """Rows of training data of each client; empty where clients keep their data to their own nodes."""
        return {name: len(part) for name, part in self.data.train.items()}

    def units(self) -> dict[str, int]:
        """Training sequences of each client, which is what example-level privacy protects: rows, unless long texts are
        cut; empty as `rows`."""
        if TASKS[self.config.model.task].labelled:
            return self.rows
        task = TASKS[self.config.model.task](self.config, self.data, load_tokenizer(self.config))
        return {name: len(task.encode(part)) for name, part in self.data.train.items()}

    @property
    def cohort(self) -> int:
        """Clients a round."""
        return cohort_of(self.config, len(self.data.clients))


def cohort_of(config: Config, clients: int) -> int:
    """Clients a round, out of so many."""
    return min(config.federation.cohort or clients, clients)


def prepare(config: Config, capacity: tuple[float, float] | None = None) -> Prepared:
    """Read and check everything. `capacity`: the CPUs and GPUs that the run may use (default: all of the cluster's).
    Raises ConfigError; writes nothing."""
    config = rooted(config)
    folder, resuming = run_folder(config)
    check_storage(config, resuming)
    check_replay(config, resuming)
    data = load_data(config)
    _check_data(config, data)
    check_loadable(config)
    _check_rows(config, data)
    model = skeleton(config, len(data.classes) or 2)
    spec = make_spec(config, attach.layers(model), data.clients)
    heads = sum(p.numel() for p in attach.heads(model).values())
    trained = sum(p.numel() for p in attach.factors(model).values())
    base = sum(p.numel() for p in model.parameters()) - trained - heads
    return Prepared(config, folder, data, spec, heads, base, _placement(config, data.clients, capacity), resuming)


def _check_data(config: Config, data: FederatedData) -> None:
    """Raises ConfigError where config and clients do not fit each other."""
    if (config.federation.cohort or 0) > len(data.clients):
        raise ConfigError(
            f"federation.cohort {config.federation.cohort} is more than the {len(data.clients)} clients: lower it"
        )
    if (config.federation.buffer or 0) > len(data.clients):
        raise ConfigError(
            f"federation.buffer {config.federation.buffer} is more than the {len(data.clients)} clients: lower it"
        )
    if config.worker.profile is not None:
        client, _, round = config.worker.profile.rpartition(":")
        if client not in data.clients or not 1 <= int(round) <= config.federation.rounds:
            raise ConfigError(
                f"worker.profile '{config.worker.profile}' is no client and round of this run: give one of "
                f"{', '.join(data.clients[:5])} and 1 to {config.federation.rounds}"
            )
    if config.adapter.subspace == "public":
        public_data(config, data)
    rows = {name: len(part) for name, part in data.train.items()}
    cohort = cohort_of(config, len(data.clients))
    check_clients(config, cohort, rows)
    if (rule := make_method(config).robust) is not None:
        rule.check_cohort(cohort, needed_of(cohort, config.federation.quorum).clients)


def _check_rows(config: Config, data: FederatedData) -> None:
    """Raises ConfigError for a row that is read here and that the task cannot take. O(rows)."""
    task = TASKS[config.model.task](config, data, load_tokenizer(config))
    parts = [
        *((f"client '{name}'", part, False) for name, part in data.train.items()),
        *((f"client '{name}'", part, True) for name, part in data.held_out.items()),
        ("the held-out data", data.test, True),
    ]
    for where, part, held_out in parts:
        try:
            task.check_rows(part, held_out)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def _placement(config: Config, clients: Sequence[str], capacity: tuple[float, float] | None) -> Placement:
    if config.engine == "ray" and (config.siloed or config.mixed):
        return place_apart(config, nodes_there(), clients)
    return place(config, len(clients), *(capacity if capacity is not None else resources(config)))
