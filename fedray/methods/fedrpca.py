"""FedRPCA (Jhunjhunwala et al., 2025, arXiv 2506.01194): the clients' changes split into what they share and what is
their own, by robust PCA, and the second counted more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedray.methods.deltas import deltas
from fedray.methods.fedit import FedIT
from fedray.methods.state import Cohort, Deltas, State, key
from fedray.options import option


@dataclass(frozen=True)
class FedRPCA(FedIT):
    """Per factor, D (numbers x k) holds the clients' changes as columns, D = L + S by robust PCA; the factor moves by
    L p + `sparse_scale` S p. Not exact, on purpose. r (m + n) both ways."""

    name = "fedrpca"
    exact = "no"
    linear = False
    kept = ()
    sparse_scale: float = option(2.0, "how much the clients' own (sparse) part counts", gt=0)

    def merge(self, state: State, cohort: Cohort) -> tuple[State, Deltas]:
        spec, means = state.spec, dict(cohort.means)
        before = self.view(spec, self.broadcast(state), None).tensors
        for name in (key(layer, f) for layer in spec.layers for f in state.trained):
            old = before[name].double()
            D_nk = torch.stack([(t[name].double() - old).flatten() for t in cohort.tensors], 1)
            L_nk, S_nk = robust_pca(D_nk)
            p_k = D_nk.new_tensor(cohort.weights)
            means[name] = old + (L_nk @ p_k + self.sparse_scale * (S_nk @ p_k)).reshape(old.shape)
        sent = cohort.cast({name: means[name] for name in state.tensors})
        return state.replace(round=state.round + 1, tensors=sent), deltas(spec, means | sent)


def robust_pca(D: Tensor, tolerance: float = 1e-7, steps: int = 500) -> tuple[Tensor, Tensor]:
    """L (low rank) and S (sparse) with L + S = D, N x k with k small, fp64: principal component pursuit by inexact
    augmented Lagrange multipliers (Lin, Chen, Ma, 2010, arXiv 1009.5055), lambda = 1 / sqrt(max(N, k))."""
    if D.is_meta:  # no numbers to split: both have D's shape
        return D, torch.empty_like(D)
    norm = torch.linalg.matrix_norm(D)
    if D.shape[1] == 1 or norm == 0:
        return D, torch.zeros_like(D)
    lam, top = max(D.shape) ** -0.5, torch.linalg.matrix_norm(D, 2)
    Y = D / torch.maximum(top, D.abs().max() / lam)
    S, mu = torch.zeros_like(D), 1.25 / top
    for _ in range(steps):
        U, values, Vt = torch.linalg.svd(D - S + Y / mu, full_matrices=False)
        L = (U * (values - 1 / mu).clamp_min(0)) @ Vt
        rest = D - L + Y / mu
        S = rest.sign() * (rest.abs() - lam / mu).clamp_min(0)
        gap = D - L - S
        if torch.linalg.matrix_norm(gap) <= tolerance * norm:
            break
        Y, mu = Y + mu * gap, mu * 1.5
    return D - S, S  # what the tolerance leaves belongs to L: their sum is D
