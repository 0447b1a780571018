"""FRA-LoRA (Trautmann, Hales, Volk, FLTA 2024, arXiv 2501.06332), Full Rank Aggregation, and the methods that
are the same map with one thing changed: FlexLoRA (clients of different ranks) and FLoRIST (a rank chosen by energy).

`FRA` aggregates the full updates and reduces them to rank r by SVD; `FRAFFA` freezes A after some rounds of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedray.adapters.base import pad_to
from fedray.lowrank import LowRank, columns_reaching
from fedray.methods.base import Method
from fedray.methods.deltas import Sum, deltas, inner_mean
from fedray.methods.ffa import FFA
from fedray.methods.increments import add_increment, base_tensors, base_total
from fedray.methods.state import Broadcast, Cohort, Deltas, Increment, Spec, State, View, key
from fedray.options import option


@dataclass(frozen=True)
class FRA(Method):
    """U S V^T = SVD_r(sum p_i B_i A_i); B <- U S, A <- V^T. Exact up to the tail sum_{j>r} S_j^2. r (m + n) both ways.

    `split`: `orthonormal` (default: A keeps the unit-sized rows it had at the start, so the learning rate of B keeps
    its meaning, and FRA-FFA can freeze it) or `balanced` (S^1/2 on both sides: small singular values shrink both
    gradients). `residual`: `drop` (the paper) or `fold` the tail into the base: then exact, at FedEx's download. With
    abba: the pair (B2, A2) over a resting (B1, A1).
    """

    name = "fra"
    exact = "to its tail"
    linear = False
    kept = ()
    split: Literal["orthonormal", "balanced"] = option(
        "orthonormal", "where the singular values go (default orthonormal: all on B)"
    )
    residual: Literal["drop", "fold"] = option(
        "drop", "drop the tail beyond rank r (the paper, default) or fold it into the base"
    )

    def trained(self, spec: Spec) -> tuple[str, ...]:
        return spec.pair

    @property
    def moves_base(self) -> bool:
        return self.residual == "fold"

    def kept_rank(self, S: Tensor, inner: LowRank) -> int:
        """How many of the first singular values of `inner` the factors take: as many as they have room for."""
        return len(S)

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, sent, tails = state.spec, {}, {}
        B, A = spec.pair
        for layer in spec.layers:
            room = spec.adapter.shapes(layer)[A][0]
            inner = inner_mean(spec, cohort, layer)
            whole = self.residual == "fold" and not inner.krylov(room)
            U, S, Vt = inner.svd(None if whole else room)
            r = min(room, self.kept_rank(S, inner))
            root = S[:r].sqrt() if self.split == "balanced" else torch.ones_like(S[:r])
            sent[key(layer, B)] = U[:, :r] * (S[:r] / root.clamp_min(torch.finfo(S.dtype).tiny))
            sent[key(layer, A)] = root[:, None] * Vt[:r]
            if self.residual == "fold":
                rests = {f: cohort.means[key(layer, f)].double() for f in spec.names}
                kept, rest = LowRank(U[:, :r] * S[:r], Vt[:r]), LowRank(U[:, r:] * S[r:], Vt[r:])
                tails[layer.name] = spec.adapter.lift(layer, rests, rest if whole else (inner - kept).bounded())
        sent = cohort.cast(sent | {name: cohort.means[name] for name in state.heads})
        merged = state.replace(round=state.round + 1, tensors=sent)
        landed = deltas(spec, self.view(spec, self.broadcast(merged), None).tensors)
        if any(tail.k for tail in tails.values()):
            stored = cohort.cast(base_tensors(tails))
            landed = Sum(spec.layers, landed, base_total(spec, [Increment(0, stored)]))
            merged = merged.replace(increments=add_increment(state, stored))
        return merged, landed


@dataclass(frozen=True)
class FRAFFA(FRA):
    """A schedule over methods: `fra_rounds` rounds of FRA, then A stays as FRA left it (orthonormal rows, shared by
    all) and only B trains and is averaged: exact, r m a round. The frozen A is sent once."""

    name = "fra-ffa"
    exact = "to its tail, then yes"
    linear = False
    kept = ()
    residual: Literal["drop"] = "drop"
    fra_rounds: int = option(1, "rounds of FRA before A is frozen (default: half of all rounds)", ge=1)

    @classmethod
    def configured(cls, options: Mapping[str, Any], rounds: int, adapter: str) -> Method:
        if options.get("split") == "balanced":
            raise ValueError(
                "method.split balanced does not fit fra-ffa: the A that it freezes needs orthonormal rows; leave it out"
            )
        if options.get("fra_rounds", 0) >= rounds > 1:
            raise ValueError(
                f"method.fra_rounds {options['fra_rounds']} leaves no round with A frozen out of {rounds}: "
                "lower it, or use fra"
            )
        return super().configured({"fra_rounds": max(1, rounds // 2), **options}, rounds, adapter)

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        if state.round >= self.fra_rounds:
            return FFA().merge(state, cohort)
        merged, landed = super().merge(state, cohort)
        if merged.round == self.fra_rounds:
            B, A = state.spec.pair
            names = [key(layer, A) for layer in state.spec.layers]
            increments = add_increment(merged, {name: merged.tensors[name] for name in names})
            sent = {name: t for name, t in merged.tensors.items() if name not in names}
            merged = merged.replace(tensors=sent, increments=increments, trained=(B,))
        return merged, landed

    @property
    def turns_after(self) -> int:
        return self.fra_rounds


@dataclass(frozen=True)
class FlexLoRA(FRA):
    """FlexLoRA (Bai et al., NeurIPS 2024): FRA for clients of different ranks; client i gets and sends the first r_i
    components.

    `exactness` is that of the global model, of the largest rank."""

    name = "flexlora"
    adapters = ("lora",)
    exact = "to its tail"
    linear = False
    kept = ()
    mixed_ranks = True
    residual: Literal["drop"] = "drop"


@dataclass(frozen=True)
class FLoRIST(FRA):
    """FLoRIST (arXiv 2506.09199): as FRA, but a layer's rank p <= r is the smallest that keeps `energy` of sum S_j^2.
    Sends p (m + n) down. What p leaves of the rank starts anew, A drawn and B zero, so that it trains again."""

    name = "florist"
    exact = "to its tail"
    linear = False
    kept = ()
    energy: float = option(0.99, "share of sum S_j^2 that a layer's rank keeps", gt=0, le=1)

    def kept_rank(self, S: Tensor, inner: LowRank) -> int:
        whole = inner.norm() ** 2 * (1 - 1e-12)  # the norm is rounded
        return columns_reaching(S, self.energy * whole)

    def view(self, spec: Spec, message: Broadcast, client: str | None) -> View:
        start = super().view(spec, message, client)
        B, A = spec.pair
        fresh, tensors = spec.drawn(A, message.round), dict(start.tensors)
        for layer in spec.layers:
            rows, name = tensors[key(layer, A)], key(layer, A)
            tensors[name] = torch.cat([rows, fresh[name][rows.shape[0] :].to(rows.dtype)])
            tensors[key(layer, B)] = pad_to(tensors[key(layer, B)], spec.adapter.shapes(layer)[B])
        return View(tensors, start.base, start.trained)
