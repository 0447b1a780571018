"""raFLoRA (Wu, Hu, Min, Wang, 2026, arXiv 2602.13486): FlexLoRA, each slice of rank weighted by those who have it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from fedray.methods.fra import FlexLoRA
from fedray.methods.state import Broadcast, Cohort, Deltas, Spec, State, View, key


@dataclass(frozen=True)
class RaFLoRA(FlexLoRA):
    """U S V^T = SVD_r(sum_j sum_{i: r_i > j} p_i / P_j b_ij a_ij^T), with b_ij, a_ij the j-th column of B_i and row of
    A_i and P_j = sum_{i: r_i > j} p_i: a component that few clients have is not diluted by those that have not. B <- U
    S, A <- V^T; client i gets and sends the first r_i components, r_i (m + n) both ways. Not exact against sum p_i
    delta_i, on purpose; with equal ranks it is FRA. A component that no client of a cohort had starts anew, A drawn and
    B zero, so that it trains again."""

    name = "raflora"
    exact = "no"
    linear = False
    kept = ()

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, B = state.spec, state.spec.pair[0]
        tensors = [dict(t) for t in cohort.tensors]
        for layer in spec.layers:
            ranks, name = [spec.ranks.get(client, layer.rank) for client in cohort.clients], key(layer, B)
            held = tensors[0][name].new_tensor(self.held(cohort.weights, ranks, layer.rank), dtype=torch.float64)
            for t in tensors:
                t[name] = t[name].double() / held
        return super().merge(state, dataclasses.replace(cohort, tensors=tuple(tensors)))

    @staticmethod
    def held(weights: tuple[float, ...], ranks: list[int], width: int) -> list[float]:
        """P_j of every component; 1 where no client has it, so that its zeros stay zeros."""
        shares = [math.fsum(p for p, r in zip(weights, ranks, strict=True) if r > j) for j in range(width)]
        return [share or 1.0 for share in shares]

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        start, A = super().view(spec, message, client), spec.pair[1]
        fresh, tensors = spec.whole(spec.cut(client, spec.drawn(A, message.round))), dict(start.tensors)
        for layer in spec.layers:
            name, received = key(layer, A), len(message.tensors[key(layer, A)])
            rest = fresh[name][received:].to(tensors[name].dtype)
            tensors[name] = torch.cat([tensors[name][:received], rest])
        return View(tensors, start.base, start.trained)
