"""What a run would cost, before it runs: parameters, bytes a round for every method, worker memory.

Works from a model's `config.json` alone: the model is built on the meta device and no weights are read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedray.adapters import ADAPTERS, attach
from fedray.config import DEFAULT_CLIENTS, Config, from_dict, make_method
from fedray.methods import METHODS, Spec
from fedray.training.model import read_model_config, skeleton

BYTES = 4  # the wire is fp32


@dataclass(frozen=True)
class MethodCost:
    """Bytes per client and round in the steady state with every client of the cohort reporting, heads included.

    `first_down`: the first round's download (no base update yet); `once`: sent to each client once in a run.
    """

    method: str
    exact: str
    trainable: int
    up: int
    down: int
    first_down: int
    once: int


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
    spec = Spec(ADAPTERS[config.adapter.kind], attach.layers(model), config.seed)
    heads = sum(p.numel() for p in attach.heads(model).values())
    adapters = sum(p.numel() for p in attach.factors(model).values())
    base = sum(p.numel() for p in model.parameters()) - adapters - heads
    if cohort is None:
        cohort = config.federation.cohort or len(config.clients) or config.federation.clients or DEFAULT_CLIENTS
    return Plan(
        model=config.model.path,
        base_parameters=base,
        adapted_layers=len(spec.layers),
        heads=heads,
        cohort=cohort,
        clients=max(cohort, len(config.clients) or config.federation.clients or DEFAULT_CLIENTS),
        costs=tuple(_cost(c, spec, heads, cohort) for c in _variants(config)),
        memory=_memory(config, spec, base, heads),
    )


def _variants(config: Config) -> list[Config]:
    """The config itself, and every other method that fits its adapter with default options."""
    variants = [config]
    for name, method in METHODS.items():
        if name != config.method.name and config.adapter.kind in method.adapters:
            plain = config.model_dump(mode="json", exclude_unset=True)
            variants.append(from_dict(plain | {"method": {"name": name, "weights": config.method.weights}}))
    return variants


def _cost(config: Config, spec: Spec, heads: int, cohort: int) -> MethodCost:
    method = make_method(config)
    payload, trained = method.payload(spec, cohort), method.trained(spec)
    sent = [factor for factor in trained if factor not in method.drawn(spec)]
    return MethodCost(
        method=config.method.name,
        exact=method.exact,
        trainable=spec.size(*trained) + heads,
        up=BYTES * (payload.up + heads),
        down=BYTES * (payload.down + heads),
        first_down=BYTES * ((spec.size(*sent) if sent else 0) + heads),
        once=BYTES * payload.once,
    )


def _memory(config: Config, spec: Spec, base: int, heads: int) -> Memory:
    width = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    trained = spec.size(*make_method(config).trained(spec)) + heads
    shape = read_model_config(config)
    layers, hidden = getattr(shape, "num_hidden_layers", 0), getattr(shape, "hidden_size", 0)
    inner = getattr(shape, "intermediate_size", 4 * hidden) or 4 * hidden
    tokens = config.federation.batch_size // config.federation.accumulate * config.data.max_length
    logits = 2 * 4 * tokens * getattr(shape, "vocab_size", 0) if config.model.task == "causal-lm" else 0
    moves = config.method.name in ("fedex", "flora") or config.method.residual == "fold"
    return Memory(
        base=width * base,
        # fp32: value, gradient, and two moments
        adapter_and_optimizer=16 * trained,
        # about 10 hidden-sized and 3 inner-sized tensors a layer are kept for the backward pass, logits twice in fp32
        activations=width * tokens * layers * (10 * hidden + 3 * inner) + logits,
        host_copy_of_moved_layers=width * sum(layer.m * layer.n for layer in spec.layers) if moves else 0,
    )
