"""FedSVD (Lee et al., NeurIPS 2025, arXiv 2505.12805): FFA with a new basis every round."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.lowrank import LowRank
from fedray.methods.base import Method
from fedray.methods.deltas import deltas
from fedray.methods.state import Cohort, Deltas, Spec, State, key


@dataclass(frozen=True)
class FedSVD(Method):
    """B trains; U S V^T = SVD((sum p_i B_i) A), then B <- U S, A <- V^T: lossless, since the product has rank r. r m
    up, r (m + n) down."""

    name = "fedsvd"
    exact = "yes"
    linear = False
    kept = ()

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return (spec.pair[0],)

    def drawn(self, spec: Spec) -> dict[str, int]:
        return {name: 0 for name in spec.names if name not in spec.adapter.started}

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, sent = state.spec, {name: cohort.means[name] for name in state.heads}
        B, A = spec.pair
        for layer in spec.layers:
            U, S, Vt = LowRank(cohort.means[key(layer, B)], cohort.means[key(layer, A)]).svd()
            sent |= {key(layer, B): U * S, key(layer, A): Vt}
        sent = cohort.cast(sent)
        return state.replace(round=state.round + 1, tensors=sent), deltas(spec, cohort.means | sent)
