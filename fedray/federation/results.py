"""What is left of a run: its last state, evaluation, and the summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from fedray.adapters import attach
from fedray.config.build import make_method, make_spec
from fedray.config.read import from_dict
from fedray.config.sections import Config
from fedray.data.partition import client_names, load_data
from fedray.data.tasks import TASKS, grouped
from fedray.errors import ConfigError
from fedray.federation import checkpoint as checkpoints
from fedray.federation.best import result_of, round_to_keep
from fedray.federation.kept import factors_kept
from fedray.methods import State, View
from fedray.methods.state import factor_of
from fedray.privacy.ledger import worst
from fedray.training.local import LocalTrainer
from fedray.training.model import skeleton


def read_run_config(folder: Path) -> Config:
    """The config of a run directory. Raises ConfigError when it is none."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"'{folder}' is no run directory: it holds no config.yaml")
    return from_dict(yaml.safe_load(path.read_text()))


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The records of a run directory's finished rounds, the first one first; none where no round has finished."""
    path = Path(folder) / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def classes_of(config: Config) -> int:
    """Number of classes of a classification run, 0 otherwise."""
    return len(load_data(config).classes) if TASKS[config.model.task].labelled else 0


def load_checkpoint(folder: Path, config: Config, classes: int) -> checkpoints.Checkpoint:
    """The checkpoint of the run's result, which is the last one unless `federation.best_round` says otherwise. Raises
    ConfigError when there is none."""
    clients = [] if isinstance(config.adapter.rank, int) else client_names(config)
    spec = make_spec(config, attach.layers(skeleton(config, classes or 2)), clients)
    last = checkpoints.latest(Path(folder) / "checkpoint", spec)
    if last is None:
        raise ConfigError(f"'{folder}' has no checkpoint yet: its first round is not done")
    result = round_to_keep(config, last.records)
    if result is None or result == last.state.round:
        return last
    return checkpoints.of_round(Path(folder) / "checkpoint", result, spec)


def load_state(folder: Path, config: Config, classes: int) -> State:
    """The state of the run's result. Raises ConfigError when there is none."""
    return load_checkpoint(folder, config, classes).state


def global_view(config: Config, state: State) -> View:
    """The global model that a state means."""
    return make_method(config).view(state.spec, state, None)


def views(config: Config, checkpoint: checkpoints.Checkpoint) -> dict[str | None, View]:
    """The models a run ended with: the global one (under None), or each client's own where the method keeps factors
    with them."""
    method, state = make_method(config), checkpoint.state
    keeps = method.keeps(state.spec)
    if not keeps:
        return {None: method.view(state.spec, state, None)}
    result: dict[str | None, View] = {}
    for client in checkpoint.seen:
        held = factors_kept(checkpoint.kept.get(client, {}))
        view = method.view(state.spec, state, client)
        result[client] = View(
            view.tensors | {n: t for n, t in held.items() if factor_of(n) in keeps}, view.base, view.trained
        )
    return result


def evaluate(folder: Path) -> dict[str, Any]:
    """Metrics of a run's last state on its held-out examples, overall and by group."""
    config = read_run_config(folder)
    data = load_data(config)
    if config.siloed and make_method(config).personal and config.data.client_held_out > 0:
        raise ConfigError(
            "this run's clients have models of their own and are measured on examples that their own nodes keep: see "
            "metrics of its rounds.jsonl"
        )
    checkpoint = load_checkpoint(folder, config, len(data.classes))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = LocalTrainer(config, device, torch.get_num_threads(), data)
    statistics = {
        client: _statistics(trainer, view, client, bool(data.held_out))
        for client, view in views(config, checkpoint).items()
    }
    each = {client: trainer.task.metrics(entries) for client, entries in statistics.items()}
    result = {
        "round": checkpoint.state.round,
        "metrics": {name: math.fsum(m[name] for m in each.values()) / len(each) for name in next(iter(each.values()))},
        "groups": grouped(trainer.task, statistics[None]) if None in statistics else {},
    }
    return result if None in each else result | {"client_metrics": each}


def _statistics(trainer: LocalTrainer, view: View, client: str | None, kept: bool) -> list[dict[str, Any]]:
    """One model's statistics: of the client's own held-out examples, where clients have kept some, else of all."""
    part = "held-out" if client is not None and kept else "test"
    return [s for batch in trainer.evaluate(view, part, client or "", (0, 1)) for s in batch]


def summarise(
    config: Config, trainable: int, clients: int, records: list[dict[str, Any]], wall_seconds: float
) -> dict[str, Any]:
    """`summary.json` of the records of a run; the first is the evaluation before round 1."""
    metric = TASKS[config.model.task].metric
    start, rounds = records[0], records[1:]
    begun = start.get("start")
    end = result_of(config, records) or start
    moved = [*rounds, begun] if begun else rounds
    return {
        "adapter": config.adapter.kind,
        "method": config.method.name,
        "metric": metric,
        "initial": start["metrics"][metric],
        "final": end["metrics"][metric],
        "initial_by_group": _by_group(start, metric),
        "final_by_group": _by_group(end, metric),
        "rounds": len(rounds),
        "result_round": end["round"],
        "clients": clients,
        "trainable_params": trainable,
        "bytes_up": sum(r["bytes_up"] for r in moved),
        "bytes_down": sum(r["bytes_down"] for r in moved),
        "start": begun,
        "aggregation_error": _most(r["aggregation_error"] for r in rounds),
        "exactness": _most(r["exactness"] for r in rounds),
        "store_error": max(r["store_error"] or 0.0 for r in rounds),
        "epsilon": worst(list((records[-1].get("epsilon") or {}).values())),
        "delta": start.get("delta"),
        "seed": config.seed,
        "wall_seconds": round(wall_seconds, 2),
    }


def _by_group(record: Mapping[str, Any], metric: str) -> dict[str, float]:
    return {group: metrics[metric] for group, metrics in record.get("groups", {}).items()}


def _most(values: Iterable[float | None]) -> float | None:
    """The largest of what is known."""
    return max((v for v in values if v is not None), default=None)
