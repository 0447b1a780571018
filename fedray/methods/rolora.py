"""RoLoRA (Chen et al., NeurIPS 2025, arXiv 2502.01755): B and A train in turn, a round each."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.methods.base import Method
from fedray.methods.deltas import deltas
from fedray.methods.state import Cohort, Deltas, Increment, Spec, State, key


@dataclass(frozen=True)
class RoLoRA(Method):
    """Round 1, 3, ...: B <- sum p_i B_i over the shared A; round 2, 4, ...: A <- sum p_i A_i over the shared B. Exact,
    because the delta is linear in the factor that trains. r m, then r n, both ways: the factor averaged last is sent
    once to each client."""

    name = "rolora"
    exact = "yes"
    linear = True
    kept = ()
    alternates = True

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return (spec.pair[0],)

    def drawn(self, spec: Spec) -> dict[str, int]:
        return {name: 0 for name in spec.names if name not in spec.adapter.started}

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, (factor,) = state.spec, state.trained
        new = cohort.cast({key(layer, factor): cohort.means[key(layer, factor)] for layer in spec.layers})
        # the same factor's last value is obsolete
        older = tuple(i for i in state.increments if not i.tensors.keys() <= new.keys())
        version = max((i.version for i in state.increments), default=0) + 1
        other = next(f for f in spec.pair if f != factor)
        heads = cohort.cast({name: cohort.means[name] for name in state.heads})
        merged = state.replace(
            round=state.round + 1, tensors=heads, increments=(*older, Increment(version, new)), trained=(other,)
        )
        return merged, deltas(spec, cohort.means | new)
