"""LoRA (Hu et al., ICLR 2022): delta = s B A with s = alpha / r, or alpha / sqrt(r) for rsLoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedray import seeding
from fedray.adapters.base import Factors, Layer
from fedray.lowrank import LowRank

A, B = "lora_A", "lora_B"


class Lora:
    """Factors `lora_A` (r x n) and `lora_B` (m x r); see `Adapter` for the contract."""

    kind = "lora"

    def shapes(self, layer: Layer) -> dict[str, tuple[int, int]]:
        return {A: (layer.rank, layer.n), B: (layer.m, layer.rank)}

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        """A uniform in +-1/sqrt(n) (PEFT's Kaiming start, a = sqrt 5), B zero."""
        A_rn = torch.rand(layer.rank, layer.n, generator=seeding.generator(seed, layer.name, A))
        return {A: (2 * A_rn - 1) / layer.n**0.5, B: torch.zeros(layer.m, layer.rank)}

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        return LowRank(layer.scale * factors[B], factors[A])

    def factors(self, layer: Layer, delta: LowRank) -> dict[str, Tensor]:
        missing = layer.rank - delta.k
        if missing < 0:
            raise ValueError(f"{layer.name}: a delta of {delta.k} columns does not fit rank {layer.rank}")
        pad = torch.nn.functional.pad
        return {A: pad(delta.A, (0, 0, 0, missing)), B: pad(delta.B / layer.scale, (0, missing))}

    def averaging_error(self, layer: Layer, clients: Sequence[Factors], weights: Sequence[float], means: Factors) -> LowRank:
        """The covariance of the factors over the clients, sum_{i<k} p_i (B_i - Bbar)(A_i - A_k) (METHODS.md 4.2).

        (k - 1) r columns, and no cancellation of large terms, unlike the difference of the two sums.
        """
        last = clients[-1]
        terms = [LowRank(layer.scale * (c[B] - means[B]), c[A] - last[A]) for c in clients[:-1]]
        if not terms:
            return LowRank.zeros(layer.m, layer.n, last[A].dtype)
        return LowRank.sum(terms, weights[:-1])
