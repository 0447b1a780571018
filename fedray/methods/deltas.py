"""Per layer, the delta that factors mean: of one set of factors, of a cohort's mean update, of what averaging loses."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.state import Cohort, Deltas, Spec, Tensors


class Sum(Deltas):
    """The sum of two of them in each of some layers: the first of all of these, the second of some, or of all."""

    def __init__(self, layers: Iterable[Layer], first: Deltas, second: Deltas):
        super().__init__(layers, lambda layer: LowRank.sum(p[layer.name] for p in self._parts(layer.name)))
        self._first, self._second = first, second

    def _parts(self, name: str) -> list[Deltas]:
        return [self._first, self._second] if name in self._second else [self._first]

    def image(self, name: str, vectors: Tensor) -> Tensor:
        """Without the concatenation."""
        first, *rest = [part.image(name, vectors) for part in self._parts(name)]
        return first + rest[0] if rest else first


def ideal(spec: Spec, cohort: Cohort, dtype: torch.dtype = torch.float64) -> Deltas:
    """sum p_i delta_i per layer, in fp64, rounded once to `dtype`."""
    return Deltas(
        spec.layers, lambda layer: spec.adapter.mean_delta(layer, cohort.factors(spec, layer), cohort.weights, dtype)
    )


def inner_mean(spec: Spec, cohort: Cohort, layer: Layer) -> LowRank:
    """sum p_i B_i A_i of the adapter's pair in one layer, in fp64: what SVD-based methods reduce to its rank."""
    B, A = spec.pair
    return LowRank.total((LowRank(f[B], f[A]) for f in cohort.factors(spec, layer)), cohort.weights)


def averaging_error(spec: Spec, cohort: Cohort, dtype: torch.dtype = torch.float64) -> Deltas:
    """sum p_i delta_i - delta(mean factors) per layer, rounded once to `dtype`: the error that plain factor averaging
    makes."""

    def make(layer: Layer) -> LowRank:
        means = {f: t.double() for f, t in spec.factors(layer, cohort.means).items()}
        clients = cohort.factors(spec, layer, whole=True)
        return spec.adapter.averaging_error(layer, clients, cohort.weights, means, dtype)

    return Deltas(spec.layers, make)


def deltas(spec: Spec, tensors: Tensors) -> Deltas:
    """Per layer, the delta that the factors mean, in fp64."""
    return Deltas(
        spec.layers,
        lambda layer: spec.adapter.delta(layer, {n: t.double() for n, t in spec.factors(layer, tensors).items()}),
    )
