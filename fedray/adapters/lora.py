"""LoRA (Hu et al., ICLR 2022): delta = s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Adapter, Factors, Layer, covariance
from fedray.lowrank import LowRank

A, B = "lora_A", "lora_B"


@dataclass(frozen=True)
class Lora(Adapter):
    """Factors `lora_A` (r x n) and `lora_B` (m x r); see `Adapter` for the contract. Inside the model it is PEFT's
    own layer."""

    kind = "lora"
    trains = (A, B)
    pair = (B, A)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {A: (layer.rank, layer.n), B: (layer.m, layer.rank)}

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        """A uniform in +-1/sqrt(n) (PEFT's Kaiming start, a = sqrt 5), B zero."""
        A_rn = torch.rand(layer.rank, layer.n, generator=seeding.generator(seed, layer.name, A))
        return {A: (2 * A_rn - 1) / layer.n**0.5, B: torch.zeros(layer.m, layer.rank)}

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        return LowRank(factors[B], factors[A]) * layer.scale

    def together(self, layer: Layer, factors: Factors, x_ctn: Tensor) -> Tensor:
        return x_ctn @ factors[A].mT @ factors[B].mT

    def lift(self, layer: Layer, factors: Factors, inner: LowRank) -> LowRank:
        return inner * layer.scale

    def averaging_error(
        self,
        layer: Layer,
        clients: Sequence[Factors],
        weights: Sequence[float],
        means: Factors,
        dtype: torch.dtype = torch.float64,
    ) -> LowRank:
        return covariance(clients, [layer.scale * w for w in weights], means, (B, A), dtype)
