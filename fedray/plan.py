"""What a run would cost, before it runs: parameters, bytes a round for every method, worker memory.

Works from a model's `config.json` alone: the model is built on the meta device and no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fedray.config.build import make_method, make_spec
from fedray.config.read import from_dict
from fedray.config.sections import DEFAULT_CLIENTS, Config
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation.channels.registry import carriage_of
from fedray.federation.start import start_traffic
from fedray.methods import METHODS, Spec
from fedray.methods.traffic import simulate
from fedray.privacy.plan import PrivacyPlan
from fedray.privacy.planning import plans_for
from fedray.training.outline import Outline, make_outline

BYTES = 4  # of a number on the way down: the wire is fp32


@dataclass(frozen=True)
class MethodCost:
    """Bytes per client and round in the steady state with every client of the cohort reporting, heads included; of
    the largest rank where ranks differ.

    `first_down`: the first round's download (no base update yet), without `once`: what the run sends to each client
    besides (bases, factors that rest, a base update that outgrew the dense matrix and is sent again as a whole).
    `start_up`, `start_down`: before round 1 (lora-sb's gradient). `run_up`, `run_down`: all of a run of `rounds`.
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
    """A worker's memory in bytes; `activations` is an estimate (for transformers), and `base` of a quantised model
    counts its layers without adapters as whole."""

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
    privacy: dict[str, PrivacyPlan] = field(default_factory=dict)
    """By client, of a private run whose numbers of examples are known; the run itself plans from noised ones."""

    def to_json(self) -> dict[str, Any]:
        numbers = self.costs[0].trainable
        privacy = {
            c: p.to_dict() | {"epsilon": p.epsilon, "signal_to_noise": p.signal_to_noise(numbers)}
            for c, p in self.privacy.items()
        }
        return asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total}, "privacy": privacy}


def plan(config: Config, cohort: int | None = None, classes: int = 2, counts: Mapping[str, int] | None = None) -> Plan:
    """The costs of a config. `cohort`: clients a round (default: as the config says); `counts`: examples of each
    client, where they are known. Raises ConfigError as `make_outline` and `plans_for` do."""
    outline = make_outline(config, classes)
    names, cohort = _clients(config, cohort)
    spec = make_spec(config, outline.layers, names)
    # The client whose costs are shown has the largest rank.
    by_rank = sorted(names, key=lambda name: -spec.ranks.get(name, 0))
    return Plan(
        model=config.model.path,
        base_parameters=outline.base,
        adapted_layers=len(spec.layers),
        heads=outline.heads,
        cohort=cohort,
        clients=len(names),
        costs=tuple(_cost(c, spec, outline.heads, by_rank[:cohort]) for c in _variants(config)),
        memory=_memory(config, spec, outline),
        privacy=plans_for(config, {c: float(max(n, config.client(c).batch_size)) for c, n in counts.items()})
        if counts and config.privacy.on
        else {},
    )


def _clients(config: Config, cohort: int | None) -> tuple[list[str], int]:
    """The clients' names, as many as the config says or a cohort needs, and the cohort's size (default: as the config
    says)."""
    count = len(config.clients) or config.federation.clients or DEFAULT_CLIENTS
    if not isinstance(config.adapter.rank, int):
        count = len(config.adapter.rank)
    cohort = config.federation.cohort or count if cohort is None else cohort
    named = list(config.adapter.rank) if isinstance(config.adapter.rank, dict) else []
    return named + [f"client {i}" for i in range(len(named), max(count, cohort))], cohort


def _variants(config: Config) -> list[Config]:
    """The config itself, and every other method that fits its adapter with default options."""
    variants, several = [config], not isinstance(config.adapter.rank, int)
    for name, method in METHODS.items():
        if (
            name != config.method.name
            and config.adapter.kind in method.adapters
            and (method.mixed_ranks or not several)
        ):
            plain = config.model_dump(mode="json", exclude_unset=True)
            with suppress(ConfigError):  # what the run's privacy does not admit is not offered
                variants.append(from_dict(plain | {"method": {"name": name, "weights": config.method.weights}}))
    return variants


def _cost(config: Config, spec: Spec, heads: int, cohort: Sequence[str]) -> MethodCost:
    method, rounds = make_method(config), config.federation.rounds
    # Two rounds beyond the run's, of which one trains A and the other B where a method alternates; what is sent
    # besides is in `once`.
    moves = simulate(method, spec, cohort, cohort[0], rounds + 4)
    moves, late = moves[:rounds], moves[rounds + 2 :]
    carriage, before = carriage_of(config, len(cohort)), start_traffic(spec)
    more_up, more_down = carriage.beside
    heads_up = heads + carriage.more
    start_up = carriage.width * before.up + before.sums * more_up
    start_down = BYTES * before.down + before.sums * more_down
    return MethodCost(
        method=config.method.name,
        exact=method.exact if method.robust is None else method.robust.exact,
        trainable=spec.size(*method.trained(spec)) + heads,
        up=carriage.update(sum(p.up for p in late) // 2 + heads_up) + more_up,
        down=BYTES * (sum(p.down for p in late) // 2 + heads) + more_down,
        first_down=BYTES * (moves[0].down + heads) + more_down,
        once=BYTES * sum(p.once for p in moves),
        start_up=start_up,
        start_down=start_down,
        run_up=start_up + sum(carriage.update(p.up + heads_up) + more_up for p in moves),
        run_down=start_down + sum(BYTES * (p.down + p.once + heads) + more_down for p in moves),
        rounds=rounds,
    )


def _kept(config: Config, outline: Outline) -> int:
    """Numbers a token that are kept for the backward pass: about 10 hidden-sized and 3 inner-sized tensors a block, or
    each block's input and those of the one that is worked out once more."""
    inside = 10 * outline.hidden + 3 * outline.inner
    return outline.blocks * outline.hidden + inside if config.model.checkpointing else outline.blocks * inside


def _memory(config: Config, spec: Spec, outline: Outline) -> Memory:
    width = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    method = make_method(config)
    moving = spec.size(*method.trained(spec))
    tokens = config.federation.micro_batch * config.data.max_length
    speaks = TASKS[config.model.task].model == "causal-lm"
    at_once = min(tokens, config.model.loss_chunk or tokens)
    logits = 2 * 4 * at_once * outline.vocabulary if speaks else 0
    adapted = sum(layer.m * layer.n for layer in spec.layers)
    bits = {None: 0.0, "nf4": width - 0.516, "int8": width - 1}[config.model.quantise]  # others are quantised too
    return Memory(
        base=round(width * outline.base - bits * adapted),
        # fp32: value, gradient, and two moments; factors at rest: their value
        adapter_and_optimizer=16 * (moving + outline.heads) + 4 * (spec.size() - moving),
        activations=width * tokens * _kept(config, outline) + logits,
        host_copy_of_moved_layers=width * adapted if method.moves_base and config.model.quantise is None else 0,
    )
