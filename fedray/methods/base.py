"""What a method is: a value with `init`, `broadcast`, `aggregate`, and `view` for the client's side of the wire.

Symbols (METHODS.md 0.3): k clients with weights p_i (sum 1), factors B_i (m x r) and A_i (r x n), scale s,
Bbar = sum p_i B_i, Abar = sum p_i A_i, delta_i = s B_i A_i, and the ideal sum p_i delta_i.
Sums run in fp64 in the order of the updates, so they do not depend on who came first; results return to the
updates' own dtype.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Adapter, Layer
from fedray.errors import RoundError
from fedray.lowrank import LowRank, relative_norm

Tensors = Mapping[str, Tensor]
Deltas = dict[str, LowRank]


def key(layer: Layer, factor: str) -> str:
    """The name under which a layer's factor travels and is stored."""
    return f"{layer.name}.{factor}"


@dataclass(frozen=True)
class Spec:
    """What a method must know of the model: its adapter, the adapted layers, the run's seed."""

    adapter: Adapter
    layers: tuple[Layer, ...]
    seed: int = 0

    def drawn(self, factor: str, draw: int) -> dict[str, Tensor]:
        """One factor of every layer, drawn afresh: no bytes need to travel for it."""
        return {
            key(layer, factor): self.adapter.draw(layer, seeding.derive(self.seed, "factors", draw))[factor]
            for layer in self.layers
        }

    def factors(self, layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
        """The factors of one layer out of a flat dictionary."""
        return {name: tensors[key(layer, name)] for name in self.adapter.shapes(layer)}

    def size(self, *factors: str) -> int:
        """How many numbers the named factors (all, when none is named) hold over all layers."""
        return sum(
            math.prod(shape)
            for layer in self.layers
            for name, shape in self.adapter.shapes(layer).items()
            if not factors or name in factors
        )


@dataclass(frozen=True)
class Increment:
    """What each client receives once: a base update (`LAYER.base_B`, `LAYER.base_A`) or factors frozen from now on.

    `version` counts from 1. `resets` says that all earlier increments are obsolete.
    """

    version: int
    tensors: dict[str, Tensor]
    resets: bool = False


@dataclass(frozen=True)
class Broadcast:
    """The message to the clients. `tensors` travel every round, each increment once; `draw` costs no bytes.

    `trained`: the factors that train. `draw`: factor -> number of the draw it is seeded from. `plain`: numbers and names.
    """

    round: int
    tensors: dict[str, Tensor]
    increments: tuple[Increment, ...]
    trained: tuple[str, ...]
    draw: dict[str, int]
    plain: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State(Broadcast):
    """The server's state: the next broadcast and what it is about. It is the checkpoint. `heads`: names of head tensors."""

    spec: Spec = None
    heads: tuple[str, ...] = ()

    def replace(self, **changes) -> State:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Update:
    """What a client sends: its trained factors and heads, and the weight it counts with (examples, or 1)."""

    client: str
    weight: float
    tensors: Tensors


@dataclass(frozen=True)
class View:
    """What a client trains from: every factor, the heads, the total base update, and which factors train."""

    tensors: dict[str, Tensor]
    base: Deltas
    trained: tuple[str, ...]


@dataclass(frozen=True)
class Diagnostics:
    """Relative Frobenius errors over all layers together.

    `aggregation_error`: what plain factor averaging would have lost against the ideal. `exactness`: what this
    method's broadcast does lose. `ideal_norm`: ||sum p_i delta_i||, the denominator of both.
    """

    aggregation_error: float
    exactness: float
    ideal_norm: float


@dataclass(frozen=True)
class Cohort:
    """The updates of a round, in fp64: names, weights p_i, complete factors per client, and their means."""

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    factors: tuple[dict[str, Tensor], ...]
    means: dict[str, Tensor]
    dtype: torch.dtype

    def cast(self, tensors: Tensors) -> dict[str, Tensor]:
        """Back to the dtype the clients train in."""
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A subclass says what it trains and sends at first, and how a cohort becomes one (`merge`)."""

    name: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]] = ("lora",)
    exact: ClassVar[str]  # "yes", "no", or what it is exact up to; for tables
    personal: ClassVar[bool] = False  # whether `view` differs from client to client

    def trained(self, spec: Spec) -> tuple[str, ...]:
        """The factors that train in the first round: all of them unless a method says otherwise."""
        return tuple(spec.adapter.shapes(spec.layers[0]))

    def drawn(self, spec: Spec) -> dict[str, int]:
        """The factors that clients draw from the seed instead of receiving them."""
        return {name: 0 for name in spec.adapter.shapes(spec.layers[0]) if name not in self.trained(spec)}

    def init(self, spec: Spec, heads: Tensors | None = None) -> State:
        """The state before round 1. `heads`: the initial values of modules trained whole (fp32)."""
        draw, heads = self.drawn(spec), dict(heads or {})
        sent = {name: t for f in self.trained(spec) if f not in draw for name, t in spec.drawn(f, 0).items()}
        return State(
            round=0, tensors=sent | heads, increments=(), trained=self.trained(spec), draw=draw, spec=spec, heads=tuple(heads)
        )

    def broadcast(self, state: State) -> Broadcast:
        """The message of the next round."""
        return Broadcast(**{f.name: getattr(state, f.name) for f in dataclasses.fields(Broadcast)})

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        """What a client makes of a broadcast; `client=None` is the global model."""
        tensors = {name: t for factor, draw in message.draw.items() for name, t in spec.drawn(factor, draw).items()}
        live = live_increments(message.increments)
        for increment in live:
            tensors |= {name: t for name, t in increment.tensors.items() if not is_base(name)}
        return View(tensors | message.tensors, base_total(spec, live), message.trained)

    def aggregate(self, state: State, updates: Iterable[Update]) -> tuple[State, Diagnostics]:
        """The next state and what was lost on the way. Raises RoundError on no updates or non-finite values."""
        cohort = self.gather(state, updates)
        merged, landed = self.merge(state, cohort)
        return merged, diagnose(state.spec, cohort, landed)

    @abstractmethod
    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        """The next state, and per layer the change of the effective weights (against the base of this round) it means."""

    def gather(self, state: State, updates: Iterable[Update]) -> Cohort:
        """Read the updates once, in order, complete them with the factors that did not train, and average."""
        names, weights, factors, sums = [], [], [], {}
        dtype, message = None, self.broadcast(state)
        start = None
        for update in updates:
            if start is None or self.personal:
                start = self.view(state.spec, message, update.client).tensors
            whole = start | dict(update.tensors)
            dtype = next(iter(update.tensors.values())).dtype
            for name, tensor in update.tensors.items():
                if not torch.isfinite(tensor).all():
                    raise RoundError(f"client '{update.client}' sent a value that is not finite in {name}: lower its learning rate")
            whole = {name: tensor.double() for name, tensor in whole.items()}
            for name, tensor in whole.items():
                sums[name] = sums[name] + update.weight * tensor if name in sums else update.weight * tensor
            names.append(update.client)
            weights.append(update.weight)
            factors.append(whole)
        total = math.fsum(weights)
        if not names or total <= 0:
            raise RoundError("a round needs at least one update with a positive weight")
        return Cohort(
            tuple(names), tuple(w / total for w in weights), tuple(factors), {n: t / total for n, t in sums.items()}, dtype
        )

    @abstractmethod
    def payload(self, spec: Spec, clients: int) -> Payload:
        """How many adapter numbers cross the wire per client in a round, heads not counted."""


@dataclass(frozen=True)
class Payload:
    """Numbers (of 4 bytes on the wire) per client and round in the steady state; `once` is sent once in a run."""

    up: int
    down: int
    once: int = 0


# --- shared by the methods -------------------------------------------------------------------------------------


def is_base(name: str) -> bool:
    return name.endswith((".base_B", ".base_A"))


def live_increments(increments: Sequence[Increment]) -> tuple[Increment, ...]:
    """Those not made obsolete by a later one that resets."""
    start = max((i for i, increment in enumerate(increments) if increment.resets), default=0)
    return tuple(increments[start:])


def base_total(spec: Spec, increments: Sequence[Increment]) -> Deltas:
    """Per layer, all base updates since W0 as one LowRank: the same factors, so the same bits, for whoever asks."""
    total = {}
    for layer in spec.layers:
        parts = [
            LowRank(i.tensors[f"{layer.name}.base_B"], i.tensors[f"{layer.name}.base_A"])
            for i in increments
            if f"{layer.name}.base_B" in i.tensors
        ]
        if parts:
            total[layer.name] = LowRank(torch.cat([p.B for p in parts], 1), torch.cat([p.A for p in parts], 0))
    return total


def base_tensors(deltas: Deltas) -> dict[str, Tensor]:
    """A base update as it travels."""
    return {f"{name}.{side}": getattr(delta, side[-1]) for name, delta in deltas.items() for side in ("base_B", "base_A")}


def add_increment(state: State, tensors: dict[str, Tensor]) -> tuple[Increment, ...]:
    """The state's increments and one more.

    When the factored total of a layer outgrows the dense matrix it is compressed (losslessly: to min(m, n)) into an
    increment that resets the earlier ones, so neither the checkpoint nor the weights' rebuilding grows without end.
    """
    version = state.increments[-1].version + 1 if state.increments else 1
    increments = (*state.increments, Increment(version, tensors))
    total = base_total(state.spec, live_increments(increments))
    if all(delta.k <= min(delta.shape) for delta in total.values()):
        return increments
    frozen = {n: t for i in live_increments(increments) for n, t in i.tensors.items() if not is_base(n)}
    bounded = {name: delta.bounded() for name, delta in total.items()}
    return (Increment(version, frozen | base_tensors(bounded), resets=True),)


def ideal(spec: Spec, cohort: Cohort) -> Deltas:
    """sum p_i delta_i per layer, in fp64."""
    return {
        layer.name: LowRank.sum(
            [spec.adapter.delta(layer, spec.factors(layer, f)) for f in cohort.factors], cohort.weights
        )
        for layer in spec.layers
    }


def averaging_error(spec: Spec, cohort: Cohort) -> Deltas:
    """sum p_i delta_i - delta(mean factors) per layer: the error that plain factor averaging makes."""
    return {
        layer.name: spec.adapter.averaging_error(
            layer, [spec.factors(layer, f) for f in cohort.factors], cohort.weights, spec.factors(layer, cohort.means)
        )
        for layer in spec.layers
    }


def deltas(spec: Spec, tensors: Tensors) -> Deltas:
    """Per layer, the delta that the factors mean, in fp64."""
    return {
        layer.name: spec.adapter.delta(layer, {n: t.double() for n, t in spec.factors(layer, tensors).items()})
        for layer in spec.layers
    }


def diagnose(spec: Spec, cohort: Cohort, landed: Deltas) -> Diagnostics:
    """Hold what landed, as it was rounded for the wire, against the ideal; all from thin factors."""
    wanted = ideal(spec, cohort)
    missed = [landed[name].to(torch.float64) - delta for name, delta in wanted.items()]
    return Diagnostics(
        aggregation_error=relative_norm(averaging_error(spec, cohort).values(), wanted.values()),
        exactness=relative_norm(missed, wanted.values()),
        ideal_norm=sum(delta.norm() ** 2 for delta in wanted.values()) ** 0.5,
    )
