"""ABBA (Singhal, Ponkshe, Vepakomma, 2025): delta = s (B1 A1) o (B2 A2), a Hadamard product of two low-rank matrices.

Its rank reaches r1 r2 at the (r1 + r2)(m + n) numbers of LoRA at rank r1 + r2: (B1 A1) o (B2 A2) = Bkr Akr with the
Khatri-Rao factors Bkr[i, p r2 + q] = B1[i, p] B2[i, q] and Akr[p r2 + q, j] = A1[p, j] A2[q, j] (theorem 1 there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters.base import Adapter, Factors, Layer, covariance
from fedray.adapters.modules import HadamardProduct
from fedray.lowrank import LowRank, khatri_rao_columns, khatri_rao_rows, same, top_svd
from fedray.options import option

A1, B1, A2, B2 = "abba_A1", "abba_B1", "abba_A2", "abba_B2"


@dataclass(frozen=True)
class Abba(Adapter):
    """Factors `abba_B1` (m x r1), `abba_A1` (r1 x n), `abba_B2` (m x r2), `abba_A2` (r2 x n), with r1 + r2 = rank;
    see `Adapter`.

    (B1, A1) start at the SVD of W0, B2 at zero, A2 Kaiming uniform (gain sqrt 2). `scale`: `paper` alpha^2 / sqrt(r1
    r2) or `released`, the authors' code: alpha. With (B1, A1) at rest the delta is bilinear in (B2, A2): that is the
    `pair`.
    """

    kind = "abba"
    trains = (A1, B1, A2, B2)
    pair = (B2, A2)
    started = (B1, A1)
    stacked = True
    scale: Literal["paper", "released"] = option(
        "paper", "alpha^2 / sqrt(r1 r2) (paper, default), or alpha, as the authors' released code has it"
    )

    @classmethod
    def configured(cls, options: Mapping[str, Any], rslora: bool) -> Adapter:
        if rslora:
            raise ValueError(
                "adapter.rslora scales B A by alpha / sqrt(rank), and abba has a scale of its own: "
                "use adapter.scale, or leave it out"
            )
        return super().configured(options, rslora)

    @staticmethod
    def ranks(rank: int) -> tuple[int, int]:
        """(r1, r2): half each, the odd one to the second."""
        return rank // 2, rank - rank // 2

    def scaling(self, rank: int, alpha: float, rslora: bool) -> float:
        return alpha**2 / math.sqrt(math.prod(self.ranks(rank))) if self.scale == "paper" else alpha

    def width(self, rank: int) -> int:
        if rank < 2:
            raise ValueError("adapter.rank 1 cannot be split in two: abba needs at least 2")
        return rank

    def delta_columns(self, rank: int) -> int:
        return math.prod(self.ranks(rank))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        r1, r2 = self.ranks(layer.rank)
        return {A1: (r1, layer.n), B1: (layer.m, r1), A2: (r2, layer.n), B2: (layer.m, r2)}

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        _, r2 = self.ranks(layer.rank)
        A_qn = torch.rand(r2, layer.n, generator=seeding.generator(seed, layer.name, A2))
        return {A2: (2 * A_qn - 1) * (6 / layer.n) ** 0.5, B2: torch.zeros(layer.m, r2)}

    def start(self, layer: Layer, weight: Tensor, seed: int) -> dict[str, Tensor]:
        """B1 = U S^1/2, A1 = S^1/2 V^T of W0's first r1 singular triplets."""
        U, S, Vt = top_svd(weight, self.ranks(layer.rank)[0], seeding.generator(seed, layer.name, "start"))
        return {B1: U * S.sqrt(), A1: S.sqrt()[:, None] * Vt}

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        return self.lift(layer, factors, LowRank(factors[B2], factors[A2]))

    def lift(self, layer: Layer, factors: Factors, inner: LowRank) -> LowRank:
        rows, columns = khatri_rao_rows(factors[B1], inner.B), khatri_rao_columns(factors[A1], inner.A)
        return LowRank(rows, columns) * layer.scale

    def together(self, layer: Layer, factors: Factors, x_ctn: Tensor) -> Tensor:
        rows, columns = khatri_rao_rows(factors[B1], factors[B2]), khatri_rao_columns(factors[A1], factors[A2])
        return x_ctn @ columns.mT @ rows.mT

    def averaging_error(
        self,
        layer: Layer,
        clients: Sequence[Factors],
        weights: Sequence[float],
        means: Factors,
        dtype: torch.dtype = torch.float64,
    ) -> LowRank:
        """The covariance of the pair where all clients share (B1, A1); the plain difference otherwise."""
        first = clients[0]
        if all(same(c[B1], first[B1]) and same(c[A1], first[A1]) for c in clients[1:]):
            return self.lift(layer, first, covariance(clients, weights, means, (B2, A2))).to(dtype)
        return super().averaging_error(layer, clients, weights, means, dtype)

    def module(self, layer: Layer) -> nn.Module:
        return HadamardProduct(A1, B1, A2, B2, self.shapes(layer))
