"""LoRA-SB (Ponkshe et al., 2024): delta = s B R A between two frozen bases with orthonormal columns and rows; only
the r x r core R trains. Where the bases come from is `adapter.subspace` (`fedray/federation/start.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters.base import Adapter, Factors, Layer, Origin
from fedray.adapters.modules import CoreProduct
from fedray.lowrank import LowRank, top_svd
from fedray.options import option

A, B, R = "sb_A", "sb_B", "sb_R"

#: Which subspaces each of the options about them counts for.
_BELONGS = {
    "subspace_source": ("public",),
    "subspace_examples": ("public", "gradient", "gradient-raw"),
    "subspace_oversample": ("public", "gradient-raw"),
    "subspace_passes": ("public", "gradient-raw"),
}


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
    unpaired = "only its core trains, and the plain mean of that is exact: use fed-sb"
    subspace: Literal["weights", "gradient", "gradient-raw", "public", "private"] = option(
        "weights",
        "bases from the SVD of the weights (default), the clients' summed gradient with or without sign, "
        "a public data set, or clipped and noised gradients",
    )
    subspace_examples: int = option(64, "examples a client takes the gradient over", ge=1)
    subspace_source: str | None = option(
        None,
        "the public data set (a hub id, a folder or a file), with the columns of the data section",
        where="subspace public",
    )
    subspace_oversample: int = option(
        16, "columns beyond the rank of the range finder", where="subspace gradient-raw and public", ge=0
    )
    subspace_passes: int = option(
        2, "power iterations of the range finder, two uploads each", where="subspace gradient-raw and public", ge=0
    )

    @classmethod
    def configured(cls, options: Mapping[str, Any], rslora: bool) -> Adapter:
        subspace = options.get("subspace", "weights")
        if subspace == "public" and "subspace_source" not in options:
            raise ValueError("adapter.subspace public needs adapter.subspace_source, the public data set")
        for name, subspaces in _BELONGS.items():
            if name in options and subspace not in subspaces:
                raise ValueError(
                    f"adapter.{name} belongs to adapter.subspace {' and '.join(subspaces)}, "
                    f"not to {subspace}: leave it out"
                )
        return super().configured(options, rslora)

    @property
    def origin(self) -> Origin:
        """Every column of a private sketch adds noise and every pass a release, so it has none beyond the rank."""
        if self.subspace == "private":
            return Origin("private", self.subspace_examples)
        return Origin(self.subspace, self.subspace_examples, self.subspace_oversample, self.subspace_passes)

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

    def together(self, layer: Layer, factors: Factors, x_ctn: Tensor) -> Tensor:
        return x_ctn @ factors[A].mT @ factors[R].mT @ factors[B].mT

    def averaging_error(
        self,
        layer: Layer,
        clients: Sequence[Factors],
        weights: Sequence[float],
        means: Factors,
        dtype: torch.dtype = torch.float64,
    ) -> LowRank:
        """Zero: the delta is linear in R and the bases are shared."""
        return LowRank.zeros(layer.m, layer.n, dtype)

    def module(self, layer: Layer) -> nn.Module:
        return CoreProduct(A, B, R, self.shapes(layer))
