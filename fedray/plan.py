"""What a run would cost, before it runs: parameters, bytes a round for every method, worker memory.

Works from a model's `config.json` alone: the model is built on the meta device and no weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedray.adapters import attach
from fedray.config import DEFAULT_CLIENTS, Config, from_dict, make_method, make_spec
from fedray.federation import start
from fedray.methods import METHODS, FedEx, FedExKeep, Spec
from fedray.training.model import read_model_config, skeleton

BYTES = 4  # the wire is fp32


@dataclass(frozen=True)
class MethodCost:
    """Bytes per client and round in the steady state with every client of the cohort reporting, heads included; of the largest rank
    where ranks differ.

    `first_down`: the first round's download (no base update yet), without `once`: what the run sends to each client besides (bases,
    factors that rest, a base update that outgrew the dense matrix and is sent again as a whole). `start_up`, `start_down`: before round 1 (lora-sb's gradient). `run_up`, `run_down`: all of a run of `rounds`.
    """

    method: str
    exact: str
    trainable: int
    up: int
    down: int
    first_down: int
    once: int
    start_up: int
    start_down: int
    run_up: int
    run_down: int
    rounds: int


@dataclass(frozen=True)
class Memory:
    """A worker's memory in bytes; `activations` is an estimate (for transformers, without checkpointing)."""

    base: int
    adapter_and_optimizer: int
    activations: int
    host_copy_of_moved_layers: int

    @property
    def total(self) -> int:
        return self.base + self.adapter_and_optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. `costs`: all methods side by side, the config's own first."""

    model: str
    base_parameters: int
    adapted_layers: int
    heads: int
    cohort: int
    clients: int
    costs: tuple[MethodCost, ...]
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total}}


def plan(config: Config, cohort: int | None = None, classes: int = 2) -> Plan:
    """The costs of a config. `cohort`: clients a round (default: as the config says). Raises ConfigError as `skeleton` does."""
    model = skeleton(config, classes)
    heads = sum(p.numel() for p in attach.heads(model).values())
    adapters = sum(p.numel() for p in attach.factors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapters - heads
    count = len(config.clients) or config.federation.clients or DEFAULT_CLIENTS
    if not isinstance(config.adapter.rank, int):
        count = len(config.adapter.rank)
    if cohort is None:
        cohort = config.federation.cohort or count
    names = list(config.adapter.rank) if isinstance(config.adapter.rank, dict) else []
    names += [f"client {i}" for i in range(len(names), max(count, cohort))]
    spec = make_spec(config, attach.layers(model), names[: max(count, cohort, len(names))])
    # The client whose costs are shown has the largest rank.
    names.sort(key=lambda name: -spec.ranks.get(name, 0))
    return Plan(
        model=config.model.path,
        base_parameters=base,
        adapted_layers=len(spec.layers),
        heads=heads,
        cohort=cohort,
        clients=max(cohort, count),
        costs=tuple(_cost(c, spec, heads, names[:cohort]) for c in _variants(config)),
        memory=_memory(config, spec, base, heads),
    )


def _variants(config: Config) -> list[Config]:
    """The config itself, and every other method that fits its adapter with default options."""
    variants, several = [config], not isinstance(config.adapter.rank, int)
    for name, method in METHODS.items():
        if name != config.method.name and config.adapter.kind in method.adapters and (method.mixed_ranks or not several):
            plain = config.model_dump(mode="json", exclude_unset=True)
            variants.append(from_dict(plain | {"method": {"name": name, "weights": config.method.weights}}))
    return variants


def _cost(config: Config, spec: Spec, heads: int, cohort: Sequence[str]) -> MethodCost:
    method, rounds = make_method(config), config.federation.rounds
    moves = [method.payload(spec, cohort, cohort[0], round) for round in range(rounds)]
    # Two rounds beyond the run's, of which one trains A and the other B where a method alternates; what is sent besides is in `once`.
    late = [method.payload(spec, cohort, cohort[0], rounds + more) for more in (2, 3)]
    start_up, start_down = start.numbers(config, spec)
    return MethodCost(
        method=config.method.name,
        exact=method.exact,
        trainable=spec.size(*method.trained(spec)) + heads,
        up=BYTES * (sum(p.up for p in late) // 2 + heads),
        down=BYTES * (sum(p.down for p in late) // 2 + heads),
        first_down=BYTES * (moves[0].down + heads),
        once=BYTES * sum(p.once for p in moves),
        start_up=BYTES * start_up,
        start_down=BYTES * start_down,
        run_up=BYTES * (start_up + sum(p.up + heads for p in moves)),
        run_down=BYTES * (start_down + sum(p.down + p.once + heads for p in moves)),
        rounds=rounds,
    )


def _memory(config: Config, spec: Spec, base: int, heads: int) -> Memory:
    width = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    moving = spec.size(*make_method(config).trained(spec))
    trained = moving + heads
    shape = read_model_config(config)
    layers, hidden = getattr(shape, "num_hidden_layers", 0), getattr(shape, "hidden_size", 0)
    inner = getattr(shape, "intermediate_size", 4 * hidden) or 4 * hidden
    tokens = config.federation.batch_size // config.federation.accumulate * config.data.max_length
    logits = 2 * 4 * tokens * getattr(shape, "vocab_size", 0) if config.model.task == "causal-lm" else 0
    moves = isinstance(make_method(config), (FedEx, FedExKeep)) or config.method.residual == "fold"
    return Memory(
        base=width * base,
        # fp32: value, gradient, and two moments; factors at rest: their value
        adapter_and_optimizer=16 * trained + 4 * (spec.size() - moving),
        # about 10 hidden-sized and 3 inner-sized tensors a layer are kept for the backward pass, logits twice in fp32
        activations=width * tokens * layers * (10 * hidden + 3 * inner) + logits,
        host_copy_of_moved_layers=width * sum(layer.m * layer.n for layer in spec.layers) if moves else 0,
    )
