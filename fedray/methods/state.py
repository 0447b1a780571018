"""What methods compute with: the spec of a run, the messages of a round, the server's state and a cohort's updates.

The wire names a tensor by its layer and its factor, `LAYER.FACTOR` (`key`, `layer_of`, `factor_of`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Adapter, Layer, pad_to
from fedray.lowrank import LowRank

Tensors = Mapping[str, Tensor]


class Deltas(Mapping[str, LowRank]):
    """A matrix for each of some layers, made when it is asked for: at most one layer's is in memory at a time."""

    def __init__(self, layers: Iterable[Layer], make: Callable[[Layer], LowRank]):
        self._layers, self._make = {layer.name: layer for layer in layers}, make

    def __getitem__(self, name: str) -> LowRank:
        return self._make(self._layers[name])

    def image(self, name: str, vectors: Tensor) -> Tensor:
        """One of them times vectors (n x p), m x p in their dtype."""
        return self[name].image(vectors)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def key(layer: Layer, factor: str) -> str:
    """The name under which a layer's factor travels and is stored."""
    return f"{layer.name}.{factor}"


def factor_of(name: str) -> str:
    """The factor that such a name ends in: the inverse of `key`. Of a head's tensor it is the parameter (`weight`)."""
    return name.rsplit(".", 1)[1]


def layer_of(name: str) -> str:
    """The name of the layer (of a head: of the module) that a tensor belongs to."""
    return name.rsplit(".", 1)[0]


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

    @property
    def pair(self) -> tuple[str, str]:
        """The adapter's `pair`, for methods that do not fit an adapter without one."""
        pair = self.adapter.pair
        assert pair is not None, "a method that needs a pair does not fit an adapter without one"
        return pair

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
        rank = None if client is None else self.ranks.get(client)
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
    tensors: Mapping[str, Tensor]
    resets: bool = False


@dataclass(frozen=True)
class Broadcast:
    """The message to the clients. `tensors` travel every round, each increment once; `draw` costs no bytes.

    `trained`: the factors that train. `draw`: factor -> number of the draw it is seeded from. `plain`: numbers and
    names.
    """

    round: int
    tensors: dict[str, Tensor]
    increments: tuple[Increment, ...]
    trained: tuple[str, ...]
    draw: dict[str, int]
    plain: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State(Broadcast):
    """The server's state: the next broadcast and what it is about. It is the checkpoint.

    `heads`: names of head tensors. `memory`: what only the server keeps (moments of a server optimizer); it never
    travels.
    """

    spec: Spec = field(kw_only=True)
    heads: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)

    def replace(self, **changes: Any) -> State:
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
    method's broadcast does lose (before a server optimizer's step). `ideal_norm`: ||sum p_i delta_i||, the
    denominator of both. `standard_error`: of the first two, where they are estimates (`diagnose`).
    """

    aggregation_error: float | None
    exactness: float | None
    ideal_norm: float | None
    standard_error: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sketch:
    """What stands for sum p_i delta_i of many clients. `images`: by layer, its product (m x p, fp64) with the first n
    of the `vectors` (p columns of independent standard normals)."""

    vectors: Tensor
    images: Mapping[str, Tensor]


@dataclass(frozen=True)
class Cohort:
    """The updates of a round: names, weights p_i, and the means of the factors (added in fp64, rounded once to the
    clients' dtype; the others as they were before the round).

    `tensors`: complete factors per client as they came; none where the cohort is large and the method needs their
    means alone. `unrounded`: the means of what came, in fp64. Of a large cohort the ideal is told by the `sketch`, or
    (`by_means`) it is the delta of those means.
    """

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    tensors: tuple[Tensors, ...]
    means: dict[str, Tensor]
    dtype: torch.dtype
    unrounded: dict[str, Tensor]
    sketch: Sketch | None = None
    by_means: bool = False

    def cast(self, tensors: Tensors) -> dict[str, Tensor]:
        """Back to the dtype the clients train in."""
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()}

    def factors(self, spec: Spec, layer: Layer, whole: bool = False) -> Sequence[dict[str, Tensor]]:
        """The clients' factors of one layer, in fp64, each at its own rank (`whole`: with zeros up to the largest); one
        that all share is one tensor. Each is made when it is asked for."""
        return _Factors(self, spec, layer, whole)


class _Factors(Sequence[dict[str, Tensor]]):
    """Of one layer, of every client of a cohort."""

    def __init__(self, cohort: Cohort, spec: Spec, layer: Layer, whole: bool):
        self._cohort, self._spec, self._whole = cohort, spec, whole
        self._keys = {f: key(layer, f) for f in spec.names}
        first = cohort.tensors[0]
        self._shared = {
            f: first[name].double()
            for f, name in self._keys.items()
            if not spec.ranks and all(tensors[name] is first[name] for tensors in cohort.tensors)
        }

    def __len__(self) -> int:
        return len(self._cohort.tensors)

    @overload
    def __getitem__(self, i: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        tensors = self._cohort.tensors[i]
        separate = {name: tensors[name] for f, name in self._keys.items() if f not in self._shared}
        cut = separate if self._whole else self._spec.cut(self._cohort.clients[i], separate)
        return {factor_of(n): t.double() for n, t in cut.items()} | self._shared
