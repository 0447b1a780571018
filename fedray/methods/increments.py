"""Increments: base updates and resting factors, which each client receives once, and what they add up to.

A base update of a layer travels as thin factors (`LAYER.base_B`, `LAYER.base_A`) or, where the clients' own factors are
fewer numbers, as a stack of them (`LAYER.base_FACTOR`) with a coefficient each (`LAYER.base_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedray.adapters.base import Layer
from fedray.lowrank import LowRank
from fedray.methods.state import Cohort, Deltas, Increment, Spec, State, Tensors, factor_of, layer_of


def is_base(name: str) -> bool:
    """Whether a tensor of an increment is part of a base update; otherwise it is a factor that rests."""
    return factor_of(name).startswith("base_")


def live_increments(increments: Sequence[Increment]) -> tuple[Increment, ...]:
    """Those not made obsolete by a later one that resets."""
    start = max((i for i, increment in enumerate(increments) if increment.resets), default=0)
    return tuple(increments[start:])


def base_total(spec: Spec, increments: Sequence[Increment]) -> Deltas:
    """Per layer, all base updates since W0 as one LowRank: the same factors, so the same bits, for whoever asks."""

    def make(layer: Layer) -> LowRank:
        return LowRank.sum(part for i in increments for part in base_parts(spec, layer, i.tensors))

    return Deltas((layer for layer in spec.layers if any(has_base(i.tensors, layer) for i in increments)), make)


def has_base(tensors: Tensors, layer: Layer) -> bool:
    """Whether an increment moves that layer's base."""
    return f"{layer.name}.base_B" in tensors or f"{layer.name}.base_weights" in tensors


def base_parts(spec: Spec, layer: Layer, tensors: Tensors) -> list[LowRank]:
    """What an increment adds to one layer's base: thin factors, or those that a stack's adapter factors mean, one by
    one."""
    if f"{layer.name}.base_B" in tensors:
        return [LowRank(tensors[f"{layer.name}.base_B"], tensors[f"{layer.name}.base_A"])]
    if f"{layer.name}.base_weights" in tensors:
        stack = {f: tensors[f"{layer.name}.base_{f}"] for f in spec.names}
        return [
            spec.adapter.delta(layer, {f: t[i] for f, t in stack.items()}) * w.item()
            for i, w in enumerate(tensors[f"{layer.name}.base_weights"])
        ]
    return []


def base_tensors(deltas: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """A base update as it travels."""
    return {
        f"{name}.{side}": getattr(delta, side[-1]) for name, delta in deltas.items() for side in ("base_B", "base_A")
    }


def stacked_base_tensors(spec: Spec, cohort: Cohort, less: Tensors | None) -> dict[str, Tensor]:
    """The base update sum p_i delta_i - delta(less) as the factors themselves (adapters whose delta is wider than they
    are)."""
    tensors: dict[str, Tensor] = {}
    for layer in spec.layers:
        terms = list(cohort.factors(spec, layer))
        if less is not None:
            terms.append({f: t.double() for f, t in spec.factors(layer, less).items()})
        tensors |= {f"{layer.name}.base_{f}": torch.stack([t[f] for t in terms]) for f in spec.names}
        coefficients = [*cohort.weights, -1.0][: len(terms)]
        tensors[f"{layer.name}.base_weights"] = torch.tensor(coefficients, dtype=torch.float64)
    return tensors


def add_increment(state: State, tensors: dict[str, Tensor]) -> tuple[Increment, ...]:
    """The state's increments and one more.

    When a layer's base updates hold more numbers than it has `room` for, the total of every layer is compressed
    (losslessly: to min(m, n)) into an increment that resets the earlier ones. So neither the checkpoint nor the
    weights' rebuilding grows without end, and what is sent again is never more than what has been sent since the last
    time.
    """
    version = state.increments[-1].version + 1 if state.increments else 1
    increments = (*state.increments, Increment(version, tensors))
    live = live_increments(increments)
    held = _held(state.spec, live)
    if all(held[layer.name] <= room(layer) for layer in state.spec.layers):
        return increments
    rest = {n: t for i in live for n, t in i.tensors.items() if not is_base(n)}
    total = base_total(state.spec, live)
    return (Increment(version, rest | base_tensors({name: total[name].bounded() for name in total}), resets=True),)


def room(layer: Layer) -> int:
    """Numbers that a layer's base updates may hold before their total is compressed: twice min(m, n) columns and
    rows."""
    return 2 * min(layer.m, layer.n) * (layer.m + layer.n)


def _held(spec: Spec, increments: Sequence[Increment]) -> dict[str, int]:
    """Numbers that each layer's base updates hold, coefficients apart."""
    held = dict.fromkeys((layer.name for layer in spec.layers), 0)
    for increment in increments:
        for name, tensor in increment.tensors.items():
            if is_base(name) and not name.endswith("weights"):
                held[layer_of(name)] += tensor.numel()
    return held
