"""LoRA-SB (Ponkshe et al., 2024): delta = s B R A between two frozen bases with orthonormal columns and rows; only
the r x r core R trains. Where the bases come from is `adapter.subspace` (`fedray/federation/start.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters.base import Adapter, Factors, Layer
from fedray.adapters.modules import CoreProduct
from fedray.lowrank import LowRank, top_svd

A, B, R = "sb_A", "sb_B", "sb_R"


@dataclass(frozen=True)
class LoraSB(Adapter):
    """Factors `sb_B` (m x r), `sb_R` (r x r), `sb_A` (r x n); see `Adapter`.

    R starts at 0: the authors' own start of R, diag of the singular values, is 1e-5 of one optimizer step, so what
    matters is the subspace. With s = 1 (alpha = rank) a step on R is the projection of the full gradient's step on
    the subspace: (B B^T) g (A^T A).
    """

    kind = "lora-sb"
    trains = (R,)
    started = (B, A)

    def alpha(self, rank: int) -> float:
        """The rank, so that s = 1 (the authors' choice)."""
        return float(rank)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {A: (layer.rank, layer.n), B: (layer.m, layer.rank), R: (layer.rank, layer.rank)}

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        return {R: torch.zeros(layer.rank, layer.rank)}

    def start(self, layer: Layer, weight: Tensor, seed: int) -> dict[str, Tensor]:
        """`subspace: weights`, the data-free choice of LoRA-XS (arXiv 2405.17604): the first singular vectors of W0."""
        U, _, Vt = top_svd(weight, layer.rank, seeding.generator(seed, layer.name, "start"))
        return {B: U.contiguous(), A: Vt.contiguous()}

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        return LowRank(layer.scale * factors[B] @ factors[R], factors[A])

    def averaging_error(
        self, layer: Layer, clients: Sequence[Factors], weights: Sequence[float], means: Factors
    ) -> LowRank:
        """Zero: the delta is linear in R and the bases are shared."""
        return LowRank.zeros(layer.m, layer.n, means[R].dtype)

    def module(self, layer: Layer) -> nn.Module:
        return CoreProduct(A, B, R, self.shapes(layer))
