"""What a method is: a value with `init`, `broadcast`, `aggregate`, and `view` and `upload` for the client's side of the wire.

Symbols (METHODS.md 0.3): k clients with weights p_i (sum 1), factors B_i (m x r) and A_i (r x n), scale s,
Bbar = sum p_i B_i, Abar = sum p_i A_i, delta_i = s B_i A_i, and the ideal sum p_i delta_i. With another adapter (B, A) is its
`pair`, and s B A stands for whatever delta its factors mean.
Sums run in fp64 in the order of the updates, so they do not depend on who came first; results return to the
updates' own dtype.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Adapter, Layer, pad_to
from fedray.errors import RoundError
from fedray.lowrank import LowRank, weighted_sum
from fedray.methods.server import ServerOptimizer

Tensors = Mapping[str, Tensor]
Deltas = Mapping[str, LowRank]

#: Gaussian vectors in the estimate of a norm that is a rounding error (`LowRank.norm`).
PROBES = 16

#: What every method's class says itself: a subclass that inherited `linear` could be admitted to a sum that it is not.
STATED = ("exact", "linear", "kept")


def key(layer: Layer, factor: str) -> str:
    """The name under which a layer's factor travels and is stored."""
    return f"{layer.name}.{factor}"


def factor_of(name: str) -> str:
    """The factor in a name that `key` made."""
    return name.rsplit(".", 1)[1]


@dataclass(frozen=True)
class Spec:
    """What a method must know of the model: its adapter, the adapted layers, the run's seed.

    `ranks`: the ranks of clients whose rank is not the layers' own, which is the largest.
    """

    adapter: Adapter
    layers: tuple[Layer, ...]
    seed: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The factors of a layer."""
        return tuple(self.adapter.shapes(self.layers[0]))

    def drawn(self, factor: str, draw: int) -> dict[str, Tensor]:
        """One factor of every layer, drawn from the seed: no bytes need to travel for it. Not to be written into."""
        if draw not in self._draws:
            while len(self._draws) > 1:  # this round's and the last one's are asked for again and again
                self._draws.pop(next(iter(self._draws)))
            seed = seeding.derive(self.seed, "factors", draw)
            self._draws[draw] = {layer.name: self.adapter.draw(layer, seed) for layer in self.layers}
        return {key(layer, factor): self._draws[draw][layer.name][factor] for layer in self.layers}

    @cached_property
    def _draws(self) -> dict[int, dict[str, dict[str, Tensor]]]:
        return {}

    def factors(self, layer: Layer, tensors: Tensors) -> dict[str, Tensor]:
        """The factors of one layer out of a flat dictionary."""
        return {name: tensors[key(layer, name)] for name in self.names}

    def of(self, client: str | None) -> Spec:
        """The spec with the client's own rank; the scale stays, so that equal products mean equal deltas."""
        rank = self.ranks.get(client)
        if rank is None:
            return self
        return dataclasses.replace(
            self, layers=tuple(dataclasses.replace(layer, rank=rank) for layer in self.layers), ranks={}
        )

    def cut(self, client: str | None, tensors: Tensors) -> dict[str, Tensor]:
        """Each factor's leading rows and columns, as many as the client's rank has."""
        if client not in self.ranks:
            return dict(tensors)
        shapes = {key(layer, f): s for layer in self.of(client).layers for f, s in self.adapter.shapes(layer).items()}
        return {
            n: t[tuple(slice(0, min(size, have)) for size, have in zip(shapes[n], t.shape, strict=True))]
            if n in shapes
            else t
            for n, t in tensors.items()
        }

    def whole(self, tensors: Tensors) -> dict[str, Tensor]:
        """Zeros where a factor was cut: the same delta."""
        shapes = {key(layer, f): s for layer in self.layers for f, s in self.adapter.shapes(layer).items()}
        return {n: pad_to(t, shapes[n]) if n in shapes else t for n, t in tensors.items()}

    def size(self, *factors: str, client: str | None = None) -> int:
        """How many numbers the named factors (all, when none is named) hold over all layers, at the client's rank."""
        return sum(
            math.prod(shape)
            for layer in self.of(client).layers
            for name, shape in self.adapter.shapes(layer).items()
            if not factors or name in factors
        )


@dataclass(frozen=True)
class Increment:
    """What each client receives once: a base update (`LAYER.base_*`) or factors that rest.

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
    """The server's state: the next broadcast and what it is about. It is the checkpoint. `heads`: names of head tensors.

    `memory`: what only the server keeps (moments of a server optimizer); it never travels.
    """

    spec: Spec = None
    heads: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)

    def replace(self, **changes) -> State:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Update:
    """What a client sends (`Method.upload`), and the weight it counts with (examples, or 1)."""

    client: str
    weight: float
    tensors: Tensors


@dataclass(frozen=True)
class View:
    """What a client trains from: every factor, the heads, the total base update, and which factors train."""

    tensors: dict[str, Tensor]
    base: Mapping[str, LowRank]
    trained: tuple[str, ...]


@dataclass(frozen=True)
class Diagnostics:
    """Relative Frobenius errors over all layers together; None where the server cannot know (each method says why).

    `aggregation_error`: what plain factor averaging would have lost against the ideal. `exactness`: what this
    method's broadcast does lose (before a server optimizer's step). `ideal_norm`: ||sum p_i delta_i||, the denominator of both.
    """

    aggregation_error: float | None
    exactness: float | None
    ideal_norm: float | None


@dataclass(frozen=True)
class Cohort:
    """The updates of a round: names, weights p_i, complete factors per client as they came, and their means (added in fp64, rounded
    once to the clients' dtype)."""

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    tensors: tuple[dict[str, Tensor], ...]
    means: dict[str, Tensor]
    dtype: torch.dtype

    def cast(self, tensors: Tensors) -> dict[str, Tensor]:
        """Back to the dtype the clients train in."""
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()}

    def factors(self, spec: Spec, layer: Layer) -> list[dict[str, Tensor]]:
        """The clients' factors of one layer, in fp64, each at its own rank; one that all share is one tensor."""
        shared = {f: self.tensors[0][key(layer, f)] for f in spec.names}
        shared = {
            f: t.double()
            for f, t in shared.items()
            if not spec.ranks and all(o[key(layer, f)] is t for o in self.tensors)
        }
        named = []
        for client, tensors in zip(self.clients, self.tensors, strict=True):
            own = {key(layer, f): tensors[key(layer, f)] for f in spec.names if f not in shared}
            named.append({n.rsplit(".", 1)[1]: t.double() for n, t in spec.cut(client, own).items()} | shared)
        return named


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A subclass says what it trains and sends at first, and how a cohort becomes one (`merge`).

    `adapters`: those it is sound with, its own first.
    """

    name: ClassVar[str]
    adapters: ClassVar[tuple[str, ...]] = ("lora", "abba")
    exact: ClassVar[str]  # "yes", "no", or what it is exact up to; for tables
    linear: ClassVar[bool]  # the aggregate is the mean of the uploads: a server optimizer may step on it
    kept: ClassVar[tuple[Literal["B", "A"], ...]]  # which factors of the pair stay with the client; see `keeps`
    personal: ClassVar[bool] = False  # whether `view` differs from client to client
    mixed_ranks: ClassVar[bool] = False  # whether clients may have different ranks
    alternates: ClassVar[bool] = False  # whether each round trains other factors than the last one
    asks: ClassVar[bool] = False  # whether the cohort is asked a second time (`question`, `answer`)
    server: ServerOptimizer | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Raises TypeError for a class whose own body leaves open what secure sums and privacy rely on."""
        super().__init_subclass__(**arguments)
        if missing := [name for name in STATED if name not in vars(cls)]:
            raise TypeError(
                f"{cls.__name__} must state {' and '.join(missing)} in its own body: an inherited one could be false"
            )

    # --- from a config -----------------------------------------------------------------------------------------

    @classmethod
    def configured(cls, options: Mapping[str, Any], rounds: int, adapter: str) -> Method:
        """The method with a config's `options` (those that are set, `server` among them).

        It is for a run of so many rounds with an adapter of that kind. Raises ValueError, with the reason, for options
        that do not go together.
        """
        return cls(**options)

    @classmethod
    def why_not(cls, adapter: type[Adapter]) -> str | None:
        """The reason why the method is not sound with an adapter, and what to use; None when it is."""
        return None if adapter.kind in cls.adapters else cls.unfit(adapter)

    @classmethod
    def unfit(cls, adapter: type[Adapter]) -> str:
        """The reason, for an adapter that is not among `adapters`."""
        if adapter.unpaired:
            return adapter.unpaired
        needed = f"it needs adapter.kind {' or '.join(cls.adapters)}, or use fra"
        if cls.mixed_ranks:
            return f"cutting {adapter.kind}'s factors to a client's rank has no meaning: {needed}"
        return f"it is not known to be sound there: {needed}"

    # --- what travels ------------------------------------------------------------------------------------------

    def trained(self, spec: Spec) -> tuple[str, ...]:
        """The factors that train in the first round: the adapter's own choice unless a method says otherwise."""
        return spec.adapter.trains

    def drawn(self, spec: Spec) -> dict[str, int]:
        """The factors that clients draw from the seed instead of receiving them."""
        return {name: 0 for name in spec.names if name not in (*self.trained(spec), *spec.adapter.started)}

    @property
    def fresh(self) -> bool:
        """Whether every round starts from the drawn and started factors again, so that none of them travels."""
        return False

    def keeps(self, spec: Spec) -> tuple[str, ...]:
        """Names of the factors that stay with the client from round to round: each client has a model of its own."""
        pair = dict(zip("BA", spec.adapter.pair or (), strict=False))
        return tuple(pair[side] for side in self.kept)

    def init(self, spec: Spec, heads: Tensors | None = None, start: Tensors | None = None) -> State:
        """The state before round 1. `heads`: initial values of modules trained whole; `start`: the adapter's `started` factors (fp32).

        What trains and is neither drawn nor kept travels every round; started factors that rest are an increment.
        """
        draw, heads, start = self.drawn(spec), dict(heads or {}), dict(start or {})
        travels = [] if self.fresh else [f for f in self.trained(spec) if f not in draw and f not in self.keeps(spec)]
        sent = {name: t for f in travels if f not in spec.adapter.started for name, t in spec.drawn(f, 0).items()}
        sent |= {name: t for name, t in start.items() if name.rsplit(".", 1)[1] in travels}
        once = {name: t for name, t in start.items() if name not in sent}
        increments = (Increment(1, once),) if once else ()
        draw |= dict.fromkeys(self.keeps(spec), 0)
        return State(
            round=0,
            tensors=sent | heads,
            increments=increments,
            trained=self.trained(spec),
            draw=draw,
            spec=spec,
            heads=tuple(heads),
        )

    def broadcast(self, state: State) -> Broadcast:
        """The message of the next round."""
        return Broadcast(**{f.name: getattr(state, f.name) for f in dataclasses.fields(Broadcast)})

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        """What a client makes of a broadcast; `client=None` is the global model. Factors come whole: zeros beyond a client's own rank."""
        tensors = {name: t for factor, draw in message.draw.items() for name, t in spec.drawn(factor, draw).items()}
        live = live_increments(message.increments)
        for increment in live:
            tensors |= {name: t for name, t in increment.tensors.items() if not is_base(name)}
        tensors |= message.tensors
        if spec.ranks:
            tensors = spec.whole(spec.cut(client, tensors))
        return View(tensors, base_total(spec, live), message.trained)

    def upload(self, spec: Spec, client: str, tensors: Tensors, round: int) -> dict[str, Tensor]:
        """What a client sends in a round (from 0) of its trained factors and heads: all that it does not keep, at its own rank."""
        return spec.cut(
            client, {name: t for name, t in tensors.items() if name.rsplit(".", 1)[1] not in self.keeps(spec)}
        )

    def question(self, state: State, updates: Sequence[Update]) -> dict[str, Tensor]:
        """A second message to the same cohort, once its updates are in, where the method `asks`."""
        raise NotImplementedError(f"{self.name} asks nothing")

    def answer(self, spec: Spec, question: Tensors, trained: Tensors) -> dict[str, Tensor]:
        """A client's answer to it, from the factors it trained in this round."""
        raise NotImplementedError(f"{self.name} asks nothing")

    # --- the server --------------------------------------------------------------------------------------------

    def aggregate(self, state: State, updates: Iterable[Update]) -> tuple[State, Diagnostics]:
        """The next state and what was lost on the way. Raises RoundError on no updates or non-finite values."""
        cohort = self.gather(state, updates)
        merged, landed = self.merge(state, cohort)
        diagnostics = diagnose(state.spec, cohort, landed)
        if self.server is not None:
            before = self.view(state.spec, self.broadcast(state), None).tensors
            moves = [n for n in cohort.means if n in state.heads or n.rsplit(".", 1)[1] in state.trained]
            stepped, memory = self.server.step(
                {n: before[n].double() for n in moves}, {n: cohort.means[n].double() for n in moves}, state.memory
            )
            merged = self.merge(state, dataclasses.replace(cohort, means=cohort.means | stepped))[0].replace(
                memory=memory
            )
        return merged, diagnostics

    @abstractmethod
    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas | None]:
        """The next state, and per layer the change of the effective weights (against the base of this round) it means; None where
        there is no global model that one could hold against the ideal."""

    def gather(self, state: State, updates: Iterable[Update]) -> Cohort:
        """Read the updates once, in order, complete them with the factors that did not train, and average."""
        names, weights, received = [], [], []
        message = self.broadcast(state)
        for update in updates:
            check_finite(update)
            names.append(update.client)
            weights.append(update.weight)
            received.append(state.spec.whole(update.tensors) if state.spec.ranks else dict(update.tensors))
        total = math.fsum(weights)
        if not names or total <= 0:
            raise RoundError("a round needs at least one update with a positive weight")
        dtype = next(iter(received[0].values())).dtype
        shares = tuple(w / total for w in weights)
        start = self.view(state.spec, message, None).tensors
        starts = [self.view(state.spec, message, c).tensors for c in names] if self.personal else [start] * len(names)
        means = {name: tensor.to(dtype) for name, tensor in start.items()}
        means |= {name: weighted_sum([r[name] for r in received], shares, dtype) for name in received[0]}
        return Cohort(tuple(names), shares, tuple(s | r for s, r in zip(starts, received, strict=True)), means, dtype)

    @abstractmethod
    def payload(self, spec: Spec, cohort: Sequence[str], client: str, round: int) -> Payload:
        """How many adapter numbers a client of every cohort moves in a round (from 0), heads not counted."""


@dataclass(frozen=True)
class Payload:
    """Numbers (of 4 bytes on the wire) of one client in one round; `once`: those down beside the usual ones (bases, factors that rest from
    now on, a base update sent again as a whole)."""

    up: int
    down: int
    once: int = 0


# --- shared by the methods -------------------------------------------------------------------------------------


def check_finite(update: Update) -> None:
    """Raises RoundError, naming the client, for a value that is not finite."""
    for name, tensor in update.tensors.items():
        if not torch.isfinite(tensor).all():
            raise RoundError(
                f"client '{update.client}' sent a value that is not finite in {name}: lower its learning rate"
            )


def is_base(name: str) -> bool:
    return name.rsplit(".", 1)[1].startswith("base_")


def live_increments(increments: Sequence[Increment]) -> tuple[Increment, ...]:
    """Those not made obsolete by a later one that resets."""
    start = max((i for i, increment in enumerate(increments) if increment.resets), default=0)
    return tuple(increments[start:])


class PerLayer(Mapping[str, LowRank]):
    """A matrix for each of some layers, made when it is asked for: at most one layer's is in memory at a time."""

    def __init__(self, layers: Iterable[Layer], make: Callable[[Layer], LowRank]):
        self._layers, self._make = {layer.name: layer for layer in layers}, make

    def __getitem__(self, name: str) -> LowRank:
        return self._make(self._layers[name])

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self):
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def base_total(spec: Spec, increments: Sequence[Increment]) -> PerLayer:
    """Per layer, all base updates since W0 as one LowRank: the same factors, so the same bits, for whoever asks."""

    def make(layer: Layer) -> LowRank:
        parts = [part for i in increments for part in base_parts(spec, layer, i.tensors)]
        return LowRank(torch.cat([p.B for p in parts], 1), torch.cat([p.A for p in parts], 0))

    return PerLayer((layer for layer in spec.layers if any(has_base(i.tensors, layer) for i in increments)), make)


def has_base(tensors: Tensors, layer: Layer) -> bool:
    return f"{layer.name}.base_B" in tensors or f"{layer.name}.base_weights" in tensors


def base_parts(spec: Spec, layer: Layer, tensors: Tensors) -> list[LowRank]:
    """What an increment adds to one layer's base: thin factors, or a stack of adapter factors with a coefficient each."""
    if f"{layer.name}.base_B" in tensors:
        return [LowRank(tensors[f"{layer.name}.base_B"], tensors[f"{layer.name}.base_A"])]
    if f"{layer.name}.base_weights" in tensors:
        stack = {f: tensors[f"{layer.name}.base_{f}"] for f in spec.names}
        return [
            spec.adapter.delta(layer, {f: t[i] for f, t in stack.items()}) * w.item()
            for i, w in enumerate(tensors[f"{layer.name}.base_weights"])
        ]
    return []


def base_tensors(deltas: Deltas) -> dict[str, Tensor]:
    """A base update as it travels."""
    return {
        f"{name}.{side}": getattr(delta, side[-1]) for name, delta in deltas.items() for side in ("base_B", "base_A")
    }


def stacked_base_tensors(spec: Spec, cohort: Cohort, less: Tensors | None) -> dict[str, Tensor]:
    """The base update sum p_i delta_i - delta(less) as the factors themselves (adapters whose delta is wider than they are)."""
    tensors = {}
    for layer in spec.layers:
        terms = cohort.factors(spec, layer) + (
            [{f: t.double() for f, t in spec.factors(layer, less).items()}] if less is not None else []
        )
        tensors |= {f"{layer.name}.base_{f}": torch.stack([t[f] for t in terms]) for f in spec.names}
        coefficients = [*cohort.weights, -1.0][: len(terms)]
        tensors[f"{layer.name}.base_weights"] = torch.tensor(coefficients, dtype=torch.float64)
    return tensors


def add_increment(state: State, tensors: dict[str, Tensor]) -> tuple[Increment, ...]:
    """The state's increments and one more.

    When a layer's base updates hold more than twice the numbers that min(m, n) columns and rows do, their total is compressed
    (losslessly: to min(m, n)) into an increment that resets the earlier ones, so neither the checkpoint nor the weights' rebuilding grows
    without end, and what is sent again is never more than what has been sent since the last time (`increment_numbers`).
    """
    version = state.increments[-1].version + 1 if state.increments else 1
    increments = (*state.increments, Increment(version, tensors))
    held = dict.fromkeys((layer.name for layer in state.spec.layers), 0)
    for name, tensor in (
        (n, t)
        for i in live_increments(increments)
        for n, t in i.tensors.items()
        if is_base(n) and not n.endswith("weights")
    ):
        held[name.rsplit(".", 1)[0]] += tensor.numel()
    if all(held[layer.name] <= room(layer) for layer in state.spec.layers):
        return increments
    frozen = {n: t for i in live_increments(increments) for n, t in i.tensors.items() if not is_base(n)}
    total = base_total(state.spec, live_increments(increments))
    return (Increment(version, frozen | base_tensors({name: total[name].bounded() for name in total}), resets=True),)


def room(layer: Layer) -> int:
    """Numbers that a layer's base updates may hold before their total is compressed."""
    return 2 * min(layer.m, layer.n) * (layer.m + layer.n)


def increment_numbers(spec: Spec, numbers: Sequence[int], columns: Sequence[int], rounds: int, rests: int = 0) -> int:
    """Numbers of the increment that `add_increment` makes after so many rounds, of which each adds `numbers` and `columns` to each layer's
    base update: the closed form of what goes down. `rests`: numbers of factors at rest, which a compressed increment carries along."""
    held, wide, sent = [0] * len(numbers), [0] * len(numbers), 0
    for _ in range(rounds):
        held, wide = (
            [h + n for h, n in zip(held, numbers, strict=True)],
            [w + c for w, c in zip(wide, columns, strict=True)],
        )
        sent = sum(numbers)
        if any(h > room(layer) for h, layer in zip(held, spec.layers, strict=True)):
            wide = [min(w, layer.m, layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
            held = [w * (layer.m + layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
            sent = sum(held) + rests
    return sent


def ideal(spec: Spec, cohort: Cohort) -> PerLayer:
    """sum p_i delta_i per layer, in fp64."""
    return PerLayer(
        spec.layers, lambda layer: spec.adapter.mean_delta(layer, cohort.factors(spec, layer), cohort.weights)
    )


def inner_mean(spec: Spec, cohort: Cohort, layer: Layer) -> LowRank:
    """sum p_i B_i A_i of the adapter's pair in one layer, in fp64: what SVD-based methods reduce to its rank."""
    B, A = spec.adapter.pair
    return LowRank.sum([LowRank(f[B], f[A]) for f in cohort.factors(spec, layer)], cohort.weights)


def averaging_error(spec: Spec, cohort: Cohort) -> PerLayer:
    """sum p_i delta_i - delta(mean factors) per layer: the error that plain factor averaging makes."""

    def make(layer: Layer) -> LowRank:
        factors = [{f: t[key(layer, f)].double() for f in spec.names} for t in cohort.tensors]
        means = {f: t.double() for f, t in spec.factors(layer, cohort.means).items()}
        return spec.adapter.averaging_error(layer, factors, cohort.weights, means)

    return PerLayer(spec.layers, make)


def deltas(spec: Spec, tensors: Tensors) -> PerLayer:
    """Per layer, the delta that the factors mean, in fp64."""
    return PerLayer(
        spec.layers,
        lambda layer: spec.adapter.delta(layer, {n: t.double() for n, t in spec.factors(layer, tensors).items()}),
    )


def diagnose(spec: Spec, cohort: Cohort, landed: Deltas | None) -> Diagnostics:
    """Hold what landed, as it was rounded for the wire, against the ideal; all from thin factors."""
    if landed is None:
        return Diagnostics(None, None, None)
    wanted, averaged = ideal(spec, cohort), averaging_error(spec, cohort)
    whole = lost = error = 0.0
    for layer in spec.layers:  # one at a time: in fp64 all of them would be twice as large as all updates
        delta = wanted[layer.name]
        whole += delta.norm(PROBES) ** 2
        lost += (landed[layer.name].to(torch.float64) - delta).norm(PROBES) ** 2
        error += averaged[layer.name].norm(PROBES) ** 2
    whole, lost, error = whole**0.5, lost**0.5, error**0.5
    return Diagnostics(error / whole if error else 0.0, lost / whole if lost else 0.0, whole)
