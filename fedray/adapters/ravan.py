"""RAVAN's adapter (NeurIPS 2025, arXiv 2506.05568): delta = s sum_h s_h B_h H_h A_h, several frozen random bases, of
which the cores H_h and their scales s_h train. Clients upload s_h H_h, in which the delta is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters.base import Adapter, Factors, Layer
from fedray.adapters.modules import CoreProduct
from fedray.lowrank import LowRank
from fedray.options import option

A, B, H, S = "ravan_A", "ravan_B", "ravan_H", "ravan_s"


@dataclass(frozen=True)
class Ravan(Adapter):
    """Factors `ravan_B` (m x h r), `ravan_A` (h r x n), `ravan_H` (h x r x r), `ravan_s` (h); `rank` is r, of each
    head.

    The bases are orthonormal and drawn from the seed: no bytes, and no data. `cores`: h, so rank h r for h r^2 numbers.
    """

    kind = "ravan"
    trains = (H, S)
    unpaired = "only its cores train, and the plain mean of those is exact: use ravan, or fed-sb with the scales held"
    cores: int = option(4, "number of bases and cores h, each of the rank", ge=1)

    def alpha(self, rank: int) -> float:
        """The rank, so that s = 1."""
        return float(rank)

    def width(self, rank: int) -> int:
        return self.cores * rank

    def delta_columns(self, rank: int) -> int:
        return self.cores * rank

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        h, r = self.cores, layer.rank
        return {A: (h * r, layer.n), B: (layer.m, h * r), H: (h, r, r), S: (h,)}

    def draw(self, layer: Layer, seed: int) -> dict[str, Tensor]:
        shapes = self.shapes(layer)

        def orthonormal(rows: int, name: str) -> Tensor:
            return torch.linalg.qr(
                torch.randn(rows, shapes[A][0], generator=seeding.generator(seed, layer.name, name))
            ).Q.contiguous()

        return {
            A: orthonormal(layer.n, A).T.contiguous(),
            B: orthonormal(layer.m, B),
            H: torch.zeros(shapes[H]),
            S: torch.ones(shapes[S]),
        }

    def delta(self, layer: Layer, factors: Factors) -> LowRank:
        core = torch.block_diag(*(factors[H] * factors[S][:, None, None]))
        return LowRank(layer.scale * factors[B] @ core, factors[A])

    def together(self, layer: Layer, factors: Factors, x_ctn: Tensor) -> Tensor:
        cores = factors[H] * factors[S][..., None, None]
        u_cthr = (x_ctn @ factors[A].mT).unflatten(-1, cores.shape[-3:-1])
        heads = (u_cthr.transpose(-3, -2) @ cores.mT).transpose(-3, -2)
        return heads.flatten(-2) @ factors[B].mT

    def averaging_error(
        self,
        layer: Layer,
        clients: Sequence[Factors],
        weights: Sequence[float],
        means: Factors,
        dtype: torch.dtype = torch.float64,
    ) -> LowRank:
        """Zero: what is averaged are the products s_h H_h, and the delta is linear in them."""
        return LowRank.zeros(layer.m, layer.n, dtype)

    def module(self, layer: Layer) -> nn.Module:
        return CoreProduct(A, B, H, self.shapes(layer), S)
