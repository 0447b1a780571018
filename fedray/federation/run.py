"""One federated run from config to run directory: check everything, start an engine, do the rounds, write the results.

`prepare` reads and checks and touches nothing; `execute` does the work. A run directory holds `config.yaml`,
`rounds.jsonl`, `summary.json`, `checkpoint/` and `adapter/`.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.adapters import attach
from fedray.config.build import make_method, make_spec
from fedray.config.sections import BUILTIN, Config
from fedray.data.partition import FederatedData, load_data, public_data
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError, FedrayError
from fedray.federation.coordinator import Coordinator
from fedray.federation.placement import Node, Placement, place, place_silos
from fedray.federation.pool_inline import InlinePool
from fedray.federation.pool_ray import CoordinatorActor
from fedray.federation.results import load_checkpoint, read_run_config, summarise, write
from fedray.federation.worker import Worker
from fedray.federation.worker_ray import start_workers
from fedray.methods import Spec
from fedray.privacy.ledger import Ledger, worst
from fedray.privacy.secure_sum import LEAST_MEMBERS
from fedray.privacy.statement import statement
from fedray.stopping import stop_on_sigterm
from fedray.training.model import check_loadable, load_tokenizer, skeleton

COORDINATOR_ATTEMPTS = 3
#: Set by Ray for the entrypoint of a submitted job.
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class Listener(Protocol):
    """What a person's side is told while a run goes on."""

    def started(self, prepared: Prepared) -> None: ...
    def evaluated(self, record: dict[str, Any]) -> None: ...
    def progress(self, round: int, done: int, cohort: int) -> None: ...
    def round(self, record: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A listener that says nothing."""

    def __getattr__(self, name: str):
        return lambda *args: None


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no training. `layers`, `trainable` and `heads` come from shapes alone."""

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
        """Training sequences of each client, which is what example-level privacy protects: rows, unless long texts are cut; empty as `rows`."""
        if self.config.model.task != "causal-lm":
            return self.rows
        task = TASKS[self.config.model.task](self.config, self.data, load_tokenizer(self.config))
        return {name: len(task.encode(part)) for name, part in self.data.train.items()}

    @property
    def cohort(self) -> int:
        return min(self.config.federation.cohort or len(self.data.clients), len(self.data.clients))


def prepare(config: Config, capacity: tuple[float, float] | None = None) -> Prepared:
    """Read and check everything. `capacity`: the CPUs and GPUs that the run may use (default: all of the cluster's). Raises ConfigError;
    writes nothing."""
    config = rooted(config)
    folder, resuming = _folder(config)
    data = load_data(config)
    if (config.federation.cohort or 0) > len(data.clients):
        raise ConfigError(
            f"federation.cohort {config.federation.cohort} is more than the {len(data.clients)} clients: lower it"
        )
    if config.worker.profile is not None:
        client, _, round = config.worker.profile.rpartition(":")
        if client not in data.clients or not 1 <= int(round) <= config.federation.rounds:
            raise ConfigError(
                f"worker.profile '{config.worker.profile}' is no client and round of this run: give one of {', '.join(data.clients[:5])} and 1 to {config.federation.rounds}"
            )
    if config.adapter.subspace == "public":
        public_data(config, data)
    least = min(config.federation.cohort or len(data.clients), len(data.clients))
    if config.privacy.secure_aggregation and least < LEAST_MEMBERS:
        raise ConfigError(
            f"privacy.secure_aggregation with {least} clients a round would show each of them: have {LEAST_MEMBERS} or more"
        )
    if config.privacy.on and config.privacy.unit == "example" and config.model.task == "classification":
        for name, part in data.train.items():
            if len(part) < (batch := config.client(name).batch_size):
                raise ConfigError(
                    f"client '{name}' has fewer examples than its batch_size {batch}, by which a private step divides: lower it"
                )
    check_loadable(config)
    model = skeleton(config, len(data.classes) or 2)
    spec = make_spec(config, attach.layers(model), data.clients)
    heads = sum(p.numel() for p in attach.heads(model).values())
    trained = sum(p.numel() for p in attach.factors(model).values())
    base = sum(p.numel() for p in model.parameters()) - trained - heads
    if config.siloed:
        placement = place_silos(config, nodes_there())
    else:
        placement = place(config, len(data.clients), *(capacity if capacity is not None else _resources(config)))
    return Prepared(config, folder, data, spec, heads, base, placement, resuming)


def rooted(config: Config) -> Config:
    """The config with absolute local paths: a run directory can then be read from anywhere."""

    def full(path: str | None) -> str | None:
        return os.path.abspath(path) if path not in (None, BUILTIN) and Path(path).exists() else path

    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": full(config.model.path)}),
            "data": config.data.model_copy(update={"source": full(config.data.source)}),
            "adapter": config.adapter.model_copy(update={"subspace_source": full(config.adapter.subspace_source)}),
            # A path of a client with node_labels is of its own nodes.
            "clients": config.clients
            if config.siloed
            else {name: c.model_copy(update={"source": full(c.source)}) for name, c in config.clients.items()},
        }
    )


def check_lasting(key: str, path: str | None) -> None:
    """Raises ConfigError for results of a submitted job that would lie in its unpacked package, which Ray removes."""
    if JOB in os.environ and (path is None or not os.path.isabs(path)):
        raise ConfigError(
            f"{key} of a submitted job must be an absolute path on storage that stays: its working directory is removed by Ray"
        )


def _folder(config: Config) -> tuple[Path, bool]:
    """The run directory and whether a run there goes on. Raises ConfigError when it holds anything else."""
    if config.output.dir is None:
        if config.output.resume:
            raise ConfigError("output.resume needs output.dir, the directory of the run that is to go on")
        return Path("runs", f"{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute(), False
    folder = Path(config.output.dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output.dir '{config.output.dir}' is a file: choose a directory")
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(
            f"output.dir '{config.output.dir}' cannot be made: {parent} is no directory that can be written to"
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder, False
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"output.dir '{config.output.dir}' is not empty and holds no run: choose another")
    if not config.output.resume:
        raise ConfigError(
            f"output.dir '{config.output.dir}' holds another run: choose another, or go on with it by --output.resume"
        )
    different = differences(read_run_config(folder), config)
    checkpoint = folder / "checkpoint"
    if config.privacy.on and any(checkpoint.glob("round-*")) and not (checkpoint / "ledger.json").is_file():
        raise ConfigError(
            f"output.dir '{config.output.dir}' has lost its checkpoint/ledger.json, so nobody knows what it has spent: bring the file back, or start another run"
        )
    if different:
        raise ConfigError(
            f"output.dir '{config.output.dir}' holds a run with another {different[0]} ({different[1]}, now {different[2]}): "
            "give the same to resume it, or another directory"
        )
    return folder, True


def differences(old: Config, new: Config) -> tuple[str, Any, Any] | None:
    """The first key that a resumed run may not change: where it runs and writes may, what it computes may not."""

    def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    where = {"output": True, "worker": True, "engine": True, "clients": {"__all__": {"node_labels"}}}
    before, now = (dict(flat(c.model_dump(mode="json", exclude=where))) for c in (old, new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _resources(config: Config) -> tuple[float, float]:
    """CPUs and GPUs of the cluster the run will use; connects to one that is running, starts none."""
    if config.engine == "ray" and connect():
        total = ray.cluster_resources()
        return total.get("CPU", 0.0), total.get("GPU", 0.0)
    return float(len(os.sched_getaffinity(0))), float(torch.cuda.device_count())


def nodes_there() -> list[Node]:
    """The machines of the cluster that is there; this one, without labels, where there is none."""
    if connect():
        return [Node(n["Resources"], n["Labels"]) for n in ray.nodes() if n["Alive"]]
    return [Node({"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}, {})]


# --- doing it ---------------------------------------------------------------------------------------------------


def execute(
    prepared: Prepared, listener: Listener | None = None, group: PlacementGroup | None = None
) -> dict[str, Any]:
    """Run (or resume) and return the summary. `group`: a placement group with a bundle for each worker (default: the run makes its own).

    Raises ClientError and RoundError with a sentence for the person.
    """
    listener = listener or Silent()
    started = time.monotonic()
    folder = prepared.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.dir '{folder}' cannot be made: {error.strerror}") from error
    if not prepared.resuming:
        (folder / "config.yaml").write_text(prepared.config.to_yaml())
    listener.started(prepared)
    rounds = (
        _ray_rounds(prepared, listener, group)
        if prepared.config.engine == "ray"
        else _inline_rounds(prepared, listener)
    )
    records: list[dict[str, Any]] = []
    for record in rounds:
        records.append(record)
        _write_rounds(folder / "rounds.jsonl", records)  # before it is told: who is told may end the process
        if prepared.config.privacy.on:
            _write_privacy(prepared, records)
        if record["round"] == 0:
            listener.evaluated(record)
        else:
            listener.round(record)
    if prepared.resuming and (folder / "summary.json").is_file():
        return json.loads((folder / "summary.json").read_text())  # it was finished
    config, classes = prepared.config, len(prepared.data.classes)
    write(config, load_checkpoint(folder, config, classes), folder / "adapter", "peft", classes)
    summary = summarise(config, prepared.trainable, len(prepared.data.clients), records, time.monotonic() - started)
    if config.privacy.on:  # of the ledger: it knows of releases that no record tells of
        ledger = Ledger.load(folder / "checkpoint" / "ledger.json")
        summary |= {
            "epsilon": worst([ledger.epsilon(name) for name in ledger.entries]),
            "keys_were_fixed": ledger.fixed,
        }
    _write(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def _write_privacy(prepared: Prepared, records: list[dict[str, Any]]) -> None:
    config, ledger = prepared.config, Ledger.load(prepared.folder / "checkpoint" / "ledger.json")
    told = statement(config, ledger, prepared.data.clients, records, make_method(config))
    _write(prepared.folder / "privacy.json", json.dumps(told, indent=2))


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _write_rounds(path: Path, records: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(r) + "\n" for r in records if r["round"] > 0))


def _placed(prepared: Prepared) -> Config:
    """The config with its run directory spelled out."""
    output = prepared.config.output.model_copy(update={"dir": str(prepared.folder)})
    return prepared.config.model_copy(update={"output": output})


def _inline_rounds(prepared: Prepared, listener: Listener) -> Iterator[dict[str, Any]]:
    config = _placed(prepared)
    worker = Worker(config, prepared.placement.device, prepared.placement.cpus, prepared.data)
    done: list[str] = []

    def progress(client: str) -> None:
        done.append(client)
        listener.progress(coordinator.rounds_done + 1, len(done), prepared.cohort)

    coordinator = Coordinator(
        config, str(prepared.folder), worker.describe(), InlinePool(worker, progress), prepared.data
    )
    yield coordinator.evaluate_start()
    yield from list(coordinator.records[1:])
    while coordinator.rounds_done < config.federation.rounds:
        done.clear()
        record = coordinator.run_round()
        if record is None:
            listener.note(stopped(coordinator.records))
            break
        yield record
    coordinator.finish()


def _ray_rounds(prepared: Prepared, listener: Listener, group: PlacementGroup | None) -> Iterator[dict[str, Any]]:
    config, order, given = _placed(prepared), prepared.data.clients, group
    with ray_session():
        group, workers = start_workers(config, prepared.placement, given)
        coordinator = None
        try:
            told = [worker.describe.remote() for worker in (workers if prepared.placement.homes else workers[:1])]
            facts = [_answer(reference, "a worker could not start") for reference in told][0]

            # On the driver's node, where the run directory is.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

            def coordinate():
                return CoordinatorActor.options(scheduling_strategy=here).remote(
                    config, str(prepared.folder), facts, workers, order, prepared.placement.homes
                )

            coordinator, deaths, told = coordinate(), 0, -1
            while True:
                try:
                    first = ray.get(
                        coordinator.evaluate_start.remote()
                    )  # a coordinator that was restarted begins with it too
                    if isinstance(first, FedrayError):
                        raise first
                    if told < 0:
                        yield first
                        told = 0
                    for record in ray.get(coordinator.records.remote())[told + 1 :]:
                        yield record
                        told = record["round"]
                    if told >= config.federation.rounds:
                        ray.get(coordinator.finish.remote())
                        return
                    pending = coordinator.run_round.remote()
                    while not ray.wait([pending], timeout=0.2)[0]:
                        listener.progress(told + 1, len(ray.get(coordinator.progress.remote())), prepared.cohort)
                    outcome = ray.get(pending)
                    if isinstance(outcome, FedrayError):
                        raise outcome
                    if outcome is None:
                        listener.note(stopped(ray.get(coordinator.records.remote())))
                        ray.get(coordinator.finish.remote())
                        return
                except RayTaskError as error:
                    raise FedrayError(f"the coordinator failed: {_short(error)}") from error
                except RayActorError as error:
                    deaths += 1
                    if deaths >= COORDINATOR_ATTEMPTS:
                        raise FedrayError(f"the coordinator died {deaths} times: {_short(error)}") from error
                    listener.note("the coordinator died: it is restarted from the last checkpoint")
                    coordinator = coordinate()
        finally:
            if coordinator is not None:
                ray.kill(coordinator)  # first: it must not take the workers' end for dropped clients
            for worker in workers:
                ray.kill(worker)
            if given is None:
                ray.util.remove_placement_group(group)


def stopped(records: list[dict[str, Any]]) -> str:
    """Why a run ended before its last round."""
    return (
        f"the run ends after round {records[-1]['round']}: {records[-1].get('stopped', 'no client can afford a round')}"
    )


def _answer(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        raise FedrayError(f"{what}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The last line of a remote error: the cause itself."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster that is there, or an embedded one for the time of the run."""
    if connect():
        yield
        return
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    stop_on_sigterm()
    try:
        yield
    finally:
        ray.shutdown()


def connect() -> bool:
    """Whether this process is connected to a cluster, after joining the one that it was started on: RAY_ADDRESS, as `ray job submit` and
    KubeRay set it, or one that `ray start` has begun on this machine. Raises FedrayError where RAY_ADDRESS answers nothing."""
    if ray.is_initialized():
        return True
    address = os.environ.get("RAY_ADDRESS") or _started_here()
    if address is None:
        return False
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise FedrayError(
            f"no Ray cluster could be reached at {address}: {_short(error)}; unset RAY_ADDRESS to start one for this run, or bring it up"
        ) from error
    stop_on_sigterm()
    return True


def _started_here() -> str | None:
    """The address of a cluster that `ray start` has begun here and that answers; embedded ones leave no such file."""
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text().strip()
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=2):
            return address
    except (OSError, ValueError):
        return None
