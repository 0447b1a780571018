"""FRA-LoRA (Trautmann, Hales, Volk, FLTA 2024, arXiv 2501.06332): Full Rank Aggregation, METHODS.md section 5.

`FRA` aggregates the full updates and reduces them to rank r by SVD; `FRAFFA` freezes A after some rounds of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedray.adapters.lora import A, B
from fedray.lowrank import LowRank
from fedray.methods.base import (
    Cohort,
    Deltas,
    Method,
    Payload,
    Spec,
    State,
    add_increment,
    base_tensors,
    deltas,
    ideal,
    key,
)
from fedray.methods.ffa import FFA


@dataclass(frozen=True)
class FRA(Method):
    """U S V^T = SVD_r(sum p_i delta_i); B <- U S / s, A <- V^T. Exact up to the tail sum_{j>r} S_j^2.

    `split`: `orthonormal` (default: A keeps the unit-sized rows it had at the start, so the learning rate of B keeps its
    meaning, and FRA-FFA can freeze it) or `balanced` (S^1/2 on both sides: small singular values shrink both gradients).
    `residual`: `drop` (the paper) or `fold` the tail into the base: then exact, at FedEx's download.
    """

    name = "fra"
    exact = "to its tail"
    split: Literal["orthonormal", "balanced"] = "orthonormal"
    residual: Literal["drop", "fold"] = "drop"

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, sent, tails = state.spec, {}, {}
        for layer, delta in zip(spec.layers, ideal(spec, cohort).values(), strict=True):
            U, S, Vt = delta.svd(None if self.residual == "fold" else layer.rank)
            r = layer.rank
            root = S[:r].sqrt() if self.split == "balanced" else torch.ones_like(S[:r])
            head = LowRank(U[:, :r] * (S[:r] / root.clamp_min(torch.finfo(S.dtype).tiny)), root[:, None] * Vt[:r])
            sent |= {key(layer, name): t for name, t in spec.adapter.factors(layer, head).items()}
            tails[layer.name] = LowRank(U[:, r:] * S[r:], Vt[r:])
        sent = cohort.cast(sent | {name: cohort.means[name] for name in state.heads})
        landed, increments = deltas(spec, sent), state.increments
        if self.residual == "fold" and any(tail.k for tail in tails.values()):
            stored = cohort.cast(base_tensors(tails))
            landed = {n: d + LowRank(stored[f"{n}.base_B"], stored[f"{n}.base_A"]).to(torch.float64) for n, d in landed.items()}
            increments = add_increment(state, stored)
        return state.replace(round=state.round + 1, tensors=sent, increments=increments), landed

    def payload(self, spec: Spec, clients: int) -> Payload:
        size, tail = spec.size(), 0
        if self.residual == "fold":
            tail = sum(
                (min(clients * layer.rank, layer.m, layer.n) - layer.rank) * (layer.m + layer.n) for layer in spec.layers
            )
        return Payload(up=size, down=size + tail)


@dataclass(frozen=True)
class FRAFFA(FRA):
    """A schedule over methods: `fra_rounds` rounds of FRA, then A stays as FRA left it (orthonormal rows, shared by all)
    and only B trains and is averaged: exact, r m a round. The frozen A is sent once."""

    name = "fra-ffa"
    exact = "to its tail, then yes"
    fra_rounds: int = 1

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        if state.round >= self.fra_rounds:
            return FFA().merge(state, cohort)
        merged, landed = super().merge(state, cohort)
        if merged.round == self.fra_rounds:
            names = [key(layer, A) for layer in state.spec.layers]
            increments = add_increment(merged, {name: merged.tensors[name] for name in names})
            sent = {name: t for name, t in merged.tensors.items() if name not in names}
            merged = merged.replace(tensors=sent, increments=increments, trained=(B,))
        return merged, landed

    def payload(self, spec: Spec, clients: int) -> Payload:
        """Of the FFA phase; before it, FRA's."""
        return Payload(up=spec.size(B), down=spec.size(B), once=spec.size(A))
