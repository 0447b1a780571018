"""Per layer, the delta that factors mean: of one set of factors, of a cohort's mean update, of what averaging loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.state import Cohort, Spec, Tensors


class PerLayer(Mapping[str, LowRank]):
    """A matrix for each of some layers, made when it is asked for: at most one layer's is in memory at a time."""

    def __init__(self, layers: Iterable[Layer], make: Callable[[Layer], LowRank]):
        self._layers, self._make = {layer.name: layer for layer in layers}, make

    def __getitem__(self, name: str) -> LowRank:
        return self._make(self._layers[name])

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def ideal(spec: Spec, cohort: Cohort) -> PerLayer:
    """sum p_i delta_i per layer, in fp64."""
    return PerLayer(
        spec.layers, lambda layer: spec.adapter.mean_delta(layer, cohort.factors(spec, layer), cohort.weights)
    )


def inner_mean(spec: Spec, cohort: Cohort, layer: Layer) -> LowRank:
    """sum p_i B_i A_i of the adapter's pair in one layer, in fp64: what SVD-based methods reduce to its rank."""
    B, A = spec.pair
    return LowRank.total((LowRank(f[B], f[A]) for f in cohort.factors(spec, layer)), cohort.weights)


def averaging_error(spec: Spec, cohort: Cohort) -> PerLayer:
    """sum p_i delta_i - delta(mean factors) per layer: the error that plain factor averaging makes."""

    def make(layer: Layer) -> LowRank:
        means = {f: t.double() for f, t in spec.factors(layer, cohort.means).items()}
        return spec.adapter.averaging_error(layer, cohort.factors(spec, layer, whole=True), cohort.weights, means)

    return PerLayer(spec.layers, make)


def deltas(spec: Spec, tensors: Tensors) -> PerLayer:
    """Per layer, the delta that the factors mean, in fp64."""
    return PerLayer(
        spec.layers,
        lambda layer: spec.adapter.delta(layer, {n: t.double() for n, t in spec.factors(layer, tensors).items()}),
    )
