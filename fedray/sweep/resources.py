"""What a trial takes of the cluster, and where its parts lie."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray import tune

from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation.placement import Node, places_of

#: CPUs and GPUs of a run whose place is checked otherwise: against every node, or by its placement group.
UNLIMITED = (1e9, 1e9)


@dataclass(frozen=True)
class Bundles:
    """What a trial's placement group holds. `trial`: the trial's own process (inline runs train in it); `workers` times
    `ranks` times `each`: its workers, on nodes with `labels`, one mapping a worker, where clients are kept to their own
    nodes."""

    trial: dict[str, float]
    each: dict[str, float]
    workers: int
    labels: tuple[dict[str, str], ...] = ()
    ranks: int = 1

    @property
    def training(self) -> dict[str, float]:
        """What one process that trains has."""
        return self.each if self.workers else self.trial

    @property
    def processes(self) -> int:
        """How many processes train."""
        return self.workers * self.ranks or 1

    def factory(self) -> tune.PlacementGroupFactory:
        """The placement group, as Tune makes it."""
        labels = [where for where in self.labels for _ in range(self.ranks)]
        where = {"bundle_label_selector": [_elsewhere(self.labels), *labels]} if labels else {}
        ranks = [self.each] * (self.workers * self.ranks)
        return tune.PlacementGroupFactory([self.trial, *ranks], strategy="PACK", **where)

    @property
    def words(self) -> str:
        """For a person: `2 workers of 1 CPU and 1 GPU = 2 CPUs and 2 GPUs`."""
        ask = " and ".join(_counted(count, kind) for kind, count in self.training.items())
        if self.processes == 1:
            return ask
        total = " and ".join(_counted(self.processes * count, kind) for kind, count in self.training.items())
        ranks = f"{self.ranks} ranks of " if self.ranks > 1 else ""
        return f"{self.workers} worker{'s' if self.workers > 1 else ''} of {ranks}{ask} = {total}"


def _counted(count: float, kind: str) -> str:
    return f"{count:g} {kind}{'s' if count > 1 else ''}"


def bundles(config: Config, clients: int, gpus_there: float) -> Bundles:
    """The resources of a trial: one worker (or `worker.count`, or, where `worker.gpus` is given, one for each client
    of a cohort) of `worker.ranks` ranks, each of `worker.gpus` GPUs (default 1 where the cluster has any) and
    `worker.cpus` CPUs (default 1). Raises ConfigError for clients whose workers are made differently."""
    if config.mixed:
        raise ConfigError(
            "clients.NAME.gpus, .ranks and .zero_stage are for single runs: a sweep's trials have workers of one kind; "
            "give worker.gpus, worker.ranks and worker.zero_stage"
        )
    each, ranks = _training(config, gpus_there), config.worker.ranks
    if config.engine == "inline":
        return Bundles(each, {}, 0)
    if config.siloed:
        labels = _labels(config, clients)
        # A bundle of its own, a byte, for the trial and its coordinator: they see every update, and belong on no silo's
        # machine.
        return Bundles({"memory": 1.0}, each, len(labels), labels, ranks)
    cohort = min(config.federation.cohort or clients, clients)
    return Bundles({}, each, config.worker.count or (cohort if config.worker.gpus else 1), ranks=ranks)


def _labels(config: Config, clients: int) -> tuple[dict[str, str], ...]:
    """The labels of each worker's node where clients are kept to their own: of every place as many workers as are
    asked for, at most one a client."""
    at_most = config.worker.count or (clients if config.worker.gpus else 1)
    places = places_of(config, list(config.clients))
    return tuple(dict(place.labels) for place, members in places.items() for _ in members[:at_most])


def _training(config: Config, gpus_there: float) -> dict[str, float]:
    """What one process that trains asks for."""
    worker = config.worker
    gpus = worker.gpus if worker.gpus is not None else (1.0 if gpus_there else 0.0)
    return {"CPU": float(worker.cpus or 1)} | ({"GPU": gpus} if gpus else {})


def counts_clients(config: Config) -> bool:
    """Whether `bundles` depends on how many clients there are."""
    return config.engine == "ray" and config.worker.count is None and bool(config.worker.gpus)


def _elsewhere(labels: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Labels of a node that is none of the silos' (as far as they are told apart by plain values)."""
    values: dict[str, set[str]] = {}
    for where in labels:
        for key, text in where.items():
            if not text.startswith("!"):
                words = text[3:-1].split(",") if text.startswith("in(") else [text]
                values.setdefault(key, set()).update(word.strip() for word in words)
    return {key: f"!in({','.join(sorted(words))})" for key, words in values.items()}


def check_placeable(name: str, needed: Bundles, nodes: Sequence[Node]) -> None:
    """Raises ConfigError, with the arithmetic, for a trial that the cluster can never place (of places with labels
    `place_apart` has said so)."""
    room = sum(node.room(needed.training) for node in nodes)
    if room >= needed.processes:
        return
    there = {kind: sum(node.resources.get(kind, 0.0) for node in nodes) for kind in needed.training}
    have = ", ".join(f"{count:g} {kind}s" for kind, count in there.items())
    on = f" on {len(nodes)} nodes, where {room} such workers fit" if len(nodes) > 1 else ""
    raise ConfigError(
        f"trial '{name}' asks for {needed.words}, but the cluster has {have}{on}: "
        "lower worker.count (workers serve clients in turn), worker.gpus or worker.cpus"
    )


def placed(config: Config, clients: int, gpus_there: float, folder: Path) -> tuple[Config, Bundles]:
    """The config with its workers and its run directory spelled out, so that the same run can be made again alone;
    and its bundles."""
    needed = bundles(config, clients, gpus_there)
    worker = config.worker.model_copy(
        update={
            "count": _count(config, needed),
            "cpus": int(needed.training["CPU"]),
            "gpus": needed.training.get("GPU", 0.0),
            "cache": config.worker.cache or str(cache_folder(folder.parent.parent)),
        }
    )
    # Tune's own callbacks track it.
    update = {"dir": str(folder), "resume": True, "track": ()}
    if config.output.checkpoints is not None:  # each trial's own
        update["checkpoints"] = f"{config.output.checkpoints.rstrip('/')}/{folder.name}"
    output = config.output.model_copy(update=update)
    return config.model_copy(update={"worker": worker, "output": output}), needed


def _count(config: Config, needed: Bundles) -> int | None:
    """`worker.count` that gives these bundles; with places of their own, of each place."""
    if not needed.labels:
        return needed.workers or None
    return config.worker.count or max(needed.labels.count(where) for where in needed.labels)


def cache_folder(out: Path) -> Path:
    """Where a sweep's trials share what they tokenised, on each machine by itself: the sweep removes it when it ends.
    The base weights need no such place: they are mapped from the model's own files, so that trials on one machine
    share them through the page cache."""
    return Path(tempfile.gettempdir()) / f"fedray-{os.getuid()}-{hashlib.sha256(str(out).encode()).hexdigest()[:12]}"
