"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): clients of different ranks, padded with zeros."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.lowrank import LowRank, weighted_sum
from fedray.methods.base import Method
from fedray.methods.deltas import deltas
from fedray.methods.state import Cohort, Deltas, State, key


@dataclass(frozen=True)
class HetLoRA(Method):
    """Factors padded to the largest rank and averaged with weights ||B_i A_i||_F / sum_j ||B_j A_j||_F (a layer's
    own, and instead of p_i, as published); client i gets the first r_i components. Not exact. The paper's pruning of
    a client's own rank is not done here: ranks stay as configured."""

    name = "hetlora"
    adapters = ("lora",)
    exact = "no"
    linear = False
    kept = ()
    mixed_ranks = True

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, means = state.spec, dict(cohort.means)
        B, A = spec.pair
        for layer in spec.layers:
            norms = [LowRank(f[B], f[A]).norm() for f in cohort.factors(spec, layer)]
            shares = [n / sum(norms) for n in norms] if sum(norms) > 0 else cohort.weights
            for name in (key(layer, A), key(layer, B)):
                means[name] = weighted_sum([t[name] for t in cohort.tensors], shares)
        sent = cohort.cast({name: means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), deltas(spec, sent)
